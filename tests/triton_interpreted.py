"""The Triton backend's kernels in Triton's interpreter; `test_triton.py` runs this file in a process of its own.

The interpreter rounds to fp8 towards zero and cannot multiply bfloat16: both are checked on a GPU (docs/gpu.md). It
takes the time of a Python line for each of Triton's operations, so that inputs are small.
"""

import dataclasses

import oracles
import pytest
import torch
from attention_inputs import call_of, exact_attention, inputs, masks, over_nan, permutations
from diffusers.models import embeddings
from diffusers.models.transformers import transformer_ltx, transformer_qwenimage, transformer_wan
from triton.runtime import interpreter

import paroattn
from paroattn import LayerPlan, Precision, TokenGrid, prepare
from paroattn.block_mask import pack_bits, text_blocks
from paroattn.calibration import gpu as calibration
from paroattn.calibration import statistics
from paroattn.calibration.kernels import skip_costs_of_heads
from paroattn.integrations import rotary as model_rotary
from paroattn.integrations.rebind import rebind
from paroattn.ops import exchange as ranks_exchange
from paroattn.ops import reference
from paroattn.ops import repair as repair_by_definition
from paroattn.ops.backend import choose_backend
from paroattn.ops.gpu import backend, configs, exchange, hopper, launch, pack, repair, rotary
from paroattn.ops.gpu.configs import Config, Kind
from paroattn.ops.gpu.pack import Call
from paroattn.ops.prepared import kind_of_calls

pytestmark = pytest.mark.kernels


PATCHED = set()


def patch_once(function, patch=interpreter._patch_lang):
    """In place of `_patch_lang`, which patches all of `triton.language` at each call: a quarter of the time."""
    module = id(function.__globals__)
    if module not in PATCHED:
        PATCHED.add(module)
        patch(function)
    return interpreter._LangPatchScope()  # has nothing to restore


interpreter._patch_lang = patch_once
LENGTHS = [1, 63, 64, 65, 200, 333]
PRECISIONS = ["exact", "int8", "int8/exact", "exact/int8", "int8/fp8"]


def half(tensors):
    return [x.half() for x in tensors]


def masked_call(tensors, precision, block_q=64, compensate=None, key_mask=None, scale=0.2, seed=0):
    """A call with an order and a mask per head."""
    heads, tokens = tensors[0].shape[1:3]
    mask, order = masks(heads, tokens, seed=seed, block_q=block_q), permutations(heads, tokens)
    return call_of(tensors, precision, mask, order, compensate, key_mask, scale, block_q)


def run(call):
    """What the kernels write over NaN: output and lse."""
    return over_nan(lambda output, lse, _: launch.run(output, lse, Call(call)), call)


def assert_as_good_as_the_reference(call):
    """At most twice the error that the reference has against float64, which rounds as the kernels do."""
    exact, exact_lse = exact_attention(call)
    output, lse = run(call)
    expected, expected_lse = reference.attend(call, backend.P_QUANTIZATION)
    assert output.isfinite().all()
    error = oracles.relative_error(output, exact)
    if call.precisions[0].pv == "fp8":
        assert error < 0.1  # an eighth is the largest error of rounding towards zero to 3 bits
    else:
        # Means of skipped blocks are rounded to 16 bits, where the reference keeps them.
        floor = 2**-11 if call.compensate is not None else 1e-6
        assert error <= 2 * oracles.relative_error(expected, exact) + floor
    seen = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    floor = 1e-3 if call.compensate is not None else 1e-5
    assert (lse - exact_lse)[seen].abs().max() <= 2 * (expected_lse - exact_lse)[seen].abs().max() + floor


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_errors_are_at_most_twice_the_references(tokens, precision):
    block_q = 128 if tokens in (63, 200) else 64
    tensors = half(inputs(tokens, heads=2, head_dim=64, batch=2 if tokens < 100 else 1))
    tensors[1] += 2  # the mean of k leaves softmax as it is, that of v comes back
    tensors[2] += torch.arange(2, dtype=torch.float16).view(1, 2, 1, 1)
    assert_as_good_as_the_reference(masked_call(tensors, precision, block_q))


