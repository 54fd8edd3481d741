"""The operator through its public entry point, against float64."""

import oracles
import pytest
import torch
from attention_inputs import inputs, masks, permutations
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import relative_error

import paroattn
from paroattn.block_mask import BlockMask
from paroattn.grid import TokenGrid
from paroattn.order import AXIS_ORDERS, token_order
from paroattn.quantize import Precision

pytestmark = pytest.mark.usefixtures("every_backend")

LENGTHS = [1, 63, 64, 65, 200, 333]


def as_good_as_torch(output, query, key, value, expected):
    """At most twice the error of PyTorch's own float32 attention, plus a rounding floor."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    dense, _ = oracles.dense_attention(query, key, value)
    return relative_error(output, expected) <= 2 * relative_error(plain, dense) + 1e-6


sizes = st.sampled_from([1, 2, 3, 5, 7, 11])


@settings(max_examples=20)
@given(
    sizes,
    sizes,
    sizes,
    st.sampled_from([0, 1, 9]),
    st.sampled_from(["prefix", "suffix"]),
    st.integers(1, 2),
    st.sampled_from([16, 100, 192]),
)
def test_permute_attend_inverse_permute_equals_plain_attention(frames, height, width, text, position, batch, head_dim):
    grid = TokenGrid(frames, height, width, text, position)
    query, key, value = inputs(grid.tokens, batch=batch, head_dim=head_dim)
    expected, expected_lse = oracles.dense_attention(query, key, value)
    for name in AXIS_ORDERS:
        output, lse = paroattn.attention(query, key, value, permutation=token_order(name, grid), return_lse=True)
        assert relative_error(output, expected) <= 1e-6
        assert (lse - expected_lse).abs().max() < 1e-5


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize(("block_q", "head_dim"), [(64, 16), (128, 16), (64, 129), (128, 256)])
def test_heads_have_their_own_orders_and_masks(tokens, block_q, head_dim):
    query, key, value = inputs(tokens, heads=4, batch=2, head_dim=head_dim)
    value = (
        value + torch.arange(tokens).view(1, 1, -1, 1) + 1000 * torch.arange(4).view(1, -1, 1, 1)
    )  # says who was seen
    mask, order = masks(4, tokens, seed=tokens, block_q=block_q), permutations(4, tokens)
    output = paroattn.attention(
        query, key, value, permutation=order, block_mask=BlockMask.from_dense(mask, tokens, block_q)
    )
    expected = oracles.masked_attention(query, key, value, mask, order, block_q=block_q)
    assert as_good_as_torch(output, query, key, value, expected)


def test_a_shared_mask_and_order_serve_all_heads():
    query, key, value = inputs(200, heads=3)
    mask, order = masks(1, 200, seed=3), permutations(1, 200)
    output = paroattn.attention(query, key, value, permutation=order[0], block_mask=mask)
    expected = oracles.masked_attention(query, key, value, mask.expand(3, -1, -1), order.expand(3, -1))
    assert as_good_as_torch(output, query, key, value, expected)


@pytest.mark.parametrize("precision", ["exact", "bf16"])
def test_skipped_blocks_are_never_read(precision):
    query, key, value = inputs(333, heads=1)
    mask = masks(1, 333, seed=1)
    mask[:, :, 2] = False  # nobody keeps keys 128 to 191
    mask[:, :, 0] = True
    expected = paroattn.attention(query, key, value, block_mask=mask, precision=precision)
    key[:, :, 128:192], value[:, :, 128:192] = torch.nan, torch.nan
    assert torch.equal(paroattn.attention(query, key, value, block_mask=mask, precision=precision), expected)


@pytest.mark.parametrize(("tokens", "head_dim"), [(130, 16), (20, 16), (130, 256)])
def test_grouped_queries_share_keys(tokens, head_dim):
    query, key, value = inputs(tokens, heads=6, key_heads=2, head_dim=head_dim)
    expected, _ = oracles.dense_attention(query, key, value)
    output = paroattn.attention(query, key, value, permutation=permutations(6, tokens))
    assert as_good_as_torch(output, query, key, value, expected)


def test_layouts_agree():
    query, key, value = inputs(100, heads=3, batch=2)
    flipped = [x.transpose(1, 2) for x in (query, key, value)]
    for precision in ("exact", "int8"):
        expected = paroattn.attention(query, key, value, precision=precision)
        output = paroattn.attention(*flipped, precision=precision, tensor_layout="NHD")
        assert torch.equal(output.transpose(1, 2), expected)


def test_masked_keys_are_ignored_in_the_inputs_order():
    query, key, value = inputs(200, heads=2, batch=2)
    key_mask = torch.ones(2, 200, dtype=torch.bool)
    key_mask[0, 150:], key_mask[1, 90:95] = False, False
    order = permutations(2, 200)
    output, lse = paroattn.attention(query, key, value, permutation=order, key_mask=key_mask, return_lse=True)
    expected, expected_lse = oracles.sparse_attention(query, key, value, key_mask=key_mask)
    assert relative_error(output, expected) < 1e-6
    assert (lse - expected_lse).abs().max() < 1e-5


def test_a_row_whose_keys_are_all_masked_is_zero():
    query, key, value = inputs(128, heads=1)
    key_mask = torch.arange(128).unsqueeze(0) >= 64
    block_mask = torch.eye(2, dtype=torch.bool).unsqueeze(0)
    output, lse = paroattn.attention(query, key, value, block_mask=block_mask, key_mask=key_mask, return_lse=True)
    assert (output[:, :, :64] == 0).all()
    assert (lse[:, :, :64] < -1e30).all()
    assert output[:, :, 64:].isfinite().all()


@pytest.mark.parametrize(("tokens", "head_dim"), [(65, 16), (200, 16), (333, 16), (333, 192)])
def test_compensation_adds_the_mean_of_every_skipped_block(tokens, head_dim):
    query, key, value = inputs(tokens, heads=2, batch=2, head_dim=head_dim)
    mask, order = masks(2, tokens, seed=4), permutations(2, tokens)
    output, lse = paroattn.attention(
        query, key, value, permutation=order, block_mask=mask, compensate=[True, False], return_lse=True
    )
    expected, expected_lse = oracles.sparse_attention(query, key, value, mask, order, compensate=[True, False])
    assert relative_error(output, expected) < 1e-6
    assert (lse - expected_lse).abs().max() < 1e-5


@pytest.mark.parametrize("block_shape", [(64, 64), (128, 64), (64, 128), (128, 192)])
def test_compensation_knows_blocks_of_any_size_hidden_keys_and_grouped_queries(block_shape):
    query, key, value = inputs(333, heads=4, key_heads=2, batch=2)
    mask, order = masks(4, 333, 7, *block_shape), permutations(4, 333)
    key_mask = torch.ones(2, 333, dtype=torch.bool)
    key_mask[0, 320:] = False
    key_mask[1, order[0, : block_shape[1]]] = False  # for head 0 a whole block
    common = {"key_mask": key_mask, "compensate": [True, True, False, True]}
    output, lse = paroattn.attention(
        query,
        key,
        value,
        permutation=order,
        block_mask=BlockMask.from_dense(mask, 333, *block_shape),
        return_lse=True,
        **common,
    )
    expected, expected_lse = oracles.sparse_attention(
        query, key, value, mask, order, **common, block_q=block_shape[0], block_kv=block_shape[1]
    )
    assert relative_error(output, expected) < 1e-6
    assert (lse - expected_lse).abs().max() < 1e-5


@pytest.mark.parametrize("precision", ["exact", "int8"])
def test_more_than_64_skipped_blocks_make_several_mean_blocks(precision):
    query, key, value = inputs(4500, heads=1)
    mask = torch.eye(71, dtype=torch.bool).unsqueeze(0)
    expected, expected_lse = oracles.sparse_attention(query, key, value, mask, compensate=[True])
    output, lse = paroattn.attention(
        query, key, value, block_mask=mask, precision=precision, compensate=True, return_lse=True
    )
    assert relative_error(output, expected) < (1e-6 if precision == "exact" else 0.03)
    assert (lse - expected_lse).abs().max() < (1e-5 if precision == "exact" else 0.02)


@pytest.mark.parametrize("precision", ["exact", "bf16", "int8", "int4"])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-8, -1e-5])
def test_with_compensation_every_key_counts_once(precision, scale):
    """Logits near 0 weigh all shown keys the same, whether they are computed or averaged."""
    query, key, value = inputs(333, batch=2)
    value = value + torch.arange(333).view(-1, 1) / 100
    mask, order = masks(2, 333), permutations(2, 333)
    key_mask = torch.arange(333).expand(2, -1) < 300
    output, lse = paroattn.attention(
        query,
        key,
        value,
        permutation=order,
        block_mask=mask,
        precision=precision,
        compensate=True,
        key_mask=key_mask,
        scale=scale,
        return_lse=True,
    )
    expected = value[:, :, :300].mean(2, keepdim=True).expand_as(output).double()
    assert relative_error(output, expected) < {"exact": 1e-4, "bf16": 0.002, "int8": 0.002, "int4": 0.02}[precision]
    assert (lse - torch.tensor(300.0).log()).abs().max() < (0.003 if "int" in precision else 1e-4)


@pytest.mark.parametrize("head_dim", [64, 256])
def test_integer_precisions_err_as_their_steps_say(head_dim):
    query, key, value = inputs(333, heads=2, head_dim=head_dim)
    expected, expected_lse = oracles.dense_attention(query, key, value)
    errors = {}
    for precision in ("bf16", "int8", "int4"):
        output, lse = paroattn.attention(query, key, value, precision=precision, return_lse=True)
        errors[precision] = relative_error(output, expected)
        assert (lse - expected_lse).abs().max() < (0.5 if precision == "int4" else 0.03)
    assert 0.001 < errors["bf16"] < 0.005 < errors["int8"] < 0.02
    assert 10 * errors["int8"] < errors["int4"] < 0.4
    half = relative_error(paroattn.attention(query, key, value, precision=Precision("int8", "exact")), expected)
    assert 0.003 < half < errors["int8"]


def test_int8_follows_its_integer_arithmetic(every_backend):
    """One block, written out with torch integers: groups of 64 tokens, per-channel V, P of 255 steps."""
    query, key, value = (x[0, 0] for x in inputs(64, heads=1, head_dim=32))
    key_mean, value_mean = key.mean(0), value.mean(0)
    q_scale, k_scale = query.abs().max() / 127, (key - key_mean).abs().max() / 127
    v_scale = (value - value_mean).abs().amax(0) / 127
    q_int, k_int, v_int = (
        (query / q_scale).round().int(),
        ((key - key_mean) / k_scale).round().int(),
        ((value - value_mean) / v_scale).round().int(),
    )
    logits = (q_int @ k_int.T).float() * (q_scale * k_scale * 32**-0.5)
    p = (logits - logits.amax(1, keepdim=True)).exp()
    p_scale = p.max() / 255
    expected = ((p / p_scale).round().int() @ v_int).float() * p_scale * v_scale / p.sum(1, keepdim=True) + value_mean
    output = paroattn.attention(query[None, None], key[None, None], value[None, None], precision="int8")
    # AVX-512 rounds log2(P) to steps of 1/64, that is P by 0.3% on average and some of it to the next integer.
    assert relative_error(output[0, 0], expected.double()) < (0.006 if "avx512" in every_backend else 1e-6)


def test_a_constant_added_to_keys_costs_int8_nothing():
    query, key, value = inputs(256, head_dim=64)
    shifted = key + 20
    expected, expected_lse = oracles.dense_attention(query, shifted, value)
    output, lse = paroattn.attention(query, shifted, value, precision="int8", return_lse=True)
    plain, _ = oracles.dense_attention(query, key, value)
    assert relative_error(output, expected) < 1.1 * relative_error(
        paroattn.attention(query, key, value, precision="int8"), plain
    )
    assert (lse - expected_lse).abs().max() < 0.03


def test_each_head_may_have_its_own_precision():
    query, key, value = inputs(128, heads=3)
    output = paroattn.attention(query, key, value, precision=["exact", "int8", Precision("int4")])
    for head, precision in enumerate(("exact", "int8", "int4/exact")):
        alone = paroattn.attention(*(x[:, head : head + 1] for x in (query, key, value)), precision=precision)
        assert torch.equal(output[:, head : head + 1], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_give_16_bit_outputs_with_float32_sums(dtype):
    query, key, value = inputs(200, dtype=dtype)
    expected, _ = oracles.dense_attention(query, key, value)
    output = paroattn.attention(query, key, value)
    assert output.dtype == dtype
    products = 2 if dtype == torch.bfloat16 else 1.01  # bfloat16 input is multiplied as bfloat16
    assert relative_error(output, expected) <= products * relative_error(expected.to(dtype), expected) + 1e-6


@pytest.mark.parametrize("precision", ["exact", "bf16", "int8", "int4"])
def test_zeros_and_large_values_stay_finite(precision):
    query, key, value = inputs(100)
    zeros = torch.zeros_like(query)
    assert torch.equal(paroattn.attention(zeros, zeros, zeros, precision=precision), zeros)
    large = paroattn.attention(query * 1e4, key * 1e4, value, precision=precision)
    assert large.isfinite().all()
    assert large.abs().max() <= value.abs().max() * 1.01


def test_scale_replaces_the_default():
    query, key, value = inputs(70)
    expected, _ = oracles.dense_attention(query, key, value, scale=0.5)
    assert relative_error(paroattn.attention(query, key, value, scale=0.5), expected) < 1e-6


def test_inference_only():
    query, key, value = inputs(10)
    query.requires_grad_()
    with pytest.raises(ValueError, match="query requires grad"):
        paroattn.attention(query, key, value)
    with torch.no_grad():
        assert paroattn.attention(query, key, value).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(2, 70, 16)}, "query has 3 dimensions"),
        ({"key": torch.zeros(1, 2, 70, 16).double()}, "key is torch.float64"),
        ({"value": torch.zeros(1, 2, 70, 16).half()}, "value is torch.float16 and query is torch.float32"),
        ({"key": torch.zeros(1, 2, 69, 16)}, r"key is \[1, 2, 69, 16\]"),
        ({"query": torch.zeros(1, 3, 70, 16)}, "key has 2 heads and query 3"),
        ({"query": torch.zeros(1, 2, 70, 257)}, "head_dim 1 to 256"),
        ({"permutation": torch.zeros(70, dtype=torch.long)}, "permutation must hold each number"),
        ({"block_mask": torch.ones(3, 2, 2, dtype=torch.bool)}, "block_mask is for 3 heads"),
        ({"block_mask": torch.ones(2, 1, 1, dtype=torch.bool)}, "block_mask is torch.bool"),
        ({"block_mask": torch.zeros(2, 2, 2, dtype=torch.bool)}, "block_mask keeps no block in row 0 of head 0"),
        ({"precision": "int2"}, "precision qk is 'int2'"),
        ({"precision": ["int8"] * 3}, "expected one str or Precision, or 2 of them"),
        ({"precision": "fp8"}, "backend 'reference' cannot do this: query and key are multiplied in int8, int4 or"),
        ({"compensate": [True]}, "compensate is"),
        ({"key_mask": torch.ones(1, 69, dtype=torch.bool)}, "key_mask is"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"tensor_layout": "DHN"}, "expected 'HND' or 'NHD'"),
        ({"backend": "magic"}, "backend 'magic' is unknown; expected 'auto' or one of"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    query, key, value = inputs(70)
    arguments = {"query": query, "key": key, "value": value, **changes}
    with pytest.raises(ValueError, match=message):
        paroattn.attention(**arguments)
