"""Block masks: bits and back, lists of kept blocks, text blocks, density."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paroattn import BlockMask, TokenGrid
from paroattn.block_mask import block_count, pack_bits, text_blocks, unpack_bits


def random_mask(seed, heads, rows, columns):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(heads, rows, columns, generator=generator) < 0.4
    kept = torch.randint(columns, (heads, rows, 1), generator=generator)
    return mask.scatter(-1, kept, True)


@pytest.mark.parametrize(("tokens", "expected"), [(1, 1), (63, 1), (64, 1), (65, 2), (128, 2), (129, 3)])
def test_block_count_rounds_up(tokens, expected):
    assert block_count(tokens, 64) == expected


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_bits_hold_entry_8i_plus_j_in_bit_j_of_byte_i(entries):
    bits = pack_bits(torch.tensor(entries))
    number = int.from_bytes(bytes(bits.tolist()), "little")
    assert number == sum(1 << index for index, entry in enumerate(entries) if entry)
    assert len(bits) == -(-len(entries) // 8)
    assert unpack_bits(bits, len(entries)).tolist() == entries


@given(st.integers(0, 999), st.integers(1, 3), st.integers(1, 700), st.sampled_from((64, 128)))
def test_block_mask_round_trip_density_and_lists(seed, heads, tokens, block_q):
    dense = random_mask(seed, heads, block_count(tokens, block_q), block_count(tokens, 64))
    mask = BlockMask.from_dense(dense, tokens, block_q)
    assert torch.equal(mask.to_dense(), dense)
    assert mask.heads == heads
    assert mask.density == pytest.approx(dense.sum().item() / dense.numel())
    counts, indices = mask.kv_lists()
    assert counts.dtype == indices.dtype == torch.int32
    for head, row in torch.cartesian_prod(torch.arange(heads), torch.arange(dense.shape[1])).tolist():
        kept = dense[head, row].nonzero().flatten().tolist()
        others = (~dense[head, row]).nonzero().flatten().tolist()
        assert counts[head, row] == len(kept)
        assert indices[head, row].tolist() == kept + others


@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(0, 150),
    st.sampled_from(("prefix", "suffix")),
    st.sampled_from((64, 128)),
)
def test_text_blocks_are_those_that_touch_a_text_token(frames, height, width, text, position, block_q):
    grid = TokenGrid(frames, height, width, text, position)
    is_text = torch.arange(grid.tokens) >= grid.visual_tokens  # in every order, text comes last
    found = text_blocks(grid, block_q)
    for row in range(found.shape[0]):
        for column in range(found.shape[1]):
            rows, columns = slice(row * block_q, (row + 1) * block_q), slice(column * 64, (column + 1) * 64)
            assert bool(found[row, column]) == bool(is_text[rows].any() or is_text[columns].any())


def test_text_that_starts_on_a_block_edge_leaves_the_block_before_it_alone():
    assert text_blocks(TokenGrid(1, 8, 8, 1)).tolist() == [[False, True], [True, True]]


def test_a_row_without_blocks_is_refused_and_named():
    dense = torch.ones(2, 3, 3, dtype=torch.bool)
    dense[1, 2] = False
    with pytest.raises(ValueError, match="row 2 of head 1"):
        BlockMask.from_dense(dense, 192)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(1, 3, 3),
        torch.ones(3, 3, dtype=torch.bool),
        torch.ones(1, 3, 2, dtype=torch.bool),
        torch.ones(1, 4, 3, dtype=torch.bool),
    ],
)
def test_wrong_dtype_or_shape_says_what_was_expected(mask):
    with pytest.raises(ValueError, match=r"expected torch\.bool \[heads, 3, 3\] for 130 tokens"):
        BlockMask.from_dense(mask, 130)
