"""The Triton backend's kernels in Triton's interpreter; `test_triton.py` runs this file in a process of its own.

The interpreter rounds to fp8 towards zero and cannot multiply bfloat16: both are checked on a GPU (docs/gpu.md).
"""

import dataclasses

import oracles
import pytest
import torch
from test_attention import inputs, masks, permutations

import paroattn
from paroattn import BlockMask, LayerPlan, Precision, TokenGrid, prepare
from paroattn.block_mask import pack_bits, text_blocks
from paroattn.calibration import statistics
from paroattn.calibration.kernels import skip_costs_of_heads
from paroattn.ops import (
    hopper,
    reference,
    triton_attention,
    triton_calibration,
    triton_configs,
    triton_launch,
    triton_pack,
)
from paroattn.ops.prepared import choose_for_layer
from paroattn.ops.triton_configs import Config, Kind
from paroattn.ops.triton_pack import Call

LENGTHS = [1, 63, 64, 65, 200, 333]
PRECISIONS = ["exact", "int8", "int8/exact", "exact/int8", "int8/fp8"]


def half(tensors):
    return [x.half() for x in tensors]


def arguments(tokens, heads, precision, block_q=64, compensate=None, key_mask=None, scale=0.2, seed=0):
    mask = masks(heads, tokens, seed=seed, block_q=block_q)
    return {
        "permutation": permutations(heads, tokens, seed=seed),
        "block_mask": BlockMask.from_dense(mask, tokens, block_q),
        "precisions": [Precision.parse(precision)] * heads,
        "compensate": compensate,
        "key_mask": key_mask,
        "scale": scale,
    }


def assert_as_good_as_the_reference(tensors, given, precision):
    """At most twice the error that the reference has against float64, which rounds as the kernels do."""
    exact, exact_lse = oracles.sparse_attention(
        *tensors,
        given["block_mask"].to_dense(),
        given["permutation"],
        given["key_mask"],
        given["compensate"],
        given["scale"],
        given["block_mask"].block_q,
    )
    output, lse = triton_attention.attend(*tensors, **given)
    expected, expected_lse = reference.attend(*tensors, **given, p_quantization=triton_attention.P_QUANTIZATION)
    assert output.isfinite().all()
    error = oracles.relative_error(output, exact)
    if precision.endswith("fp8"):
        assert error < 0.1  # an eighth is the largest error of rounding towards zero to 3 bits
    else:
        # Means of skipped blocks are rounded to 16 bits, where the reference keeps them.
        floor = 2**-11 if given["compensate"] is not None else 1e-6
        assert error <= 2 * oracles.relative_error(expected, exact) + floor
    seen = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    floor = 1e-3 if given["compensate"] is not None else 1e-5
    assert (lse - exact_lse)[seen].abs().max() <= 2 * (expected_lse - exact_lse)[seen].abs().max() + floor


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_errors_are_at_most_twice_the_references(tokens, precision):
    block_q = 128 if tokens in (63, 200) else 64
    tensors = half(inputs(tokens, heads=2, head_dim=64, batch=2))
    tensors[1] += 2  # the mean of k leaves softmax as it is, that of v comes back
    tensors[2] += torch.arange(2, dtype=torch.float16).view(1, 2, 1, 1)
    assert_as_good_as_the_reference(tensors, arguments(tokens, 2, precision, block_q), precision)


@pytest.mark.parametrize("precision", ["exact", "int8", "int8/fp8"])
@pytest.mark.parametrize(("tokens", "block_q"), [(200, 64), (333, 128)])
def test_compensation_with_hidden_keys(tokens, block_q, precision):
    tensors = half(inputs(tokens, heads=2, head_dim=64, batch=2))
    tensors[1] += 2
    hidden = torch.rand(2, tokens, generator=torch.Generator().manual_seed(0)) < 0.2
    given = arguments(tokens, 2, precision, block_q, torch.tensor([True, False]), ~hidden)
    assert_as_good_as_the_reference(tensors, given, precision)