@pytest.mark.parametrize("precision", ["exact", "int8", "int8/fp8"])
@pytest.mark.parametrize(("tokens", "block_q"), [(200, 64), (333, 128)])
def test_compensation_with_hidden_keys(tokens, block_q, precision):
    tensors = half(inputs(tokens, heads=2, head_dim=64, batch=2))
    tensors[1] += 2
    hidden = torch.rand(2, tokens, generator=torch.Generator().manual_seed(0)) < 0.2
    assert_as_good_as_the_reference(masked_call(tensors, precision, block_q, [True, False], ~hidden))


def test_more_than_64_blocks_have_more_than_one_block_of_means():
    tokens = 64 * 66 + 5
    tensors = half(inputs(tokens, heads=1, head_dim=8))
    rows, blocks = -(-tokens // 128), -(-tokens // 64)
    mask = torch.zeros(1, rows, blocks, dtype=torch.bool)
    mask[0, torch.arange(rows), torch.arange(rows) * 2] = True
    call = call_of(tensors, "int8", mask, permutations(1, tokens), [True], scale=0.2, block_q=128)
    assert_as_good_as_the_reference(call)


@pytest.mark.parametrize("precision", ["exact", "int8", "int8/fp8"])
@pytest.mark.parametrize("tokens", [100, 180, 300])
@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_with_wide_heads_two_programs_share_a_row_of_128_queries(head_dim, tokens, precision, compensated):
    """Of the last row the second program has 36 queries of 100 tokens, none of 180 and 300."""
    tensors = half(inputs(tokens, heads=2, head_dim=head_dim))
    assert_as_good_as_the_reference(masked_call(tensors, precision, 128, [True, False] if compensated else None))


@pytest.mark.parametrize("precision", ["int8", "int8/exact", "exact/int8", "exact/fp8"])
@pytest.mark.parametrize("head_dim", [129, 256])
def test_wide_heads_in_mixed_formats_with_hidden_keys(head_dim, precision):
    tensors = half(inputs(130, heads=2, head_dim=head_dim))
    assert_as_good_as_the_reference(masked_call(tensors, precision, key_mask=torch.arange(130).unsqueeze(0) < 120))


@pytest.mark.parametrize("tokens", [20, 130])
@pytest.mark.parametrize("head_dim", [1, 40, 65, 128, 129, 200])
def test_head_dims_between_are_padded_and_queries_may_share_keys(head_dim, tokens):
    tensors = half(inputs(tokens, heads=4, key_heads=2, head_dim=head_dim))
    assert_as_good_as_the_reference(masked_call(tensors, "int8", scale=-0.1))


def test_a_row_whose_kept_keys_are_all_hidden_gives_zeros():
    query, key, value = half(inputs(128, heads=1, head_dim=64))
    key_mask = torch.arange(128).unsqueeze(0) >= 64
    output, lse = paroattn.attention(
        query,
        key,
        value + 3,
        block_mask=torch.eye(2, dtype=torch.bool).unsqueeze(0),
        key_mask=key_mask,
        precision="int8",
        backend="triton",
        return_lse=True,
    )
    assert (output[:, :, :64] == 0).all()
    assert (lse[:, :, :64] == -torch.inf).all()
    assert output[:, :, 64:].abs().min() > 0


@pytest.mark.parametrize(
    ("precision", "head_dim", "block_q"),
    [("exact", 64, 64), ("int8", 64, 64), ("int8", 64, 128), ("int8", 128, 128), ("int8", 200, 64)],
)
def test_exactly_the_kept_blocks_are_visited(precision, head_dim, block_q):
    """Position-coded values and a mask per head: reading a neighbour's mask, or running dense, would show."""
    tokens = 200
    query, key, _ = half(inputs(tokens, heads=3, head_dim=head_dim, batch=2))
    value = (torch.arange(tokens).view(-1, 1) / 100).expand(query.shape).half() + torch.arange(3).view(1, -1, 1, 1)
    call = masked_call((query, key, value.contiguous()), precision, block_q, seed=7)
    assert_as_good_as_the_reference(call)
    visited = launch.run(torch.empty_like(query), torch.empty(2, 3, tokens), Call(call), count_visits=True)
    programs = 2 if (head_dim, block_q) == (128, 128) else 1  # per row of the mask
    expected = call.block_mask.to_dense().sum(-1).int().repeat_interleave(programs, -1).expand(2, -1, -1)
    assert torch.equal(visited[0], expected)


def test_heads_of_different_precisions_are_attended_each_in_its_own():
    tensors = half(inputs(130, heads=3, head_dim=64))
    mixed, _ = run(masked_call(tensors, ["int8", "exact", "int8"]))
    for name, heads in (("int8", [0, 2]), ("exact", [1])):
        alone, _ = run(masked_call(tensors, name))
        assert torch.equal(mixed[:, heads], alone[:, heads])


VARIANTS = {
    "two blocks": Config(4, 2, width=128),
    "swapped": Config(4, 2, swapped=True),
    "both": Config(4, 2, width=128, swapped=True),
}


@pytest.mark.parametrize("precision", ["int8", "int8/fp8", "exact"])
@pytest.mark.parametrize("name", VARIANTS)
def test_configurations_change_no_result(monkeypatch, name, precision):
    """Two blocks share the unit of P, which moves its rounding; everything else gives the same numbers."""
    call = masked_call(half(inputs(200, heads=1, head_dim=64)), precision, compensate=[True])
    config = VARIANTS[name] if precision != "exact" else dataclasses.replace(VARIANTS[name], swapped=False)
    kind = Kind(
        64, 64, *(("16", "16") if precision == "exact" else precision.split("/") * (1 if "/" in precision else 2))
    )
    outputs = []
    for chosen in (Config(4, 2), config):
        monkeypatch.setitem(configs.OVERRIDES, ("sm90", kind), chosen)
        assert_as_good_as_the_reference(call)
        outputs.append(run(call)[0])
    if config.width == 64:
        assert oracles.relative_error(*outputs) < 2**-11  # sums in another order


@pytest.mark.parametrize("precision", ["int8", "exact"])
def test_single_steps_round_as_the_reference(monkeypatch, precision):
    """With one block per step only rounding at ties and the 16-bit output may differ."""
    for width in ("int8", "16"):
        config = Config(4, 2, swapped=width == "int8")
        monkeypatch.setitem(configs.OVERRIDES, ("sm90", Kind(64, 64, width, width)), config)
    call = masked_call(half(inputs(200, heads=2, head_dim=64)), precision)
    expected, _ = reference.attend(call, backend.P_QUANTIZATION)
    assert oracles.relative_error(run(call)[0], expected) < 2**-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [2, 40, 128])
