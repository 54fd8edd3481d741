"""How much faster a whole transformer is: one step of it with its own attention and with plans, interleaved."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from paroattn.integrations.apply import apply
from paroattn.integrations.attach import Attachment
from paroattn.integrations.clock import now
from paroattn.integrations.compiling import compile_blocks
from paroattn.integrations.descriptors import attention_modules
from paroattn.integrations.linear import quantize_linears
from paroattn.integrations.pipeline import Pipeline
from paroattn.integrations.rebind import AttentionCall
from paroattn.ops.backend import choose_backend
from paroattn.ops.prepared import kind_of_calls
from paroattn.plan import Plan
from paroattn.quantize import Precision
from paroattn_lab.records import environment
from paroattn_lab.speed.attention_share import attention_seconds
from paroattn_lab.speed.random_plan import random_plan
from paroattn_lab.speed.rounds import interleaved, median_and_spread, paired_ratio
from paroattn_lab.speed.subjects import Subject

logger = logging.getLogger(__name__)

OWN = "own attention"
_SDPA_KERNELS = {"sdpa flash": "FLASH_ATTENTION", "sdpa cudnn": "CUDNN_ATTENTION"}
# Largest relative L2 difference of a step's output with all blocks computed, to the model's own attention.
_DIFFERENCE_LIMITS = {"exact": 1e-3, "bf16": 0.05, "int8": 0.1, "int4": 0.8, "fp8": 0.1}


@dataclass(frozen=True)
class _Contender:
    """A transformer with some attention; `difference` is that of its output to the model's own."""

    method: str
    twin: Subject
    plan: Plan | None = None
    bucket: int = 0
    difference: float | None = None