def test_more_than_64_blocks_have_more_than_one_block_of_means():
    tokens = 64 * 66 + 5
    tensors = half(inputs(tokens, heads=1, head_dim=8))
    rows, blocks = -(-tokens // 128), -(-tokens // 64)
    mask = torch.zeros(1, rows, blocks, dtype=torch.bool)
    mask[0, torch.arange(rows), torch.arange(rows) * 2] = True
    given = arguments(tokens, 1, "int8", 128, torch.tensor([True]))
    given["block_mask"] = BlockMask.from_dense(mask, tokens, 128)
    assert_as_good_as_the_reference(tensors, given, "int8")


@pytest.mark.parametrize("precision", ["exact", "int8", "int8/fp8"])
@pytest.mark.parametrize("tokens", [100, 180, 300])
@pytest.mark.parametrize("compensated", [False, True])
def test_with_head_dim_128_two_programs_share_a_row_of_128_queries(tokens, precision, compensated):
    """Of the last row the second program has 36 queries of 100 tokens, none of 180 and 300."""
    tensors = half(inputs(tokens, heads=2, head_dim=128, batch=2))
    compensate = torch.tensor([True, False]) if compensated else None
    assert_as_good_as_the_reference(tensors, arguments(tokens, 2, precision, 128, compensate), precision)


@pytest.mark.parametrize("head_dim", [1, 40, 65, 128])
def test_head_dims_between_are_padded_and_queries_may_share_keys(head_dim):
    tensors = half(inputs(130, heads=4, key_heads=2, head_dim=head_dim))
    assert_as_good_as_the_reference(tensors, arguments(130, 4, "int8", scale=-0.1), "int8")


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
    ("precision", "head_dim", "block_q"), [("exact", 64, 64), ("int8", 64, 64), ("int8", 64, 128), ("int8", 128, 128)]
)
def test_exactly_the_kept_blocks_are_visited(precision, head_dim, block_q):
    """Position-coded values and a mask per head: reading a neighbour's mask, or running dense, would show."""
    tokens = 200
    query, key, _ = half(inputs(tokens, heads=3, head_dim=head_dim, batch=2))
    value = (torch.arange(tokens).view(-1, 1) / 100).expand(query.shape).half() + torch.arange(3).view(1, -1, 1, 1)
    given = arguments(tokens, 3, precision, block_q)
    given["block_mask"] = BlockMask.from_dense(masks(3, tokens, seed=7, block_q=block_q), tokens, block_q)
    assert_as_good_as_the_reference((query, key, value.contiguous()), given, precision)
    kernel_format = "fp16" if precision == "exact" else "int8"
    visited = triton_launch.run(
        torch.empty_like(query), torch.empty(2, 3, tokens), query, key, value, None, given["block_mask"].bits, block_q,
        None, None, None, None, "", [kernel_format] * 3, [kernel_format] * 3, 0.2, count_visits=True,
    )  # fmt: skip
    programs = 2 if head_dim == 128 else 1  # per row of the mask
    expected = given["block_mask"].to_dense().sum(-1).int().repeat_interleave(programs, -1).expand(2, -1, -1)
    assert torch.equal(visited[0], expected)


def test_heads_of_different_precisions_are_attended_each_in_its_own():
    tensors = half(inputs(130, heads=3, head_dim=64))
    given = arguments(130, 3, "exact")
    given["precisions"] = [Precision.parse(name) for name in ("int8", "exact", "int8")]
    mixed, _ = triton_attention.attend(*tensors, **given)
    for name, heads in (("int8", [0, 2]), ("exact", [1])):
        alone, _ = triton_attention.attend(*tensors, **(given | {"precisions": [Precision.parse(name)] * 3}))
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
    tensors = half(inputs(200, heads=1, head_dim=64))
    given = arguments(200, 1, precision, compensate=torch.tensor([True]))
    config = VARIANTS[name] if precision != "exact" else dataclasses.replace(VARIANTS[name], swapped=False)
    kind = Kind(
        64, 64, *(("16", "16") if precision == "exact" else precision.split("/") * (1 if "/" in precision else 2))
    )
    outputs = []
    for chosen in (Config(4, 2), config):
        monkeypatch.setitem(triton_configs.OVERRIDES, ("sm90", kind), chosen)
        assert_as_good_as_the_reference(tensors, given, precision)
        outputs.append(triton_attention.attend(*tensors, **given)[0])
    if config.width == 64:
        assert oracles.relative_error(*outputs) < 2**-11  # sums in another order


