"""Masks in the forms of other libraries, each against dense attention with that mask."""

import oracles
import pytest
import tiny
import torch
from torch.nn.attention.flex_attention import flex_attention

from paroattn import BlockMask
from paroattn.block_mask import block_count, unpack_bits


def random_mask(tokens, block_q, heads=2):
    generator = torch.Generator().manual_seed(tokens)
    mask = torch.rand(heads, block_count(tokens, block_q), block_count(tokens, 64), generator=generator) < 0.4
    mask[..., 0] |= ~mask.any(-1)
    return BlockMask.from_dense(mask, tokens, block_q)


CASES = pytest.mark.parametrize(("tokens", "block_q"), [(256, 64), (333, 64), (333, 128), (70, 128)])


def qkv(tokens, heads=2):
    return torch.randn(3, 1, heads, tokens, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def expected(mask, tensors):
    identity = torch.arange(mask.tokens).expand(mask.heads, -1)
    return oracles.masked_attention(*tensors, mask.to_dense(), identity, block_q=mask.block_q)


@CASES
def test_flex_attention_computes_the_kept_blocks(tokens, block_q):
    mask, tensors = random_mask(tokens, block_q), qkv(tokens)
    exported = mask.to_flex()
    torch.testing.assert_close(flex_attention(*tensors, block_mask=exported), expected(mask, tensors))
    # What compiled code goes by: lists of full blocks.
    counts, indices = exported.full_kv_num_blocks[0], exported.full_kv_indices[0]
    listed = torch.zeros_like(mask.to_dense())
    for head, row in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        listed[head, row, indices[head, row, : counts[head, row]].long()] = True
    assert torch.equal(listed, mask.to_dense())
    assert not exported.kv_num_blocks.any()


@CASES
def test_rows_of_kept_blocks_attend_alike(tokens, block_q):
    mask, tensors = random_mask(tokens, block_q), qkv(tokens)
    for head in range(mask.heads):
        indptr, indices = mask.to_bsr(head)
        assert (indptr.dtype, indices.dtype) == (torch.int32, torch.int32)
        q, k, v = (x[0, head] for x in tensors)
        rows = []
        for row, (start, end) in enumerate(zip(indptr.tolist(), indptr[1:].tolist(), strict=False)):
            keys = torch.cat([torch.arange(block * 64, min(block * 64 + 64, tokens)) for block in indices[start:end]])
            logits = q[row * block_q : (row + 1) * block_q] @ k[keys].T / 4
            rows.append(logits.softmax(-1) @ v[keys])
        torch.testing.assert_close(torch.cat(rows), expected(mask, tensors)[0, head])


@CASES
def test_coordinates_attend_alike(tokens, block_q):
    mask, tensors = random_mask(tokens, block_q), qkv(tokens)
    hidden = torch.full((2, tokens, tokens), -torch.inf, dtype=torch.float64)
    for head, row, column in mask.to_coo().T.tolist():
        hidden[head, row * block_q : (row + 1) * block_q, column * 64 : (column + 1) * 64] = 0
    attended = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=hidden)
    torch.testing.assert_close(attended, expected(mask, tensors))


def test_a_plan_has_the_masks_of_a_layer():
    plan = tiny.make_plan(tiny.tiny_wan())
    mask = plan.mask(0, 1)
    assert (mask.heads, mask.tokens, mask.block_q) == (2, plan.grid.tokens, plan.block_q)
    for head in range(2):
        bits = plan.mask_table[int(plan.mask_index[0, 1, head])]
        assert torch.equal(mask.to_dense()[head], unpack_bits(bits, mask.to_dense().shape[-1]))
