"""What is checked on a real GPU: by tests/gpu, and by lab/benchmarks/gpu/correctness.py, which records it.

A kernel may err twice as much as the reference, which rounds as the kernels do, and by what rounding its output adds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import oracles
import torch
from attention_inputs import exact_attention, over_nan
from torch import Tensor

from paroattn import BlockMask, LayerPlan, Precision, prepare
from paroattn.block_mask import BLOCK, block_count
from paroattn.calibration import gpu as calibration
from paroattn.calibration import statistics
from paroattn.calibration.kernels import skip_costs_of_heads
from paroattn.ops import reference, repair
from paroattn.ops.gpu import backend, hopper, rotary
from paroattn.ops.inputs import AttentionInputs

DEVICE = torch.device("cuda")
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of the output; of products and P in 16 bits, too
PRECISIONS = ("exact", "int8", "int8/exact", "exact/int8", "int8/fp8", "exact/fp8")
KINDS = ("random", "smooth", "peaky", "offset")


@dataclass(frozen=True)
class Variant:
    """A call to check."""

    precision: str
    head_dim: int
    block_q: int
    dtype: torch.dtype
    inputs: str = "random"
    mask: str = "sparse"  # or "dense", "compensated", "hidden keys"
    tokens: int = 1777
    heads: int = 2
    batch: int = 2
    kernel: str = "own"  # what a call takes, or "triton": not hopper_forward.cu

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.precision:10} D {self.head_dim:3} {self.block_q:3} x 64 {dtype:8} {self.inputs:6} {self.mask:11} "
            f"B {self.batch} H {self.heads} N {self.tokens:6,}"
        ) + ("" if self.kernel == "own" else f" {self.kernel}")


def variants(quick: bool = False) -> Iterator[Variant]:
    """All formats, shapes of blocks and kinds of masks at a short length; the main ones at the lengths of models."""
    for head_dim in (64, 128, 256):
        for block_q in (64, 128):
            for precision in PRECISIONS:
                for mask in ("dense", "sparse", "compensated", "hidden keys"):
                    variant = Variant(precision, head_dim, block_q, torch.bfloat16, mask=mask)
                    yield variant
                    if precision in ("int8", "int8/fp8") and head_dim <= 128:
                        yield replace(variant, kernel="triton")
    for precision in PRECISIONS:
        for inputs in KINDS[1:]:
            yield Variant(precision, 64, 128, torch.bfloat16, inputs, "compensated")
        for head_dim in (40, 96, 192):
            yield Variant(precision, head_dim, 64, torch.float16)
    if quick:
        return
    for tokens, head_dim in ((17_776, 64), (32_760, 128)):  # CogVideoX, Wan 2.1 at 480p
        for precision in PRECISIONS:
            for inputs in KINDS:
                yield Variant(precision, head_dim, 128, torch.bfloat16, inputs, "compensated", tokens, 1, 1)


def tensors_of(variant: Variant, seed: int = 0) -> list[Tensor]:
    """Query, key and value [B, H, N, D]."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    shape = (variant.batch, variant.heads, variant.tokens, variant.head_dim)
    query, key, value = torch.randn(3, *shape, generator=generator, device=DEVICE).unbind(0)
    if variant.inputs == "smooth":  # neighbours are alike, as in videos
        position = torch.arange(variant.tokens, device=DEVICE).view(-1, 1) / variant.tokens
        wave = torch.sin(position * 40 * torch.rand(variant.head_dim, generator=generator, device=DEVICE))
        query, key, value = (0.3 * x + 2 * wave for x in (query, key, value))
    if variant.inputs == "peaky":
        query = 8 * query
    if variant.inputs == "offset":
        key, value = key + 5, value + 3
    return [x.to(variant.dtype) for x in (query, key, value)]