@pytest.mark.parametrize("precision", ["int8", "exact"])
def test_single_steps_round_as_the_reference(monkeypatch, precision):
    """With one block per step only rounding at ties and the 16-bit output may differ."""
    for width in ("int8", "16"):
        config = Config(4, 2, swapped=width == "int8")
        monkeypatch.setitem(triton_configs.OVERRIDES, ("sm90", Kind(64, 64, width, width)), config)
    tensors = half(inputs(200, heads=2, head_dim=64))
    given = arguments(200, 2, precision)
    output, _ = triton_attention.attend(*tensors, **given)
    expected, _ = reference.attend(*tensors, **given, p_quantization=triton_attention.P_QUANTIZATION)
    assert oracles.relative_error(output, expected) < 2**-11


@pytest.mark.parametrize("pairs", ["interleaved", "halves"])
def test_rotary_embedding_is_applied_in_the_prologue(pairs):
    tokens, head_dim = 70, 40
    query, key, value = half(inputs(tokens, heads=2, head_dim=head_dim))
    angle = torch.rand(tokens, head_dim // 2, generator=torch.Generator().manual_seed(0)) * 6
    angle[-6:] = 0  # text
    rotary = triton_attention.Rotary(angle.cos(), angle.sin(), pairs)

    def turned(x):
        shape = (-1, 2) if pairs == "interleaved" else (2, -1)
        first, second = x.double().unflatten(-1, shape).unbind(-1 if pairs == "interleaved" else -2)
        cos, sin = angle.double().cos(), angle.double().sin()
        both = torch.stack(
            (first * cos - second * sin, first * sin + second * cos), -1 if pairs == "interleaved" else -2
        )
        return both.flatten(-2)

    given = arguments(tokens, 2, "exact")
    output, _ = triton_attention.attend(query, key, value, **given, rotary=rotary)
    exact, _ = oracles.sparse_attention(
        turned(query), turned(key), value, given["block_mask"].to_dense(), given["permutation"], scale=0.2
    )
    assert oracles.relative_error(output, exact) < 2e-3
    unturned, _ = triton_attention.attend(query, key, value, **given)
    assert oracles.relative_error(unturned, exact) > 0.1


def test_prepared_layers_look_their_masks_up_by_step():
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
    assert choose_for_layer("auto", plan, torch.device("cpu"), torch.float16) is triton_attention
    query, key, value = (x.transpose(1, 2).contiguous() for x in half(inputs(tokens, heads=heads, head_dim=64)))
    for step, compensate in ((0, [True, False]), (1, [False, False])):
        output = op(query, key, value, step=torch.tensor(step))
        assert output.is_contiguous()
        settings = {"permutation": plan.permutation, "block_mask": dense[2 * step : 2 * step + 2]}
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


@pytest.mark.parametrize("tokens", [1, 65, 150])
def test_block_sums_equal_the_statistics(tokens):
    q, k = 2 * torch.randn(2, tokens, 24, generator=torch.Generator().manual_seed(0))
    orders = [torch.randperm(tokens, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    sums = triton_calibration.block_sums(q, k, orders, scale=0.25)
    torch.testing.assert_close(sums, statistics.block_sums(q, k, orders, scale=0.25), rtol=1e-4, atol=1e-5)
    for order, measured in zip(orders, sums, strict=True):
        torch.testing.assert_close(measured.double(), oracles.block_sums(q, k, order, 0.25), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "head_dim", "block_q", "q_blocks", "dtype"),
    [
        (333, 16, 64, None, torch.float32),
        (333, 16, 64, [1, 5], torch.float32),
        (300, 72, 128, None, torch.float32),
        (200, 64, 128, [1], torch.float32),
        (63, 8, 64, None, torch.float32),
        (333, 64, 64, None, torch.float16),  # P loses nothing
    ],
)
def test_costs_and_errors_of_skipping_are_the_references(monkeypatch, tokens, head_dim, block_q, q_blocks, dtype):
    q, k, v = torch.randn(3, 3, tokens, head_dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    k += 3 * (dtype == torch.float32)  # the blocks' mean weights are then far from one
    rows, columns = -(-tokens // block_q), -(-tokens // 64)
    required = torch.zeros(rows, columns, dtype=torch.bool)
    required[:, -1] = True
    orders = list(permutations(3, tokens))
    settings = {"block_q": block_q, "q_blocks": None if q_blocks is None else torch.tensor(q_blocks)}
    monkeypatch.setattr(triton_calibration, "_MOST_ENTRIES", 2 * columns * tokens)  # two heads at once, then one
    found = triton_calibration.skip_costs(q, k, v, orders, 0.3, required, **settings)
    expected = skip_costs_of_heads(q, k, v, orders, 0.3, required, **settings)
    for own, of_reference in zip(found, expected, strict=True):
        torch.testing.assert_close(own.block_sums, of_reference.block_sums, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(own.costs, of_reference.costs, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(own.errors, of_reference.errors, rtol=1e-3, atol=1e-6)
        assert own.norm == pytest.approx(of_reference.norm, rel=1e-5)


def test_torch_accepts_the_operators():
    query, key, value = half(inputs(70, heads=2))
    bits, flags = BlockMask.from_dense(masks(2, 70), 70).bits, torch.tensor([True, False])
    torch.library.opcheck(
        torch.ops.paroattn.triton_attention,
        (
            query, key, value, permutations(2, 70).int(), bits, 64, flags, None, None, None, "",
            "int8,fp16", "int8,fp16", 0.25,
        ),
    )  # fmt: skip
    q, k = torch.randn(2, 70, 16, generator=torch.Generator().manual_seed(0))
    torch.library.opcheck(torch.ops.paroattn.triton_block_sums, (q, k, permutations(2, 70).int(), 0.25))


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
    query, key, value = half(inputs(tokens, heads=heads, head_dim=head_dim, batch=2))
    mask = BlockMask.from_dense(masks(heads, tokens), tokens)
    width = 64 if head_dim <= 64 else 128
    order = permutations(heads, tokens).int()
    compensate = torch.ones(heads, dtype=torch.uint8)
    call = Call(query, key, value, order, mask.bits, 64, compensate, None, (None, None), None, 0.2)
    partial = triton_pack.partial_statistics(call)
    plain = triton_pack.pack(call, triton_pack.heads_of(call, (0, 1), "int8", pv, False), partial)
    kind = Kind(width, 64, "int8", pv)
    monkeypatch.setitem(triton_configs.OVERRIDES, ("sm90", kind), Config(4, 2, swapped=False))
    packed = triton_pack.pack(call, triton_pack.heads_of(call, (0, 1), "int8", pv, True), partial)

    def rows(stored):
        """[blocks, 64, width] from [blocks, 8, width / 16, 8, 16]."""
        return stored.view(-1, 8, width // 16, 8, 16).transpose(2, 3).reshape(-1, 64, width)

    # Programs of 128 queries have one block more at the end.
    blocks = query.shape[0] * heads
    queries = plain.queries.view(blocks, -1, 64, width)[:, :4].reshape(-1, 64, width)
    assert torch.equal(rows(packed.queries), queries)
    ones = 8 if (pv, width) == ("fp8", 64) else 0
    record, scale = hopper.record_bytes(width, pv), hopper.scale_offset(width, pv)
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
    query, key, value = half(inputs(tokens, heads=1, head_dim=8))
    mask = BlockMask.from_dense(torch.ones(1, 66, 66, dtype=torch.bool), tokens)
    compensate = torch.ones(1, dtype=torch.uint8)
    call = Call(query, key, value, None, mask.bits, 64, compensate, None, (None, None), None, 0.2)
    lists = triton_pack.kept_lists(call, triton_pack.heads_of(call, (0,), "int8", "int8", True))
    steps = (66 + 1) // 2 + call.mean_blocks
    assert lists.indices.numel() > 65 * 66 + 2 * (steps + hopper.STAGES) + 1
    assert torch.equal(lists.indices[: 66 * 66].view(66, 66), torch.arange(66).int().expand(66, 66))
    assert triton_pack.all_blocks(call).numel() > 2 * ((66 + 1) // 2 + hopper.STAGES) + 1