def bench_model(
    subject: Subject,
    densities: Sequence[float] = (0.5, 0.3),
    precision: str | Precision = "int8",
    *,
    plan: Plan | None = None,
    backend: str = "auto",
    block_q: int = 64,
    linears: str | None = None,
    compiled: bool = False,
    rounds: int = 9,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Time one step of a transformer with its own attention and with plans, in interleaved rounds.

    On a GPU SDPA's FlashAttention and cuDNN kernels are timed, too, in place of the one that the model's own attention
    takes, where they take its inputs. Before anything is timed, a plan that computes all blocks must give the output
    that the model's own attention gives.

    Args:
        subject: what is timed.
        densities: of random plans, see `random_plan`; unused with `plan`.
        precision: of random plans.
        plan: a plan of this model; it is timed in the step bucket whose density is nearest to the plan's mean.
        backend: of the operator.
        block_q: queries per block of random plans, 64 or 128.
        linears: also time the model's own attention and each plan with linear layers in this format, "float8" or "int8"
            (`paroattn.quantize_linears`).
        compiled: compile the blocks of the transformer with torch.compile, those with plans and those without alike.
        rounds: that count; one more comes before.
        seed: of random plans.
        progress: show bars on stderr.

    Returns:
        One record per contender: what, median, spread, speed against the model's own attention and against the fastest
        dense one (medians of the rounds' ratios), share of attention (measured without compiling), environment.

    Raises:
        ValueError: a density, precision or backend that cannot be.
        PlanError: a plan of another model or size.
        ArithmeticError: an output that is not finite, or farther from the model's own than its format explains.

    Example:
        >>> records = bench_model(model_subject(load_bundled("moving-digits")), (0.3,))  # doctest: +SKIP
        >>> records[-1]["times_own"]  # doctest: +SKIP
        1.7
    """
    parsed = Precision.parse(precision)
    identity, grid = Pipeline(subject.pipe).identity, subject.grid
    plans = [plan] if plan is not None else []
    if plan is None:
        make: dict[str, Any] = {"precision": parsed, "block_q": block_q, "seed": seed}
        plans = [random_plan(identity, grid, density, **make) for density in densities]
    on_gpu = subject.device.type == "cuda"
    kernels = _SDPA_KERNELS if on_gpu else {}
    with tqdm(total=2 + 2 * (len(kernels) + len(plans)), desc="checks and profiles", disable=not progress) as bar:
        own = subject.step()
        if plan is None:
            _check(subject, own, random_plan(identity, grid, 1.0, **make), backend)
        bar.update()
        contenders = [_Contender(OWN, subject)]
        for method, kernel in kernels.items():
            contenders += _sdpa_contender(subject, own, method, kernel)
            bar.update()
        dense_count = len(contenders)
        for item in plans:
            contenders.append(_planned(subject, item, own, backend))
            bar.update()
        if linears:
            twin = subject.twin()
            name = _in_8_bits(OWN, twin, linears)
            contenders.append(_Contender(name, twin, difference=_difference(twin.step(), own)))
            contenders += [_planned(subject, item, own, backend, linears) for item in plans]
        shares = []
        for contender in contenders:
            shares.append(_share(contender))
            bar.update()
    if compiled:
        for contender in contenders:
            compile_blocks([contender.twin.transformer])
    # All of them are variants of the same code, of which torch.compile takes eight and runs others eagerly.
    variants = torch._dynamo.config.patch(recompile_limit=8 * len(contenders), fail_on_recompile_limit_hit=True)
    with variants:
        times = interleaved([_seconds(contender.twin) for contender in contenders], rounds, progress=progress)
    fastest = [min(own) for own in zip(*times[:dense_count], strict=True)]
    common = {**_subject_facts(subject), "compiled": compiled, "rounds": rounds}
    common |= environment(subject.device)
    return [
        {
            **_contender_facts(contender, backend),
            **median_and_spread(own),
            "times_own": paired_ratio(times[0], own),
            "times_dense": paired_ratio(fastest, own),
            **share,
            **common,
        }
        for contender, own, share in zip(contenders, times, shares, strict=True)
    ]


def _check(subject: Subject, own: Tensor, whole: Plan, backend: str) -> None:
    """Raise `ArithmeticError` where all blocks in some format do not give about what the model's attention gives."""
    found = _planned(subject, whole, own, backend).difference
    (precision,) = whole.precisions
    limit = max(_DIFFERENCE_LIMITS[precision.qk], _DIFFERENCE_LIMITS[precision.pv])
    if subject.transformer.dtype != torch.float32:
        limit = max(limit, _DIFFERENCE_LIMITS["bf16"])
    assert found is not None
    if not found <= limit:
        raise ArithmeticError(
            f"{precision} with all blocks is {found:.2g} from the model's own attention; expected at most {limit:g}"
        )


def _planned(subject: Subject, plan: Plan, own: Tensor, backend: str, linears: str | None = None) -> _Contender:
    bucket, twin = _typical_bucket(plan), subject.twin()
    if plan.buckets > 1:
        twin = twin.at(level_in(plan, bucket))
        own = twin.step()
    name = _in_8_bits("paroattn", twin, linears)
    apply(twin.pipe, plan, strict=True, backend=backend)
    return _Contender(name, twin, plan, bucket, _difference(twin.step(), own))


def _in_8_bits(method: str, twin: Subject, linears: str | None) -> str:
    """Quantise linear layers, if that is asked for; the method's name with it."""
    if linears is None:
        return method
    quantize_linears(twin.pipe, linears)
    return f"{method} + {linears}"


def level_in(plan: Plan, bucket: int) -> float:
    """The noise level of a step bucket's first step."""
    return next(level for level in plan.schedule if plan.bucket_of(level) == bucket)


def _typical_bucket(plan: Plan) -> int:
    """The step bucket nearest to the plan's mean density, of those in which the first transformer is called."""
    densities, mean = plan.densities().mean((1, 2)), plan.density()
    called = [bucket for bucket in range(plan.buckets) if float(plan.usage[bucket, 0])]
    return min(called, key=lambda bucket: abs(float(densities[bucket]) - mean))


def _sdpa_contender(subject: Subject, own: Tensor, method: str, kernel: str) -> list[_Contender]:
    """One, or none where the kernel does not take these inputs."""
    twin = subject.twin()
    _attach(twin, _Sdpa(kernel))
    try:
        return [_Contender(method, twin, difference=_difference(twin.step(), own))]
    except RuntimeError as error:  # a kernel that does not take a mask, a head_dim or a dtype
        if isinstance(error, torch.OutOfMemoryError):
            raise
        logger.warning("%s is left out: %s", method, str(error).partition("\n")[0])
        return []


def _attach(twin: Subject, intercept: Any) -> None:
    Attachment(twin.pipe, [intercept] * Pipeline(twin.pipe).identity.layers, lambda forward: None)


def _own(call: AttentionCall) -> Tensor:
    """An intercept that leaves a call to the model, so that profiles can name it."""
    return call.dense()


class _Sdpa:
    """An intercept that takes the model's own attention with one of SDPA's kernels."""

    def __init__(self, kernel: str):
        from torch.nn.attention import SDPBackend

        self._kernel = getattr(SDPBackend, kernel)

    def __call__(self, call: AttentionCall) -> Tensor:
        from torch.nn.attention import sdpa_kernel

        with sdpa_kernel(self._kernel):
            return call.dense()


def _difference(output: Tensor, own: Tensor) -> float:
    """Relative L2."""
    if not bool(output.isfinite().all()):
        raise ArithmeticError("the transformer's output is not finite; nothing was timed")
    return float((output.double() - own.double()).norm() / own.double().norm())


def _share(contender: _Contender) -> dict[str, float]:
    twin = contender.twin
    if contender.method.startswith(OWN):
        twin = twin.twin()
        _attach(twin, _own)
    processors = [module.processor for module in attention_modules(twin.transformer)]
    return attention_seconds(twin.step, processors, twin.device)


def _seconds(twin: Subject) -> Callable[[], float]:
    """Runs a step and returns its seconds, on a GPU from idle to idle: with the host's part, as users have it."""

    def timed() -> float:
        start = now(twin.device)
        twin.step()
        return now(twin.device) - start

    return timed


def _contender_facts(contender: _Contender, backend: str) -> dict[str, Any]:
    plan, transformer = contender.plan, contender.twin.transformer
    facts: dict[str, Any] = {
        "method": contender.method,
        "precision": "own",
        "density": 1.0,
        "visual_density": 1.0,
        "backend": None,
        "block_q": None,
        "plan": None,
        "difference": contender.difference,
    }
    if plan is None:
        return facts
    layers = len(attention_modules(transformer))
    chosen = choose_backend(backend, kind_of_calls(plan.layers()[0], transformer.device, transformer.dtype))
    return {
        **facts,
        "precision": "+".join(map(str, plan.precisions)),
        "density": float(plan.densities()[contender.bucket, :layers].mean()),
        "visual_density": float(plan.densities(visual_only=True)[contender.bucket, :layers].mean()),
        "backend": chosen.describe(),
        "block_q": plan.block_q,
        "plan": {**plan.provenance, "bucket": contender.bucket},
    }


def _subject_facts(subject: Subject) -> dict[str, Any]:
    transformer, grid = subject.transformer, subject.grid
    return {
        "kind": "model",
        "model": subject.name,
        "class": type(transformer).__name__,
        "weights": subject.weights,
        "grid": str(grid),
        "tokens": grid.tokens,
        "text_tokens": grid.text_tokens,
        "batch": len(subject.arguments["hidden_states"]),
        "layers": len(attention_modules(transformer)),
        "model_layers": subject.layers,
        "heads": transformer.config.num_attention_heads,
        "head_dim": transformer.config.attention_head_dim,
        "dtype": str(transformer.dtype).removeprefix("torch."),
        "device": subject.device.type,
    }
