"""How fast the operator is beside other attention: one process, interleaved rounds, same masks, on a CPU or a GPU."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from paroattn.block_mask import BLOCK, BlockMask, block_count, pack_bits
from paroattn.grid import TokenGrid
from paroattn.keep import check_density
from paroattn.ops import cpu, prepare
from paroattn.ops.backend import choose_backend
from paroattn.ops.gpu import backend as gpu
from paroattn.ops.gpu.device import INTERPRETED
from paroattn.ops.inputs import AttentionInputs, CallKind
from paroattn.ops.prepared import kind_of_calls
from paroattn.order import AXIS_ORDERS, token_order
from paroattn.plan import LayerPlan
from paroattn.quantize import Precision
from paroattn_lab.records import environment
from paroattn_lab.speed.peers import GPU_PEERS, Blocks, Peer, flex_attention, refined, sdpa
from paroattn_lab.speed.roofline import gpu_rooflines
from paroattn_lab.speed.rounds import interleaved, median_and_spread, paired_ratio

# Largest relative L2 error against float64 that random inputs may show; more means a broken kernel. On GPUs "exact" has
# bfloat16 inputs, as everything there.
_ERROR_LIMITS = {"exact": 1e-5, "bf16": 0.02, "int8": 0.05, "int4": 0.8, "fp8": 0.08}
_GPU_ERROR_LIMITS = {**_ERROR_LIMITS, "exact": 0.02}
FORWARD = "attention_forward"  # the name of the kernel that is not prologue
_LEAD_CYCLES = 5_000_000  # a GPU idles so long before each call that is timed, while the call's kernels are launched


@dataclass(frozen=True)
class Shape:
    """Size of the attention to be timed."""

    tokens: int
    heads: int
    head_dim: int
    batch: int = 1


@dataclass(frozen=True)
class Contender:
    """Something to be timed.

    Attributes:
        method: "paroattn", "sdpa", "flex" or a peer's name.
        precision: number format of the products, and for torch's own attention the dtype.
        prologue: whether the time holds quantising, reordering and the inverse; None where there is none.
        call: does the work once and returns the seconds that do not count.
        compensate: whether skipped blocks are replaced by their means.
        error: relative to float64, or None if not measured.
        backend: what the operator runs on.
        profile: whether the operator's kernels on a GPU tell the prologue from the rest.
    """

    method: str
    precision: str
    density: float
    prologue: bool | None
    call: Callable[[], float]
    compensate: bool = False
    error: float | None = None
    backend: str | None = None
    profile: bool = False


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
    block_q: int = BLOCK,
    block_kv: int = BLOCK,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Time the operator, torch's `scaled_dot_product_attention` and compiled FlexAttention on random inputs.

    Every head has one of the six axis orders and a random mask of exactly the wanted density. On a CPU, inputs are
    float32, and bfloat16 for the precision "bf16"; SDPA runs in both. On a GPU they are bfloat16, and the peers of
    `paroattn_lab.speed.peers` that are installed run too. Ratios refer to the fastest dense attention of a round.
    Peers that take masks get the same one, and no orders.

    Args:
        shape: size of the inputs.
        densities: shares of computed blocks, in (0, 1].
        precisions: formats that `Precision.parse` knows.
        backend: of the operator; "triton" runs on a GPU, "cpu" on the CPU, the others where there is a GPU on it.
        rounds: every contender runs once per round.
        unequal: spread the heads' densities linearly from half to one and a half times the wanted density.
        flex: also time FlexAttention, which compiles for some seconds.
        compensate: also time the operator with compensation of skipped blocks, where there are any.
        block_q, block_kv: queries and keys per block of the masks, 64 or 128; the operator, whose blocks have 64 keys,
            takes one of 128 as two. Some peers take only masks of 128 x 128.
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
    inputs = _Inputs(shape, seed, _device_of(backend, parsed), (block_q, block_kv))
    contenders = inputs.dense_contenders()
    dense_count = len(contenders)
    for density in densities:
        mask = inputs.mask(density, unequal)
        for precision in parsed:
            contenders += inputs.operators(precision, density, mask, backend, compensate=False)
            if compensate and density < 1:
                contenders += inputs.operators(precision, density, mask, backend, compensate=True)
        contenders += inputs.sparse_peers(density, mask, flex)
    times = interleaved(
        [functools.partial(_seconds, contender.call, inputs.device) for contender in contenders],
        rounds,
        progress=progress,
    )
    dense = [min(own) for own in zip(*times[:dense_count], strict=True)]
    common = {
        "kind": "attention",
        **asdict(shape),
        "block_q": block_q,
        "block_kv": block_kv,
        "unequal": unequal,
        "rounds": rounds,
        **environment(inputs.device),
    }
    return [
        {
            **_record(contender, own, dense),
            **_against_each(own, contenders[:dense_count], times[:dense_count]),
            **inputs.work(contender, own),
            **(_prologue_ms(contender.call) if contender.profile else {}),
            **common,
        }
        for contender, own in zip(contenders, times, strict=True)
    ]


def _device_of(backend: str, precisions: Sequence[Precision]) -> torch.device:
    """Where a backend is timed; raises `ValueError` where it cannot run."""
    if backend == "cpu" or INTERPRETED or (backend != "triton" and not torch.cuda.is_available()):
        return torch.device("cpu")
    device = torch.device("cuda")
    if backend == "triton":
        choose_backend(backend, CallKind(precisions, device, torch.bfloat16))
    return device


def _seconds(call: Callable[[], float], device: torch.device) -> float:
    """Seconds that count of one call; on a GPU by events, after a pause in which its kernels are launched."""
    if device.type == "cpu":
        start = time.perf_counter()
        excluded = call()
        return time.perf_counter() - start - excluded
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_LEAD_CYCLES)
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def _record(contender: Contender, times: Sequence[float], dense: Sequence[float]) -> dict[str, Any]:
    return {
        "method": contender.method,
        "precision": contender.precision,
        "density": contender.density,
        "prologue": contender.prologue,
        "compensate": contender.compensate,
        "error": contender.error,
        "backend": contender.backend,
        **median_and_spread(times),
        "times_sdpa": paired_ratio(dense, times),
    }


def _against_each(
    own: Sequence[float], dense: Sequence[Contender], times: Sequence[Sequence[float]]
) -> dict[str, dict[str, float]]:
    """How many times faster than each dense contender, by its name."""
    names = (f"{contender.method} {contender.precision}" for contender in dense)
    return {"times_each": {name: paired_ratio(base, own) for name, base in zip(names, times, strict=True)}}


def _prologue_ms(call: Callable[[], float]) -> dict[str, float]:
    """`prologue_ms`: GPU time of one call's kernels other than the attention forward, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    kernels = {event.key: event.self_device_time_total for event in profiler.key_averages()}
    return {"prologue_ms": sum(time for name, time in kernels.items() if not name.startswith(FORWARD)) / 1000}