def inputs_of(variant: Variant, seed: int = 0) -> AttentionInputs:
    """Orders and masks that differ from head to head."""
    generator = torch.Generator().manual_seed(seed)
    tokens, heads = variant.tokens, variant.heads
    rows, columns = block_count(tokens, variant.block_q), block_count(tokens, BLOCK)
    mask = torch.rand(heads, rows, columns, generator=generator) < 0.3
    mask[:, torch.arange(rows), torch.arange(rows) * variant.block_q // BLOCK] = True
    hidden = torch.rand(variant.batch, tokens, generator=generator) < 0.1
    order = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(heads)])
    return AttentionInputs(
        *tensors_of(variant, seed),
        order.to(DEVICE),
        None if variant.mask == "dense" else BlockMask.from_dense(mask.to(DEVICE), tokens, variant.block_q),
        [Precision.parse(variant.precision)] * heads,
        torch.ones(heads, dtype=torch.bool, device=DEVICE) if variant.mask == "compensated" else None,
        ~hidden.to(DEVICE) if variant.mask == "hidden keys" else None,
        variant.head_dim**-0.5,
    )


def reference_error(variant: Variant) -> float:
    """Of the reference on inputs of the same kind; at a short length, since it takes one block after the other."""
    inputs = inputs_of(replace(variant, tokens=min(variant.tokens, Variant.tokens)))
    return oracles.relative_error(reference.attend(inputs, backend.P_QUANTIZATION)[0], exact_attention(inputs)[0])


def check(variant: Variant) -> dict[str, Any]:
    """The record of one variant: its error, what the reference's is, and whether outputs repeat to the bit."""
    from paroattn.ops.gpu import launch, pack

    inputs = inputs_of(variant)
    launch.recordings.clear()  # a variant is of the same kind with either forward
    triton_only = mock.patch.object(hopper, "takes", return_value=False)
    with triton_only if variant.kernel == "triton" else contextlib.nullcontext():
        written = over_nan(lambda output, lse, _: launch.run(output, lse, pack.Call(inputs)), inputs)
        again = backend.attend(inputs)
    error, own = oracles.relative_error(written[0], exact_attention(inputs)[0]), reference_error(variant)
    limit = 2 * own + ROUNDING[variant.dtype]
    if variant.precision.endswith("fp8"):
        limit = max(limit, 2**-4)  # the reference rounds P relative to other maxima
    repeats = all(torch.equal(*both) for both in zip(written, again, strict=True))
    return {"error": error, "reference_error": own, "limit": limit, "repeats": repeats}


@dataclass(frozen=True)
class Check:
    """What is no variant of the forward: an error and what it may be."""

    name: str
    error: Callable[[], float]
    limit: float

    def __str__(self) -> str:
        return self.name


_MIXED = ("int8", "exact", "int8/fp8")


def checks() -> list[Check]:
    """RoPE, heads of different formats, compiled calls, repair, calibration's kernels."""
    found = [
        Check(f"rotary {pairs}, {str(dtype)[6:]}", partial(_rotary_error, pairs, dtype), limit)
        for pairs in ("interleaved", "halves")
        for dtype, limit in ((torch.float32, 2**-20), *ROUNDING.items())
    ]
    found += [Check(f"mixed formats, {name}", partial(_mixed_error, head), 0.0) for head, name in enumerate(_MIXED)]
    found.append(Check("torch.compile", _compiled_error, 2**-8))
    found += [Check(f"tables, {name}", partial(_table_error, name), 0.0) for name in ("int8/fp8", "int8", "exact")]
    found += [Check(f"called again, {name}", partial(_prepared_error, name), 0.0) for name in ("int8/fp8", "exact")]
    for head_dim in (40, 64, 128, 256):
        for dtype, limit in ROUNDING.items():
            name = f"repair, D {head_dim}, {str(dtype)[6:]}"
            found.append(Check(name, partial(_repair_error, head_dim, dtype), limit))
    found.append(Check("repair in float32", partial(_repair_error, 128, torch.float32), 1e-5))
    found += [Check(f"repair, {name}", partial(_repaired_error, name), 0.0) for name in ("again", "captured")]
    found.append(Check("repair, compiled", partial(_repaired_error, "compiled"), 2**-8))
    for head_dim, block_q in ((64, 64), (64, 128), (128, 64), (256, 64)):
        found.append(Check(f"block sums, D {head_dim}", partial(_block_sums_error, head_dim), 1e-4))
        for part in ("costs", "errors"):
            name = f"skip {part}, D {head_dim}, {block_q} x 64"
            found.append(Check(name, partial(_skip_error, head_dim, block_q, part), 1e-3))
        name = f"skip costs of some rows, D {head_dim}, {block_q} x 64: error over bound"
        found.append(Check(name, partial(_rounding_over_bound, head_dim, block_q), 1.0))
    return found


