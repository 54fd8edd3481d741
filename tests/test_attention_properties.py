"""Everything the operator takes, in combination, against one token-by-token oracle in float64."""

import oracles
import pytest
import torch
from attention_inputs import inputs, masks, permutations
from hypothesis import given
from hypothesis import strategies as st

import paroattn
from paroattn import BlockMask, Precision

pytestmark = pytest.mark.usefixtures("every_backend")


@given(
    tokens=st.sampled_from((1, 63, 64, 65, 130, 200)),
    batch=st.integers(1, 2),
    heads=st.sampled_from(((2, 2), (4, 2), (3, 1))),
    head_dim=st.sampled_from((16, 100, 192)),
    block_q=st.sampled_from((64, 128)),
    padding=st.integers(0, 30),
    compensate=st.lists(st.booleans(), min_size=4, max_size=4),
    scale=st.sampled_from((None, 1.0, -0.3)),
    seed=st.integers(0, 99),
)
def test_any_combination_is_as_good_as_plain_float32(
    tokens, batch, heads, head_dim, block_q, padding, compensate, scale, seed
):
    heads, key_heads = heads
    query, key, value = inputs(tokens, heads, head_dim, batch, key_heads, seed)
    mask, order = masks(heads, tokens, seed, block_q), permutations(heads, tokens, seed)
    key_mask = torch.ones(batch, tokens, dtype=torch.bool)
    key_mask[-1, tokens - min(padding, tokens - 1) :] = (
        padding == 0 or tokens == 1
    )  # random orders leave some in each block
    settings = {"key_mask": key_mask, "compensate": compensate[:heads], "scale": scale}
    arguments = (query, key, value, mask, order)
    exact, exact_lse = oracles.sparse_attention(*arguments, **settings, block_q=block_q)
    plain, plain_lse = oracles.sparse_attention(*arguments, **settings, block_q=block_q, dtype=torch.float32)
    output, lse = paroattn.attention(
        query,
        key,
        value,
        permutation=order,
        block_mask=BlockMask.from_dense(mask, tokens, block_q),
        return_lse=True,
        **settings,
    )
    seen = exact_lse.isfinite()  # elsewhere key_mask hides every kept key, and the output is zero
    assert torch.equal(lse.isfinite(), seen)
    assert (output[~seen] == 0).all()
    if seen.any():
        assert (
            oracles.relative_error(output[seen], exact[seen])
            <= 2 * oracles.relative_error(plain[seen], exact[seen]) + 1e-6
        )
        floor = 1e-6 * (1 + float(exact_lse[seen].abs().max()))
        assert (lse - exact_lse)[seen].abs().max() <= 2 * (plain_lse - exact_lse)[seen].abs().max() + floor


@given(st.sampled_from((65, 130, 333)), st.sampled_from((64, 256)), st.booleans(), st.integers(0, 99))
def test_int8_with_masks_orders_and_compensation_stays_within_its_error(tokens, head_dim, compensate, seed):
    query, key, value = inputs(tokens, head_dim=head_dim, batch=2, seed=seed)
    key = key + 3  # the mean of k is taken out, and put back into lse
    mask, order = masks(2, tokens, seed), permutations(2, tokens, seed)
    expected, expected_lse = oracles.sparse_attention(query, key, value, mask, order, compensate=[compensate] * 2)
    output, lse = paroattn.attention(
        query,
        key,
        value,
        permutation=order,
        block_mask=mask,
        precision="int8",
        compensate=compensate,
        return_lse=True,
    )
    # Means of 64 random values have a standard deviation of 1/8, but at N = 65 the tail's block is one token, whose
    # largest channel, about 3, sets the scale they share: a step of 3/127 errs by 3/127/sqrt(12) = 0.054 of 1/8.
    assert 0.002 < oracles.relative_error(output, expected) < (0.06 if compensate else 0.03)
    assert (lse - expected_lse).abs().max() < 0.05


@pytest.mark.parametrize("gap", [80, 97, 98, 99, 100, 102, 103, 104, 110])
@pytest.mark.parametrize("number_format", ["int8", "int4"])
def test_a_block_far_below_the_maximum_adds_nothing(gap, number_format):
    query, key = torch.ones(1, 1, 128, 1), torch.zeros(1, 1, 128, 1)
    key[:, :, 64:], key[:, :, 100:] = -gap, -gap - 20
    value = torch.ones_like(key)
    value[:, :, 64:] = 1000
    for precision in (number_format, Precision("exact", number_format)):
        output = paroattn.attention(query, key, value, precision=precision, scale=1.0)
        assert (output - 1).abs().max() < 80  # V has one scale per channel: 1 of 1000 rounds to a step of up to 143
        assert output.isfinite().all()


