"""How fast the operator is beside PyTorch's own attention: one process, interleaved rounds, same masks."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm.auto import tqdm

from paroattn.block_mask import BLOCK, BlockMask, block_count, pack_bits
from paroattn.calibration.keep import check_density
from paroattn.evaluation.records import environment
from paroattn.grid import TokenGrid
from paroattn.ops import cpu, prepare
from paroattn.ops.prepared import choose_for_layer
from paroattn.order import AXIS_ORDERS, token_order
from paroattn.plan import LayerPlan
from paroattn.quantize import Precision

# Largest relative L2 error against float64 that random inputs may show; more means a broken kernel.
_ERROR_LIMITS = {"exact": 1e-5, "bf16": 0.02, "int8": 0.05, "int4": 0.8}


@dataclass(frozen=True)
class Shape:
    """Size of the attention to be timed, one batch element."""

    tokens: int
    heads: int
    head_dim: int


@dataclass(frozen=True)
class Contender:
    """Something to be timed.

    Attributes:
        method: "paroattn", "sdpa" or "flex".
        precision: number format of the products, and for torch's own attention the dtype.
        prologue: whether the time holds quantising, reordering and the inverse; None where there is none.
        call: does the work once and returns the seconds that do not count.
        compensate: whether skipped blocks are replaced by their means.
        error: relative to float64, or None if not measured.
        backend: what the operator runs on.
    """

    method: str
    precision: str
    density: float
    prologue: bool | None
    call: Callable[[], float]
    compensate: bool = False
    error: float | None = None
    backend: str | None = None


def bench_attention(
    shape: Shape,
    densities: Sequence[float],
    precisions: Sequence[str],
    *,
    backend: str = "auto",
    rounds: int = 9,
    unequal: bool = False,
    flex: bool = True,
    compensate: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Time the operator, torch's `scaled_dot_product_attention` and compiled FlexAttention on random inputs.

    Every head has one of the six axis orders and a random mask of exactly the wanted density. Inputs are float32, and
    bfloat16 for the precision "bf16"; SDPA runs in both, and the faster one of a round is what its ratios refer to.
    FlexAttention gets the same mask and needs no reordering.

    Args:
        shape: size of the inputs.
        densities: shares of computed blocks, in (0, 1].
        precisions: formats that `Precision.parse` knows.
        backend: of the operator.
        rounds: every contender runs once per round.
        unequal: spread the heads' densities linearly from half to one and a half times the wanted density.
        flex: also time FlexAttention, which compiles for some seconds.
        compensate: also time the operator with compensation of skipped blocks, where there are any.
        seed: of inputs and masks.
        progress: show a bar on stderr.

    Returns:
        One record per contender: what, error, median, spread (interquartile range), ratio, environment.

    Raises:
        ValueError: a density, precision or backend that cannot be.
        ArithmeticError: a result is farther from float64 than its format explains.
    """
    for density in densities:
        check_density(density)
    parsed = [Precision.parse(name) for name in precisions]
    inputs = _Inputs(shape, seed)
    contenders = [
        Contender("sdpa", name, 1.0, None, _untimed(inputs.sdpa, dtype))
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    ]
    for density in densities:
        mask = inputs.mask(density, unequal)
        for precision in parsed:
            contenders += inputs.operators(precision, density, mask, backend, compensate=False)
            if compensate and density < 1:
                contenders += inputs.operators(precision, density, mask, backend, compensate=True)
        if flex:
            contenders.append(Contender("flex", "fp32", density, None, _untimed(inputs.flex(mask))))
    times = _interleaved(contenders, rounds, progress)
    dense = [min(pair) for pair in zip(times[0], times[1], strict=True)]
    common = {
        "kind": "attention",
        **asdict(shape),
        "unequal": unequal,
        "rounds": rounds,
        **environment(),
    }
    return [{**_record(contender, own, dense), **common} for contender, own in zip(contenders, times, strict=True)]


def _interleaved(contenders: Sequence[Contender], rounds: int, progress: bool) -> list[list[float]]:
    """Seconds of each contender in each round, after one call that does not count."""
    times: list[list[float]] = [[] for _ in contenders]
    with tqdm(total=(rounds + 1) * len(contenders), desc="rounds", disable=not progress) as bar:
        for number in range(rounds + 1):
            for contender, own in zip(contenders, times, strict=True):
                start = time.perf_counter()
                excluded = contender.call()
                if number:
                    own.append(time.perf_counter() - start - excluded)
                bar.update()
    return times


def _record(contender: Contender, times: Sequence[float], dense: Sequence[float]) -> dict[str, Any]:
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    return {
        "method": contender.method,
        "precision": contender.precision,
        "density": contender.density,
        "prologue": contender.prologue,
        "compensate": contender.compensate,
        "error": contender.error,
        "backend": contender.backend,
        "median_ms": 1000 * statistics.median(times),
        "spread_ms": 1000 * (quartiles[2] - quartiles[0]),
        "times_sdpa": statistics.median(other / own for own, other in zip(times, dense, strict=True)),
    }