def _three_heads() -> AttentionInputs:
    return inputs_of(Variant("exact", 64, 64, torch.bfloat16, heads=3))


def _rotary_error(pairs: str, dtype: torch.dtype) -> float:
    """Over what rounding the result explains; heads of 80 channels, of queries and keys that lie in one tensor."""
    whole = torch.randn(2, 500, 3, 5, 80, device=DEVICE, dtype=dtype)
    angle = torch.rand(500, 40, device=DEVICE) * 6
    cos, sin = angle.cos().unsqueeze(0), angle.sin().unsqueeze(0)
    turned = rotary.rotate(whole[:, :, 1], rotary.Rotation(pairs, (cos, cos), (sin, sin)))
    exact = oracles.rotated(whole[:, :, 1].transpose(1, 2), angle, pairs).transpose(1, 2)
    return oracles.relative_error(turned, exact)


def _mixed_error(head: int) -> float:
    inputs, precisions = _three_heads(), [Precision.parse(name) for name in _MIXED]
    mixed, _ = backend.attend(replace(inputs, precisions=precisions))
    alone, _ = backend.attend(replace(inputs, precisions=precisions[head : head + 1] * 3))
    return float((mixed[:, head] - alone[:, head]).abs().max())


def _compiled_error() -> float:
    inputs = _three_heads()

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return backend.attend(replace(inputs, query=2 * query, key=key, value=value))[0] + 1

    tensors = (inputs.query, inputs.key, inputs.value)
    return oracles.relative_error(torch.compile(call, fullgraph=True)(*tensors), call(*tensors))


def _table_error(precision: str) -> float:
    """Of calls that look up orders, masks and flags in tables, one after the other in two step buckets."""
    inputs = inputs_of(Variant(precision, 64, 64, torch.bfloat16, heads=3))
    permutation, masks = inputs.permutation, inputs.block_mask
    assert permutation is not None
    assert masks is not None
    error = 0.0
    for bucket in (0, 1):
        tables = replace(
            inputs,
            permutation=permutation[:2].int(),
            order_index=torch.tensor([1, 0, 1], dtype=torch.int32, device=DEVICE),
            block_mask=BlockMask(masks.bits.flip(0).contiguous(), masks.tokens, masks.block_q, masks.block_kv),
            mask_index=torch.tensor([[0, 2, 1], [2, 0, 0]], dtype=torch.int32, device=DEVICE),
            compensate=torch.tensor([[True, False, True], [False, True, True]], device=DEVICE),
            bucket=torch.tensor([bucket], device=DEVICE),
        )
        error = max(error, float((backend.attend(tables)[0] - backend.attend(tables.looked_up())[0]).abs().max()))
    return error


def _prepared_error(precision: str) -> float:
    """Of an operator that is called again with other tensors, buckets and key masks."""
    inputs = inputs_of(Variant(precision, 64, 64, torch.bfloat16, heads=3, batch=1))
    permutation, masks = inputs.permutation, inputs.block_mask
    assert permutation is not None
    assert masks is not None
    layer = LayerPlan(
        inputs.precisions,
        permutation[:2].int(),
        torch.tensor([1, 0, 1], dtype=torch.int32),
        masks.bits,
        torch.tensor([[0, 2, 1], [2, 0, 0]], dtype=torch.int32),
        torch.tensor([[True, False, True], [False, True, True]]),
        tokens=masks.tokens,
    )
    operator = prepare(layer, device=DEVICE, dtype=torch.bfloat16, tensor_layout="NHD", scale=inputs.scale)
    error = 0.0
    for number in range(6):
        changed = [x.roll(number, 2).transpose(1, 2).contiguous() for x in (inputs.query, inputs.key, inputs.value)]
        bucket = torch.tensor(number % 2, device=DEVICE)
        shown = None if number < 3 else torch.arange(masks.tokens, device=DEVICE)[None] % 7 != number
        found = operator(*changed, bucket=bucket, key_mask=shown)
        expected = operator(*changed, bucket=bucket.int(), key_mask=shown)  # which is worked out anew
        error = max(error, float((found - expected).abs().max()))
    return error