def test_position_coded_values_tell_which_blocks_each_head_saw():
    tokens = 256
    query = torch.zeros(1, 4, tokens, 4)
    value = torch.nn.functional.one_hot(torch.arange(tokens) // 64, 4).float().expand(1, 4, tokens, 4)
    mask = torch.stack([torch.eye(4, dtype=torch.bool).roll(head, 1) for head in range(4)])
    output = paroattn.attention(query, query, value, block_mask=mask)
    for head in range(4):
        expected = (torch.arange(tokens) // 64 + head) % 4
        assert torch.equal(output[0, head].argmax(-1), expected)
        assert (output[0, head].amax(-1) == 1).all()


@pytest.mark.parametrize("compensate", [True, False])
def test_zeros_with_masks_average_what_was_computed(compensate):
    zeros, value = torch.zeros(1, 1, 128, 8), torch.ones(1, 1, 128, 8)
    value[:, :, 64:] = 3
    mask = torch.tensor([[[1, 0], [1, 1]]]).bool()
    output, lse = paroattn.attention(zeros, zeros, value, block_mask=mask, compensate=compensate, return_lse=True)
    first, count = (2.0, 128.0) if compensate else (1.0, 64.0)
    torch.testing.assert_close(output[0, 0, :64], torch.full((64, 8), first))
    torch.testing.assert_close(output[0, 0, 64:], torch.full((64, 8), 2.0))
    torch.testing.assert_close(lse[0, 0, :64], torch.full((64,), count).log())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {name: torch.zeros(1, 2, 70, 16, dtype=torch.float64) for name in ("query", "key", "value")},
            "query is torch.float64",
        ),
        ({"query": torch.zeros(1, 2, 70, 16, dtype=torch.int32)}, "query is torch.int32"),
        ({"value": torch.zeros(1, 2, 70)}, "value has 3 dimensions"),
        ({"value": torch.zeros(1, 1, 70, 16)}, r"value \[1, 1, 70, 16\]"),
        ({"value": torch.zeros(1, 2, 70, 8)}, r"value \[1, 2, 70, 8\]"),
        ({"key": torch.zeros(2, 2, 70, 16)}, r"key is \[2, 2, 70, 16\]"),
        ({"key": torch.zeros(1, 2, 70, 16, device="meta")}, "key is on meta"),
        ({name: torch.zeros(1, 2, 0, 16) for name in ("query", "key", "value")}, "0 tokens"),
        ({name: torch.zeros(1, 2, 70, 0) for name in ("query", "key", "value")}, "head_dim 0"),
        ({"permutation": torch.arange(70.0)}, "permutation has dtype"),
        ({"permutation": torch.arange(71)}, "permutation has shape"),
        ({"permutation": torch.arange(70).expand(3, 70)}, "permutation has shape"),
        ({"block_mask": torch.ones(2, 2, 2)}, "block_mask is torch.float32"),
        (
            {"block_mask": BlockMask.from_dense(torch.ones(2, 2, 2, dtype=torch.bool), 80)},
            "block_mask is for 2 heads and 80",
        ),
        ({"precision": 8}, "precision is 8"),
        ({"precision": ["int8", None]}, "precision is"),
        ({"precision": Precision("fp8", "exact")}, "not in fp8"),
        ({"precision": "fp8", "backend": "reference"}, "not in fp8"),
        ({"compensate": 1}, "compensate is 1"),
        ({"compensate": "yes"}, "compensate is 'yes'"),
        ({"key_mask": torch.ones(1, 70)}, "key_mask is torch.float32"),
        ({"scale": float("inf")}, "scale is inf"),
    ],
)
def test_more_bad_arguments_are_named(changes, message):
    query, key, value = inputs(70)
    with pytest.raises(ValueError, match=message) as caught:
        paroattn.attention(**{"query": query, "key": key, "value": value, **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_each_input_that_requires_grad_is_named(name):
    arguments = dict(zip(("query", "key", "value"), inputs(10), strict=True))
    arguments[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} requires grad"):
        paroattn.attention(**arguments)
    with torch.inference_mode():
        assert not paroattn.attention(**arguments).requires_grad
