"""Every shipped variant of the GPU's kernels against float64: run it first on a new kind of GPU.

python benchmarks/gpu/correctness.py [--quick] [--output FILE.jsonl]

Each line is a variant: the relative L2 error against float64, and that of the reference, which rounds as the kernels
do. A kernel may err twice as much as the reference, and by what rounding its output adds.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from paroattn import BlockMask, Precision
from paroattn.block_mask import BLOCK, block_count
from paroattn.calibration import skip_cost, statistics
from paroattn.calibration.kernels import skip_costs_of_heads
from paroattn.evaluation.records import environment, write_records
from paroattn.ops import hopper, reference, triton_attention, triton_calibration

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


def variants(quick: bool) -> Iterator[Variant]:
    """All formats, shapes of blocks and kinds of masks at a short length; the main ones at the lengths of models."""
    for head_dim in (64, 128):
        for block_q in (64, 128):
            for precision in PRECISIONS:
                for mask in ("dense", "sparse", "compensated", "hidden keys"):
                    variant = Variant(precision, head_dim, block_q, torch.bfloat16, mask=mask)
                    yield variant
                    if precision in ("int8", "int8/fp8"):
                        yield replace(variant, kernel="triton")
    for precision in PRECISIONS:
        for inputs in KINDS[1:]:
            yield Variant(precision, 64, 128, torch.bfloat16, inputs, "compensated")
        for head_dim in (40, 96):
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


def arguments_of(variant: Variant, seed: int = 0) -> dict[str, Any]:
    """Orders and masks that differ from head to head."""
    generator = torch.Generator().manual_seed(seed)
    tokens, heads = variant.tokens, variant.heads
    rows, columns = block_count(tokens, variant.block_q), block_count(tokens, BLOCK)
    mask = torch.rand(heads, rows, columns, generator=generator) < 0.3
    mask[:, torch.arange(rows), torch.arange(rows) * variant.block_q // BLOCK] = True
    hidden = torch.rand(variant.batch, tokens, generator=generator) < 0.1
    order = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(heads)])
    return {
        "permutation": order.to(DEVICE),
        "block_mask": None
        if variant.mask == "dense"
        else BlockMask.from_dense(mask.to(DEVICE), tokens, variant.block_q),
        "precisions": [Precision.parse(variant.precision)] * heads,
        "compensate": torch.ones(heads, dtype=torch.bool, device=DEVICE) if variant.mask == "compensated" else None,
        "key_mask": ~hidden.to(DEVICE) if variant.mask == "hidden keys" else None,
        "scale": variant.head_dim**-0.5,
    }


def exact_output(tensors: list[Tensor], given: dict[str, Any]) -> Tensor:
    """The definition in float64, [B, H, N, D], some rows at a time."""
    batch, heads, tokens, _ = tensors[0].shape
    block_mask, key_mask = given["block_mask"], given["key_mask"]
    block_q = BLOCK if block_mask is None else block_mask.block_q
    output = torch.empty(tensors[0].shape, dtype=torch.float64, device=DEVICE)
    for b in range(batch):
        for h in range(heads):
            order = given["permutation"][h]
            q, k, v = (x[b, h].double()[order] for x in tensors)
            mean_k, mean_v, count = skip_cost.block_means(k, v)
            for start in range(0, tokens, 16 * block_q):
                rows = slice(start, min(start + 16 * block_q, tokens))
                logits, values = q[rows] @ k.mT * given["scale"], v
                if key_mask is not None:
                    logits[:, ~key_mask[b, order]] = -torch.inf
                if block_mask is not None:
                    kept = block_mask.to_dense()[h, start // block_q : block_count(rows.stop, block_q)]
                    kept = kept.repeat_interleave(block_q, 0)[: rows.stop - start]
                    logits[~kept.repeat_interleave(BLOCK, 1)[:, :tokens]] = -torch.inf
                    if given["compensate"] is not None:
                        means = q[rows] @ mean_k.mT * given["scale"] + count.mT.log()
                        logits = torch.cat((logits, means.masked_fill(kept, -torch.inf)), 1)
                        values = torch.cat((values, mean_v))
                output[b, h, order[rows]] = logits.softmax(1) @ values
    return output


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def reference_error(variant: Variant) -> float:
    """Of the reference on inputs of the same kind; at a short length, since it takes one block after the other."""
    short = replace(variant, tokens=min(variant.tokens, Variant.tokens))
    tensors, given = tensors_of(short), arguments_of(short)
    output, _ = reference.attend(*tensors, **given, p_quantization=triton_attention.P_QUANTIZATION)
    return relative_error(output, exact_output(tensors, given))


def check(variant: Variant) -> dict[str, Any]:
    """The record of one variant."""
    tensors, given = tensors_of(variant), arguments_of(variant)
    exact = exact_output(tensors, given)
    triton_only = mock.patch.object(hopper, "takes", return_value=False)
    with triton_only if variant.kernel == "triton" else contextlib.nullcontext():
        output, _ = triton_attention.attend(*tensors, **given)
        again, _ = triton_attention.attend(*tensors, **given)
    error, own = relative_error(output, exact), reference_error(variant)
    limit = 2 * own + ROUNDING[variant.dtype]
    if variant.precision.endswith("fp8"):
        limit = max(limit, 2**-4)  # the reference rounds P relative to other maxima
    return {
        "kind": "gpu correctness",
        "variant": str(variant),
        "error": error,
        "reference_error": own,
        "limit": limit,
        "repeats": bool(torch.equal(output, again)),
        "passed": bool(error <= limit and torch.equal(output, again)),
    }


def check_calls() -> Iterator[dict[str, Any]]:
    """What is no variant of the forward: RoPE, heads of different formats, compiled calls, calibration's kernels."""
    tokens, head_dim = 1777, 64
    variant = Variant("exact", head_dim, 64, torch.bfloat16, tokens=tokens, heads=3)
    tensors, given = tensors_of(variant), arguments_of(variant)

    for pairs in ("interleaved", "halves"):
        angle = torch.rand(tokens, head_dim // 2, device=DEVICE) * 6
        rotary = triton_attention.Rotary(angle.cos(), angle.sin(), pairs)
        split, stack = ((-1, 2), -1) if pairs == "interleaved" else ((2, -1), -2)
        turned = []
        for x in tensors[:2]:
            first, second = x.double().unflatten(-1, split).unbind(stack)
            cos, sin = angle.double().cos(), angle.double().sin()
            turned.append(torch.stack((first * cos - second * sin, first * sin + second * cos), stack).flatten(-2))
        output, _ = triton_attention.attend(*tensors, **given, rotary=rotary)
        yield _record(f"rotary {pairs}", relative_error(output, exact_output([*turned, tensors[2]], given)), 2**-6)

    names = ("int8", "exact", "int8/fp8")
    mixed, _ = triton_attention.attend(*tensors, **given | {"precisions": [Precision.parse(name) for name in names]})
    for head, name in enumerate(names):
        alone, _ = triton_attention.attend(*tensors, **given | {"precisions": [Precision.parse(name)] * 3})
        yield _record(f"mixed formats, {name}", float((mixed[:, head] - alone[:, head]).abs().max()), 0.0)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return triton_attention.attend(2 * query, key, value, **given)[0] + 1

    compiled = torch.compile(call, fullgraph=True)
    yield _record("torch.compile", relative_error(compiled(*tensors), call(*tensors).double()), 2**-8)

    tokens = 1000  # the reference then looks at all rows at once, as the kernels do
    for head_dim, block_q in ((64, 64), (64, 128), (128, 64)):
        q, k, v = (x[0, 0] for x in tensors_of(Variant("exact", head_dim, 64, torch.bfloat16, tokens=tokens)))
        order, scale = torch.randperm(tokens), head_dim**-0.5
        sums = triton_calibration.block_sums(q, k, [order], scale)
        exact_sums = statistics.block_sums(q, k, [order], scale)
        yield _record(f"block sums, D {head_dim}", relative_error(sums, exact_sums.double()), 1e-4)
        required = torch.zeros(block_count(tokens, block_q), block_count(tokens, BLOCK), dtype=torch.bool)
        required[:, -1] = True
        heads = [x.unsqueeze(0) for x in (q, k, v)]
        found, expected = (
            function(*heads, [order], scale, required, block_q=block_q)[0]
            for function in (triton_calibration.skip_costs, skip_costs_of_heads)
        )
        for name in ("costs", "errors"):
            error = relative_error(getattr(found, name), getattr(expected, name).double())
            yield _record(f"skip {name}, D {head_dim}, {block_q} x 64", error, 1e-3)


def _record(name: str, error: float, limit: float) -> dict[str, Any]:
    return {"kind": "gpu correctness", "variant": name, "error": error, "limit": limit, "passed": error <= limit}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short lengths only")
    parser.add_argument("--jobs", type=int, default=8, help="processes")
    parser.add_argument("--output", type=Path, help="write the records to this file")
    arguments = parser.parse_args()
    records = []

    def take(record: dict[str, Any]) -> None:
        records.append(record)
        against = f"  reference {record['reference_error']:.2e}" if "reference_error" in record else ""
        mark = "" if record["passed"] else "  <- FAILED"
        print(f"{record['variant']:78} {record['error']:.2e}{against}{mark}", flush=True)

    for record in check_calls():
        take(record)
    # Compiling takes most of the time, and each process compiles for itself.
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        for record in pool.map(check, variants(arguments.quick)):
            take(record)
    if arguments.output:
        common = environment(DEVICE)
        write_records([{**record, **common} for record in records], arguments.output)
    failed = sum(not record["passed"] for record in records)
    print(f"{torch.cuda.get_device_name()}: {len(records)} checks, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