def _repair_error(head_dim: int, dtype: torch.dtype) -> float:
    """Against the definition in float64: text before, hidden keys, four heads that share two of keys."""
    query, key, value = tensors_of(Variant("exact", head_dim, 64, dtype, "smooth", heads=4))
    key, value = key[:, ::2], value[:, ::2]
    shown = torch.arange(Variant.tokens, device=DEVICE).expand(Variant.batch, -1) % 7 > 0
    output = torch.tanh(query.roll(1, 3)).transpose(1, 2).contiguous().transpose(1, 2)
    rows = {"first": 77, "count": Variant.tokens - 77, "key_mask": shown}
    expected = repair.by_definition(*(x.double() for x in (output, query, key, value)), **rows)
    return oracles.relative_error(repair.repaired(output, query, key, value, **rows), expected)


def _repaired_error(way: str) -> float:
    """How far a prepared operator with repair that is called again, captured or compiled is from its first call."""
    inputs = inputs_of(Variant("int8", 64, 64, torch.bfloat16, "smooth", heads=3, batch=1))
    masks = inputs.block_mask
    assert masks is not None
    layer = LayerPlan(
        inputs.precisions,
        mask_table=masks.bits,
        mask_index=torch.arange(3, dtype=torch.int32).unsqueeze(0),
        tokens=masks.tokens,
    )
    operator = prepare(layer, device=DEVICE, dtype=torch.bfloat16, scale=inputs.scale, repair=True)
    tensors, bucket = (inputs.query, inputs.key, inputs.value), torch.tensor(0, device=DEVICE)

    def call(*given: Tensor) -> Tensor:
        return operator(*given, bucket=bucket)

    expected = call(*tensors)
    if way == "compiled":
        return oracles.relative_error(torch.compile(call, fullgraph=True)(*tensors), expected)
    found = call(*tensors)
    if way == "captured":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call(*tensors)
        found.zero_()
        graph.replay()
    return float((found - expected).abs().max())


_TOKENS = 1000  # the reference then looks at all rows at once, as the kernels do


def _head(head_dim: int) -> tuple[list[Tensor], Tensor, float]:
    """q, k and v [N, D], an order and the scale."""
    tensors = tensors_of(Variant("exact", head_dim, 64, torch.bfloat16, tokens=_TOKENS))
    order = torch.randperm(_TOKENS, generator=torch.Generator().manual_seed(0))
    return [x[0, 0] for x in tensors], order, head_dim**-0.5


def _block_sums_error(head_dim: int) -> float:
    (q, k, _), order, scale = _head(head_dim)
    sums = calibration.block_sums(q, k, [order], scale)
    return oracles.relative_error(sums, statistics.block_sums(q, k, [order], scale))


def _skip_error(head_dim: int, block_q: int, part: str) -> float:
    tensors, order, scale = _head(head_dim)
    required = torch.zeros(block_count(_TOKENS, block_q), block_count(_TOKENS, BLOCK), dtype=torch.bool)
    required[:, -1] = True
    found, expected = (
        function(*(x.unsqueeze(0) for x in tensors), [order], scale, required, block_q=block_q)[0]
        for function in (calibration.skip_costs, skip_costs_of_heads)
    )
    return oracles.relative_error(getattr(found, part), getattr(expected, part))


def _rounding_over_bound(head_dim: int, block_q: int) -> float:
    """How far costs are off, over what rounding P to bfloat16 explains."""
    tensors, order, scale = _head(head_dim)
    tensors[2] = tensors[2] + 500  # what values have in common is nobody's cost, as long as all sums are of the same P
    rows = torch.arange(16) * (block_q // 16) + 1
    required = torch.zeros(block_count(_TOKENS, block_q), block_count(_TOKENS, BLOCK), dtype=torch.bool)
    given = (*(x.unsqueeze(0) for x in tensors), [order], scale, required)
    (found,) = calibration.skip_costs(*given, block_q=block_q, rows=rows, levels=())
    norms, bounds = oracles.skip_costs(*(x.cpu() for x in tensors), order, scale, rows, block_q, rounding=2**-8)
    off = ((found.costs.double().cpu() * len(rows) / block_q).sqrt() - norms).abs()
    return float((off / (bounds + 1e-5 * norms.amax())).max())