class _Inputs:
    """Random inputs of one shape on a device, and the contenders that use them."""

    def __init__(self, shape: Shape, seed: int, device: torch.device, blocks: Blocks = (BLOCK, BLOCK)):
        self.shape, self.device, self.blocks = shape, device, blocks
        self.generator = torch.Generator().manual_seed(seed)
        size = (shape.batch, shape.heads, shape.tokens, shape.head_dim)
        own = torch.Generator(device).manual_seed(seed)
        query, key, value = (torch.randn(size, generator=own, device=device) for _ in range(3))
        self.tensors = {
            dtype: (query.to(device, dtype), key.to(device, dtype), value.to(device, dtype))
            for dtype in (torch.float32, torch.bfloat16)
        }
        side = math.floor(shape.tokens ** (1 / 3) + 1e-9)
        grid = TokenGrid(shape.tokens // side**2, side, side, shape.tokens % side**2)
        names = [AXIS_ORDERS[head % len(AXIS_ORDERS)] for head in range(shape.heads)]
        self.order = torch.stack([token_order(name, grid) for name in names])

    def work(self, contender: Contender, times: Sequence[float]) -> dict[str, float | None]:
        """Arithmetic per second of a contender, and the roofline of a GPU for it."""
        tokens, heads, head_dim = self.shape.tokens, self.shape.heads, self.shape.head_dim
        scores = contender.density * self.shape.batch * heads * tokens**2
        tflops = 4e-12 * scores * head_dim / statistics.median(times)
        parsed = Precision() if contender.precision == "fp32" else Precision.parse(contender.precision)
        return {"tflops": tflops, **gpu_rooflines(parsed, scores, head_dim, self.device)}

    def dense_contenders(self) -> list[Contender]:
        """Dense attention of others."""
        if self.device.type == "cpu":
            return [
                Contender("sdpa", name, 1.0, None, _untimed(sdpa(None, *self.tensors[dtype])))
                for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
            ]
        return self._peers([peer for peer in GPU_PEERS if not peer.blocks], 1.0, None)

    def sparse_peers(self, density: float, mask: Tensor, with_flex: bool) -> list[Contender]:
        """Attention of others with the same mask, which takes more than one block of queries to be one."""
        if self.device.type == "cpu":
            if not with_flex or self.blocks != (BLOCK, BLOCK):
                return []
            call = flex_attention(*self.tensors[torch.float32], mask, self.blocks)
            return [Contender("flex", "fp32", density, None, _untimed(call))]
        chosen = [peer for peer in GPU_PEERS if peer.takes(self.blocks) and (with_flex or peer.method != "flex")]
        return self._peers(chosen, density, mask.to(self.device))

    def _peers(self, peers: Sequence[Peer], density: float, mask: Tensor | None) -> list[Contender]:
        """The peers that are installed and take these inputs, each with its error."""
        found = []
        tensors = self.tensors[torch.bfloat16]
        for peer in peers:
            call = peer.call(*tensors, mask, self.blocks)
            if call is not None:
                error = self._error(call(), tensors, mask, self.blocks)
                found.append(Contender(peer.method, peer.precision, density, None, _untimed(call), error=error))
        return found

    def mask(self, density: float, unequal: bool) -> Tensor:
        """Bool [H, rows, columns] with the diagonal and, beside it, blocks at random."""
        heads, (block_q, block_kv) = self.shape.heads, self.blocks
        rows, columns = (block_count(self.shape.tokens, block) for block in self.blocks)
        score = torch.rand(heads, rows, columns, generator=self.generator)
        score[:, torch.arange(rows), torch.arange(rows) * block_q // block_kv] = 2
        mask = torch.zeros(heads, rows * columns, dtype=torch.bool)
        for head in range(heads):
            share = density * (0.5 + head / (heads - 1)) if unequal and heads > 1 else density
            kept = min(max(round(share * rows * columns), rows), rows * columns)
            mask[head, score[head].flatten().topk(kept).indices] = True
        return mask.view(heads, rows, columns)

    def operators(
        self, precision: Precision, density: float, mask: Tensor, backend: str, *, compensate: bool
    ) -> list[Contender]:
        """The prepared operator, checked against float64, and where the kernel tells its parts, without prologue."""
        on_gpu = self.device.type == "cuda"
        dtype = torch.bfloat16 if str(precision) == "bf16" or on_gpu else torch.float32
        whole = bool(mask.all())
        heads, tokens, block_q = self.shape.heads, self.shape.tokens, self.blocks[0]
        mask = refined(mask, self.blocks, (block_q, BLOCK), tokens)
        plan = LayerPlan(
            precisions=(precision,) * heads,
            orders=self.order,
            mask_table=None if whole else pack_bits(mask),
            mask_index=None if whole else torch.arange(heads, dtype=torch.int32).unsqueeze(0),
            compensate=torch.ones(1, heads, dtype=torch.bool) if compensate else None,
            tokens=tokens,
            block_q=block_q,
        )
        op = prepare(plan, device=self.device, dtype=dtype, tensor_layout="HND", backend=backend)
        tensors, bucket = self.tensors[dtype], torch.tensor(0, device=self.device)
        error = self._error(op(*tensors, bucket=bucket), tensors, mask, (block_q, BLOCK), self.order, compensate)
        limits = _GPU_ERROR_LIMITS if on_gpu else _ERROR_LIMITS
        limit = max(limits[precision.qk], limits[precision.pv])
        if not error <= limit:
            raise ArithmeticError(
                f"{precision} at density {density:g} is {error:.2g} from float64; expected at most {limit:g}"
            )
        chosen = choose_backend(backend, kind_of_calls(plan, self.device, dtype))

        def contender(prologue: bool, call: Callable[[], float]) -> Contender:
            return Contender(
                "paroattn",
                str(precision),
                density,
                prologue,
                call,
                compensate,
                error,
                chosen.describe(),
                profile=on_gpu and chosen is gpu,
            )

        found = [contender(True, _untimed(op, *tensors, bucket=bucket))]
        if chosen is cpu:
            block_mask = None if whole else BlockMask.from_dense(mask, tokens, block_q)
            scale = self.shape.head_dim**-0.5
            flags = None if plan.compensate is None else plan.compensate[0]
            inputs = AttentionInputs(*tensors, self.order, block_mask, plan.precisions, flags, None, scale)
            output, lse = torch.empty_like(tensors[0]), torch.empty(self.shape.batch, heads, tokens)

            def without_prologue() -> float:
                _, prologue_seconds = cpu.run_kernel(output, lse, inputs)
                return prologue_seconds

            found.append(contender(False, without_prologue))
        return found

    def _error(
        self,
        output: Tensor,
        tensors: Sequence[Tensor],
        mask: Tensor | None,
        blocks: Blocks,
        orders: Tensor | None = None,
        compensate: bool = False,
    ) -> float:
        """Relative L2 error of a quarter of the rows of blocks, at most 8 per head, against float64."""
        tokens, (block_q, block_kv) = self.shape.tokens, blocks
        if orders is None:
            orders = torch.arange(tokens).expand(self.shape.heads, -1)
        if mask is None:
            mask = torch.ones(self.shape.heads, *(block_count(tokens, size) for size in blocks), dtype=torch.bool)
        rows = range(0, mask.shape[1], max(4, mask.shape[1] // 8))
        difference = norm = 0.0
        mask = mask.to(self.device)
        for head, order in enumerate(orders.to(self.device)):
            query, key, value = (x[0, head].double()[order] for x in tensors)
            mean_key, mean_value = (torch.stack([x.mean(0) for x in y.split(block_kv)]) for y in (key, value))
            sizes = torch.tensor([len(part) for part in order.split(block_kv)], device=self.device)
            for row in rows:
                own = slice(row * block_q, (row + 1) * block_q)
                skipped = ~mask[head, row] & compensate
                kept = mask[head, row].repeat_interleave(block_kv)[:tokens]
                keys, values = torch.cat((key[kept], mean_key[skipped])), torch.cat((value[kept], mean_value[skipped]))
                counts = torch.cat((torch.ones_like(keys[: int(kept.sum()), 0]), sizes[skipped])).double()
                logits = query[own] @ keys.T * self.shape.head_dim**-0.5 + counts.log()
                expected = logits.softmax(-1) @ values
                difference += float((output[0, head].double()[order[own]] - expected).square().sum())
                norm += float(expected.square().sum())
        return math.sqrt(difference / norm)


def _untimed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], float]:
    """A call that counts from beginning to end."""

    def call() -> float:
        function(*args, **kwargs)
        return 0.0

    return call