class _Inputs:
    """Random inputs of one shape, and the contenders that use them."""

    def __init__(self, shape: Shape, seed: int):
        self.shape = shape
        self.generator = torch.Generator().manual_seed(seed)
        size = (1, shape.heads, shape.tokens, shape.head_dim)
        query, key, value = (torch.randn(size, generator=self.generator) for _ in range(3))
        self.tensors = {
            dtype: (query.to(dtype), key.to(dtype), value.to(dtype)) for dtype in (torch.float32, torch.bfloat16)
        }
        side = math.floor(shape.tokens ** (1 / 3) + 1e-9)
        grid = TokenGrid(shape.tokens // side**2, side, side, shape.tokens % side**2)
        names = [AXIS_ORDERS[head % len(AXIS_ORDERS)] for head in range(shape.heads)]
        self.order = torch.stack([token_order(name, grid) for name in names])

    def mask(self, density: float, unequal: bool) -> Tensor:
        """Bool [H, rows, columns] with the diagonal and, beside it, blocks at random."""
        heads, blocks = self.shape.heads, block_count(self.shape.tokens, BLOCK)
        score = torch.rand(heads, blocks, blocks, generator=self.generator)
        score.diagonal(dim1=1, dim2=2).fill_(2)
        mask = torch.zeros(heads, blocks * blocks, dtype=torch.bool)
        for head in range(heads):
            share = density * (0.5 + head / (heads - 1)) if unequal and heads > 1 else density
            kept = min(max(round(share * blocks**2), blocks), blocks**2)
            mask[head, score[head].flatten().topk(kept).indices] = True
        return mask.view(heads, blocks, blocks)

    def sdpa(self, dtype: torch.dtype) -> Tensor:
        return scaled_dot_product_attention(*self.tensors[dtype])

    def operators(
        self, precision: Precision, density: float, mask: Tensor, backend: str, *, compensate: bool
    ) -> list[Contender]:
        """The prepared operator, checked against float64, and where the kernel tells its parts, without prologue."""
        dtype = torch.bfloat16 if str(precision) == "bf16" else torch.float32
        whole = bool(mask.all())
        heads, tokens = self.shape.heads, self.shape.tokens
        plan = LayerPlan(
            precisions=(precision,) * heads,
            orders=self.order,
            mask_table=None if whole else pack_bits(mask),
            mask_index=None if whole else torch.arange(heads, dtype=torch.int32).unsqueeze(0),
            compensate=torch.ones(1, heads, dtype=torch.bool) if compensate else None,
            tokens=tokens,
        )
        op = prepare(plan, device="cpu", dtype=dtype, tensor_layout="HND", backend=backend)
        tensors, step = self.tensors[dtype], torch.tensor(0)
        error = self._error(op(*tensors, step=step), tensors, mask, compensate)
        limit = max(_ERROR_LIMITS[precision.qk], _ERROR_LIMITS[precision.pv])
        if not error <= limit:
            raise ArithmeticError(
                f"{precision} at density {density:g} is {error:.2g} from float64; expected at most {limit:g}"
            )
        chosen = choose_for_layer(backend, plan, tensors[0].device)

        def contender(prologue: bool, call: Callable[[], float]) -> Contender:
            return Contender("paroattn", str(precision), density, prologue, call, compensate, error, chosen.describe())

        found = [contender(True, _untimed(op, *tensors, step=step))]
        if chosen is cpu:
            block_mask = None if whole else BlockMask.from_dense(mask, tokens)
            scale = self.shape.head_dim**-0.5
            flags = None if plan.compensate is None else plan.compensate[0]
            arguments = cpu.kernel_arguments(*tensors, self.order, block_mask, plan.precisions, flags, None, scale)
            output, lse = torch.empty_like(tensors[0]), torch.empty(1, heads, tokens)

            def without_prologue() -> float:
                _, prologue_seconds = cpu.run_kernel(output, lse, *arguments)
                return prologue_seconds

            found.append(contender(False, without_prologue))
        return found

    def flex(self, mask: Tensor) -> Callable[[], Tensor]:
        """FlexAttention, compiled, with the mask's blocks as full blocks."""
        from torch.nn.attention.flex_attention import BlockMask as FlexMask
        from torch.nn.attention.flex_attention import flex_attention

        counts = mask.sum(-1, dtype=torch.int32).unsqueeze(0)
        indices = mask.int().argsort(dim=-1, descending=True, stable=True).int().unsqueeze(0)
        none = torch.zeros_like(counts)  # of the blocks are partial; full ones need indices of their own, not shared
        flex_mask = FlexMask.from_kv_blocks(
            none, indices, counts, indices.clone(), BLOCK_SIZE=BLOCK, seq_lengths=(self.shape.tokens,) * 2
        )
        compiled: Callable[..., Any] = torch.compile(flex_attention)
        return lambda: compiled(*self.tensors[torch.float32], block_mask=flex_mask)

    def _error(self, output: Tensor, tensors: Sequence[Tensor], mask: Tensor, compensate: bool) -> float:
        """Relative L2 error of a quarter of the rows of blocks, at most 8 per head, against float64."""
        rows = range(0, mask.shape[1], max(4, mask.shape[1] // 8))
        difference = norm = 0.0
        for head, order in enumerate(self.order):
            query, key, value = (x[0, head].double()[order] for x in tensors)
            mean_key, mean_value = (torch.stack([x.mean(0) for x in tensor.split(BLOCK)]) for tensor in (key, value))
            sizes = torch.tensor([len(part) for part in order.split(BLOCK)])
            for row in rows:
                tokens = slice(row * BLOCK, (row + 1) * BLOCK)
                skipped = ~mask[head, row] & compensate
                kept = mask[head, row].repeat_interleave(BLOCK)[: len(order)]
                keys, values = torch.cat((key[kept], mean_key[skipped])), torch.cat((value[kept], mean_value[skipped]))
                counts = torch.cat((torch.ones(len(keys) - int(skipped.sum())), sizes[skipped])).double()
                logits = query[tokens] @ keys.T * self.shape.head_dim**-0.5 + counts.log()
                expected = logits.softmax(-1) @ values
                difference += float((output[0, head].double()[order[tokens]] - expected).square().sum())
                norm += float(expected.square().sum())
        return math.sqrt(difference / norm)


def _untimed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], float]:
    """A call that counts from beginning to end."""

    def call() -> float:
        function(*args, **kwargs)
        return 0.0

    return call