@pytest.mark.parametrize("pairs", ["interleaved", "halves"])
def test_rotary_embedding_turns_pairs_of_channels(pairs, head_dim, dtype):
    """Of a tensor whose heads lie between others, by tables of which every other number is used."""
    tokens = 70
    whole = torch.randn(2, tokens, 3, 2, head_dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = whole[:, :, 1]
    angle = torch.rand(tokens, head_dim // 2, generator=torch.Generator().manual_seed(1)) * 6
    tables = [table.repeat_interleave(2, -1).unsqueeze(0)[..., ::2] for table in (angle.cos(), angle.sin())]
    rotation = rotary.Rotation(pairs, (tables[0],) * 2, (tables[1],) * 2)
    assert rotary.takes(x, rotation)
    expected = oracles.rotated(x.transpose(1, 2), angle, pairs).transpose(1, 2)
    assert oracles.relative_error(rotary.rotate(x, rotation), expected) < (1e-6 if dtype == torch.float32 else 2**-11)


def test_first_and_second_channels_have_their_own_angles():
    x = torch.ones(1, 3, 1, 4)
    tables = [torch.full((1, 3, 2), number) for number in (1.0, 10.0, 100.0, 1000.0)]
    turned = rotary.rotate(x, rotary.Rotation("interleaved", tuple(tables[:2]), tuple(tables[2:])))
    assert turned.flatten().tolist() == [1.0 - 100.0, 10.0 + 1000.0] * 6


def angles_of(tokens, head_dim):
    """Cosines and sines [N, D], each number twice, as diffusers keeps them, and [N, D / 2] as complex numbers."""
    angle = torch.rand(tokens, head_dim // 2, generator=torch.Generator().manual_seed(2)) * 6
    return [table.repeat_interleave(2, 1) for table in (angle.cos(), angle.sin())], torch.polar(angle * 0 + 1, angle)


def flux(x):
    return embeddings.apply_rotary_emb, (angles_of(x.shape[1], x.shape[3])[0],), {"sequence_dim": 1}


def cogvideox(x):
    return embeddings.apply_rotary_emb, (angles_of(x.shape[2], x.shape[3])[0],), {}


def omnigen(x):
    tables = [torch.cat((table[:, ::2],) * 2, 1) for table in angles_of(x.shape[2], x.shape[3])[0]]
    return embeddings.apply_rotary_emb, (tables,), {"use_real_unbind_dim": -2}


def lumina(x):
    numbers = angles_of(x.shape[1], x.shape[3])[1]
    return embeddings.apply_rotary_emb, (torch.stack((numbers, numbers.conj())),), {"use_real": False}


def qwen(x):
    return transformer_qwenimage.apply_rotary_emb_qwen, (angles_of(x.shape[1], x.shape[3])[1],), {"use_real": False}


def ltx(x):
    tables = [table.expand(len(x), -1, -1) for table in angles_of(x.shape[1], x.shape[2])[0]]
    return transformer_ltx.apply_rotary_emb, (tables,), {}


@pytest.mark.parametrize("family", [flux, cogvideox, omnigen, lumina, qwen, ltx])
def test_rotary_embeddings_of_models_are_computed_by_the_kernel(family, monkeypatch):
    monkeypatch.setattr(model_rotary, "_agreements", {})
    shape = (2, 30, 64) if family is ltx else (2, 30, 5, 16) if family is not cogvideox else (2, 5, 30, 16)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    function, args, kwargs = family(x)
    own = function(x, *args, **kwargs)
    assert torch.equal(model_rotary.rotated(function, x, *args, **kwargs), own)
    assert list(model_rotary._agreements.values()) == [True]
    launches = []
    rotate = rotary.rotate
    monkeypatch.setattr(rotary, "rotate", lambda *given: launches.append(given) or rotate(*given))
    turned = model_rotary.rotated(function, x, *args, **kwargs)
    assert len(launches) == 1
    assert turned.shape == own.shape
    assert oracles.relative_error(turned, own) < 2**-11


def test_a_rotary_embedding_that_computes_something_else_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(model_rotary, "_agreements", {})

    def backwards(x, freqs, sequence_dim):
        cos, sin = freqs
        return embeddings.apply_rotary_emb(x, (cos, -sin), sequence_dim=sequence_dim)

    x = torch.randn(1, 30, 2, 16).half()
    _, args, kwargs = flux(x)
    for _ in range(2):
        assert torch.equal(model_rotary.rotated(backwards, x, *args, **kwargs), backwards(x, *args, **kwargs))
    assert list(model_rotary._agreements.values()) == [False]
    # What turns nothing says nothing about a function.
    monkeypatch.setattr(model_rotary, "_agreements", {})
    still = [torch.ones(30, 16), torch.zeros(30, 16)]
    model_rotary.rotated(backwards, x, still, **kwargs)
    assert not model_rotary._agreements


def test_wans_processor_hands_its_rotary_embedding_to_the_kernel(monkeypatch):
    monkeypatch.setattr(model_rotary, "_agreements", {})
    torch.manual_seed(0)
    processor = transformer_wan.WanAttnProcessor()
    attention = transformer_wan.WanAttention(dim=32, heads=2, dim_head=16, processor=processor)
    cos, sin = (table.view(1, 30, 1, 16) for table in angles_of(30, 16)[0])
    x = torch.randn(1, 30, 32)
    own = attention(x, rotary_emb=(cos, sin))
    calls = []

    def intercept(call):
        calls.append(call)
        return call.dense()

    attention.processor = rebind(attention.processor, intercept)
    with torch.no_grad():
        for _ in range(2):
            assert oracles.relative_error(attention(x, rotary_emb=(cos, sin)), own) < 1e-6
    assert list(model_rotary._agreements.values()) == [True]
    assert oracles.relative_error(calls[1].query, calls[0].query) < 1e-6


def test_prepared_layers_look_their_masks_up_by_bucket():
    grid = TokenGrid(2, 5, 6, 10)
    tokens, heads = grid.tokens, 2
    dense = masks(4, tokens, seed=3) | text_blocks(grid)
    plan = LayerPlan(
        precisions=(Precision.parse("int8"),) * heads,
        orders=permutations(heads, tokens),
        mask_table=pack_bits(dense),
        mask_index=torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
        compensate=torch.tensor([[True, False], [False, False]]),
        tokens=tokens,
    )
    op = prepare(plan, device="cpu", dtype=torch.float16, tensor_layout="NHD", backend="triton")
    assert choose_backend("auto", kind_of_calls(plan, torch.device("cpu"), torch.float16)) is backend
    query, key, value = (x.transpose(1, 2).contiguous() for x in half(inputs(tokens, heads=heads, head_dim=64)))
    for bucket, compensate in ((0, [True, False]), (1, [False, False])):
        output = op(query, key, value, bucket=torch.tensor(bucket))
        assert output.is_contiguous()
        settings = {"permutation": plan.permutation, "block_mask": dense[2 * bucket : 2 * bucket + 2]}
        settings |= {"precision": "int8", "compensate": compensate, "tensor_layout": "NHD"}
        assert torch.equal(output, paroattn.attention(query, key, value, **settings, backend="triton"))
        expected = paroattn.attention(query, key, value, **settings, backend="reference")
        assert oracles.relative_error(output, expected) < 0.02


def test_strides_are_read_in_place_and_channels_apart_are_copied():
    wide = torch.randn(1, 100, 3, 2, 64, generator=torch.Generator().manual_seed(0)).half()
    query, key, value = wide.unbind(2)
    settings = {"tensor_layout": "NHD", "precision": "int8", "backend": "triton"}
    output = paroattn.attention(query, key, value, **settings)
    packed = [x.contiguous() for x in (query, key, value)]
    assert torch.equal(output, paroattn.attention(*packed, **settings))
    assert torch.equal(output, paroattn.attention(*(x.mT.contiguous().mT for x in packed), **settings))


def test_an_empty_batch_gives_an_empty_output():
    tensors = [x[:0] for x in half(inputs(10))]
    assert paroattn.attention(*tensors, backend="triton").shape == tensors[0].shape


@pytest.mark.parametrize(("tokens", "head_dim"), [(1, 24), (65, 24), (150, 24), (65, 200)])
def test_block_sums_equal_the_statistics(tokens, head_dim):
    q, k = 2 * torch.randn(2, tokens, head_dim, generator=torch.Generator().manual_seed(0))
    orders = [torch.randperm(tokens, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    sums = calibration.block_sums(q, k, orders, scale=0.25)
    torch.testing.assert_close(sums, statistics.block_sums(q, k, orders, scale=0.25), rtol=1e-4, atol=1e-5)
    for order, measured in zip(orders, sums, strict=True):
        torch.testing.assert_close(measured.double(), oracles.block_sums(q, k, order, 0.25), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "head_dim", "block_q", "rows_per_block", "q_blocks", "dtype"),
    [
        (333, 16, 64, 64, None, torch.float32),
        (333, 16, 64, 64, [1, 5], torch.float32),
        (300, 72, 128, 128, None, torch.float32),
        (200, 64, 128, 128, [1], torch.float32),
        (63, 8, 64, 64, None, torch.float32),
        (333, 64, 64, 64, None, torch.float16),  # P loses nothing
        (333, 16, 64, 16, None, torch.float32),
        (300, 16, 128, 32, None, torch.float32),
        (333, 16, 64, 8, [0, 2, 3, 5], torch.float32),
        (200, 200, 64, 64, None, torch.float32),
        (130, 256, 64, 64, None, torch.float16),
    ],
)
def test_costs_and_errors_of_skipping_are_the_references(
    monkeypatch, tokens, head_dim, block_q, rows_per_block, q_blocks, dtype
):
    q, k, v = torch.randn(3, 3, tokens, head_dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    k += 3 * (dtype == torch.float32)  # the blocks' mean weights are then far from one
    rows, columns = -(-tokens // block_q), -(-tokens // 64)
    required = torch.zeros(rows, columns, dtype=torch.bool)
    required[:, -1] = True
    orders = list(permutations(3, tokens))
    settings = {"block_q": block_q, "q_blocks": None if q_blocks is None else torch.tensor(q_blocks)}
    if rows_per_block < 64:
        settings |= {"rows": torch.arange(rows_per_block) * (block_q // rows_per_block) + 1, "levels": ()}
    # Two heads at once, then one.
    monkeypatch.setattr(calibration, "_MOST_ENTRIES", 2 * max(columns * rows * rows_per_block, tokens * head_dim))
    scale = min(0.3, 2.4 * head_dim**-0.5)  # wide heads' P would leave the range of float16
    found = calibration.skip_costs(q, k, v, orders, scale, required, **settings)
    expected = skip_costs_of_heads(q, k, v, orders, scale, required, **settings)
    for own, of_reference in zip(found, expected, strict=True):
        torch.testing.assert_close(own.block_sums, of_reference.block_sums, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(own.costs, of_reference.costs, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(own.errors, of_reference.errors, rtol=1e-3, atol=1e-6)
        assert own.norm == pytest.approx(of_reference.norm, rel=1e-5)


def test_heads_may_have_several_orders():
    q, k, v = torch.randn(3, 3, 200, 16, generator=torch.Generator().manual_seed(0))
    orders, heads = list(permutations(4, 200)), [2, 0, 0, 1]
    given = (0.3, torch.zeros(4, 4, dtype=torch.bool))
    found = calibration.skip_costs(q, k, v, orders, *given, heads=heads)
    for expected in (
        skip_costs_of_heads(q, k, v, orders, *given, heads=heads),
        skip_costs_of_heads(q[heads], k[heads], v[heads], orders, *given),
    ):
        for own, other in zip(found, expected, strict=True):
            torch.testing.assert_close(own.costs, other.costs, rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(own.errors, other.errors, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("block_q", [64, 128])
def test_costs_alone_are_off_by_no_more_than_the_rounding_of_p(block_q):
    q, k, v = torch.randn(3, 1, 333, 32, generator=torch.Generator().manual_seed(0)).half()
    v += 500  # what values have in common is nobody's cost, as long as all sums are of the same P
    (order,), rows = permutations(1, 333), torch.arange(16) * (block_q // 16) + 1
    required = torch.zeros(-(-333 // block_q), 6, dtype=torch.bool)
    settings = {"block_q": block_q, "rows": rows, "levels": ()}
    (found,) = calibration.skip_costs(q, k, v, [order], 0.3, required, **settings)
    norms, bounds = oracles.skip_costs(q[0], k[0], v[0], order, 0.3, rows, block_q, rounding=2**-11)
    off = (found.costs.double() * len(rows) / block_q).sqrt() - norms
    assert bool((off.abs() <= bounds + 1e-5 * norms.amax()).all())  # and of float32 sums


def test_torch_accepts_the_operator():
    call = masked_call(half(inputs(70, heads=2)), ["int8", "exact"], compensate=[True, False])
    torch.library.opcheck(torch.ops.paroattn.triton_attention, call.flat())


def test_one_graph_holds_the_call():
    query, key, value = half(inputs(70, heads=2))
    mask = masks(2, 70)

    def call(query, key, value):
        return paroattn.attention(2 * query, key, value, block_mask=mask, precision="int8", backend="triton") + 1

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, key, value), call(query, key, value))


@pytest.mark.parametrize(
    ("dtype", "settings", "message"),
    [
        (torch.float32, {}, "it has no float32 products for precision 'exact'"),
        (torch.bfloat16, {}, "Triton's interpreter does not multiply bfloat16"),
        (torch.float16, {"precision": "fp8"}, "it multiplies query and key in int8 or 16 bits, not in fp8"),
        (torch.float16, {"precision": "int4"}, "precision 'int4' is not available in backend 'triton'"),
    ],
)
def test_what_it_does_not_do_is_named(dtype, settings, message):
    query, key, value = inputs(10, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        paroattn.attention(query, key, value, backend="triton", **settings)


@pytest.mark.parametrize("pv", ["int8", "fp8"])
@pytest.mark.parametrize("head_dim", [40, 64, 128])
def test_records_hold_what_the_other_forward_reads(head_dim, pv, monkeypatch):
    """hopper_forward.cu reads the same blocks in other places, whatever replaces Triton's configurations."""
    tokens, heads = 200, 2
    tensors = half(inputs(tokens, heads=heads, head_dim=head_dim, batch=2))
    width = 64 if head_dim <= 64 else 128
    call = Call(masked_call(tensors, f"int8/{pv}", compensate=[True, True]))
    partial = pack.partial_statistics(call)
    plain = pack.pack(call, pack.heads_of(call, (0, 1), "int8", pv, False), partial)
    kind = Kind(width, 64, "int8", pv)
    monkeypatch.setitem(configs.OVERRIDES, ("sm90", kind), Config(4, 2, swapped=False))
    packed = pack.pack(call, pack.heads_of(call, (0, 1), "int8", pv, True), partial)

    def rows(stored):
        """[blocks, 64, width] from [blocks, 8, width / 16, 8, 16]."""
        return stored.view(-1, 8, width // 16, 8, 16).transpose(2, 3).reshape(-1, 64, width)

    # Programs of 128 queries have one block more at the end.
    blocks = 2 * heads
    queries = plain.queries.view(blocks, -1, 64, width)[:, :4].reshape(-1, 64, width)
    assert torch.equal(rows(packed.queries), queries)
    ones = 8 if (pv, width) == ("fp8", 64) else 0
    record, scale = hopper.layout(width, pv).record, hopper.layout(width, pv).scale
    for stored, keys, values, k_scale in (
        (packed.keys, plain.keys, plain.values, plain.k_scale),
        (packed.mean_keys, plain.mean_keys, plain.mean_values, plain.mean_k_scale),
    ):
        records = stored.view(-1, record)
        assert torch.equal(rows(records[:, : 64 * width].contiguous()), keys.view(-1, 64, width))
        channels = records[:, 64 * width : scale].reshape(-1, 4, width + ones, 16).transpose(1, 2)
        assert torch.equal(channels[:, :width].reshape(-1, width, 64), values.view(torch.int8).view(-1, width, 64))
        if ones:
            assert (channels[:, width:].contiguous().view(torch.float8_e4m3fn).float() == 1).all()
        scales = records[:, scale : scale + 16].contiguous().view(torch.float32)
        assert torch.equal(scales, k_scale.view(-1, 1).expand(-1, 4))


def test_lists_can_be_read_on_where_they_end():
    """hopper_forward.cu reads numbers ahead: beyond the last row's list, and beyond that for each block of means."""
    tokens = 64 * 66
    mask = torch.ones(1, 66, 66, dtype=torch.bool)
    call = Call(call_of(half(inputs(tokens, heads=1, head_dim=8)), "int8", mask, compensate=[True]))
    lists = pack.kept_lists(call, pack.heads_of(call, (0,), "int8", "int8", True))
    steps = (66 + 1) // 2 + call.mean_blocks
    assert lists.indices.numel() > 65 * 66 + 2 * (steps + hopper.STAGES) + 1
    assert torch.equal(lists.indices[: 66 * 66].view(66, 66), torch.arange(66).int().expand(66, 66))
    assert pack.all_blocks(66, call.query.device).numel() > 2 * ((66 + 1) // 2 + hopper.STAGES) + 1


@pytest.mark.parametrize(
    ("shape", "kv_heads", "first", "count", "dtype", "masked"),
    [
        ((1, 2, 200, 64), 2, 0, 200, torch.float32, False),
        ((2, 2, 333, 40), 1, 13, 300, torch.float32, True),
        ((1, 1, 300, 200), 1, 0, 290, torch.float16, True),
    ],
)
def test_repair_mends_rows_as_its_definition_in_float64(shape, kv_heads, first, count, dtype, masked):
    """Of tensors whose heads lie between others; text, before or after, stays."""
    batch, heads, tokens, head_dim = shape
    generator = torch.Generator().manual_seed(0)

    def random(number):
        return torch.randn(batch, tokens, number, head_dim, generator=generator).transpose(1, 2).to(dtype)

    query, key, value = random(heads), random(kv_heads), random(kv_heads)
    key_mask = torch.rand(batch, tokens, generator=generator) < 0.8 if masked else None
    output = (0.5 * random(heads) + value.mean(2, keepdim=True).repeat_interleave(heads // kv_heads, 1)).to(dtype)
    rows = {"first": first, "count": count, "key_mask": key_mask}
    exact = (x.double() for x in (output.clone(), query, key, value))
    expected = repair_by_definition.by_definition(*exact, **rows)
    settings = {"scale": head_dim**-0.5, "ridge": 32.0, "step": repair_by_definition._STEP}
    found = repair.repaired(output.clone(), query, key, value, **rows, **settings)
    assert oracles.relative_error(expected, output) > 0.1
    assert oracles.relative_error(found, expected) < (2e-6 if dtype == torch.float32 else 2**-11)
    for start, stop in ((0, first), (first + count, tokens)):
        assert torch.equal(found[:, :, start:stop], output[:, :, start:stop])


def test_repair_copies_what_lies_apart_and_leaves_rows_without_keys():
    """Channels and a key mask that lie between others; all keys of the second batch entry are hidden."""
    query, key, value = (x.repeat_interleave(2, 3)[..., ::2] for x in inputs(200, head_dim=40, batch=2))
    key_mask = (torch.arange(200) % 5 > 0).repeat(2, 1).repeat_interleave(2, 1)[:, ::2]
    key_mask[1] = False
    output = torch.tanh(value.roll(1, 2)).contiguous()
    output[1] = 0  # as attention to no key gives it
    rows = {"first": 0, "count": 190, "key_mask": key_mask}
    found = repair_by_definition.repaired(output.clone(), query, key, value, **rows)
    expected = repair_by_definition.by_definition(*(x.double() for x in (output, query, key, value)), **rows)
    assert oracles.relative_error(found, expected) < 2e-6
    assert not found[1].any()


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float64, 16), (torch.float32, 129)])
def test_repair_is_pytorchs_where_the_kernels_do_not_take_it(dtype, head_dim, monkeypatch):
    monkeypatch.setattr(repair, "repaired", None)
    query, key, value = inputs(130, heads=1, head_dim=head_dim, dtype=dtype)
    output, rows = torch.tanh(value.roll(1, 2)), {"first": 0, "count": 130}
    expected = repair_by_definition.by_definition(output.clone(), query, key, value, **rows)
    assert torch.equal(repair_by_definition.repaired(output, query, key, value, **rows), expected)


def test_repair_solves_a_system_that_is_nearly_singular():
    """Outputs that differ in one direction most: one eigenvalue is nearly the trace, others are near the ridge."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, 200, 128, generator=generator) for _ in range(3))
    output = torch.randn(1, 1, 200, 1, generator=generator) + 0.4 * torch.randn(1, 1, 200, 128, generator=generator)
    rows = {"first": 0, "count": 200, "key_mask": None}
    expected = repair_by_definition.by_definition(*(x.double() for x in (output, query, key, value)), **rows)
    settings = {"scale": 128**-0.5, "ridge": 32.0, "step": repair_by_definition._STEP}
    found = repair.repaired(output.clone(), query, key, value, **rows, **settings)
    assert oracles.relative_error(found, expected) < 1e-4  # the condition number times the precision of float32 is 3e-5


def test_the_rounds_for_a_map_leave_little_of_the_worst_system():
    """One whose probes all have the same outputs, and whose other eigenvalues are the ridge."""
    for channels in (16, 64, 128, 256):
        units = torch.ones(64, channels, dtype=torch.float64)
        system = units @ units.T + 32 * torch.eye(64, dtype=torch.float64)
        most = system.abs().sum(1).max()
        inverse, error = torch.eye(64, dtype=torch.float64) * 2 / (32 + most), (most - 32) / (most + 32)
        for _ in range(repair.rounds_of(channels, 32.0)):
            inverse = inverse @ (2 * torch.eye(64, dtype=torch.float64) - system @ inverse) * (2 / (2 - error**2))
            error = error**2 / (2 - error**2)
        assert float((inverse @ system - torch.eye(64)).norm(2)) < 1e-6


@pytest.mark.parametrize(("batch", "count", "heads", "head_dim", "ranks"), [(1, 70, 12, 128, 4), (2, 33, 6, 40, 2)])
def test_heads_change_places_in_the_copy_that_is_sent(batch, count, heads, head_dim, ranks):
    x = torch.randn(batch, heads, count, head_dim, generator=torch.Generator().manual_seed(0)).transpose(1, 2).half()
    order = torch.randperm(heads, generator=torch.Generator().manual_seed(1))
    packed = exchange.pack(x, order, ranks)
    assert torch.equal(packed, ranks_exchange._packed(x, order, ranks))
    place = torch.zeros(batch, count + 3, heads, head_dim, dtype=x.dtype)
    exchange.unpack(packed, order, ranks, place.narrow(1, 2, count))
    assert torch.equal(place[:, 2:-1], x)
    assert not place[:, :2].any()
    assert not place[:, -1].any()
