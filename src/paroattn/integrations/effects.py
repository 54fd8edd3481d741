"""What an error in one head at one step does to the final result, measured on a calibration run.

Two measurements are multiplied. Backward passes through the transformer give the squared change of its output per
squared error of a head's output: with a random cotangent r and g the gradient of r·output at the head's output,
E |g|² is the squared norm of the Jacobian, so one or two backward passes serve all heads of a model at once. Generating
with a single step bucket approximated then gives what such a change becomes at the end of the schedule.

Errors are taken to have no preferred direction. Gradients times the heads' actual errors need no such assumption, but
they are so noisy that plans made of them were worse (docs/fidelity.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from paroattn.block_mask import block_count, pack_bits
from paroattn.integrations.apply import apply
from paroattn.integrations.attach import Attachment, transformer_of
from paroattn.integrations.calibration_run import CalibrationRun, spread
from paroattn.integrations.schedule import Schedule
from paroattn.ops import PreparedAttention, prepare
from paroattn.plan import LayerPlan, Plan
from paroattn.quantize import Precision

COTANGENTS = 2  # backward passes per recorded call; each averages over all elements of a head's output
PROPAGATION_RUNS = 8  # step buckets that are approximated alone; the others are interpolated


@dataclass(frozen=True, eq=False)
class Effects:
    """Squared changes of the final latents.

    Attributes:
        weights: per unit of squared error of the head's output in one step, float64 [buckets, layers, heads].
        int4: when a head is computed in INT4 at every step, [layers, heads].
    """

    weights: Tensor
    int4: Tensor


def measure_effects(run: CalibrationRun, draft: Plan, errors: Tensor, *, seed: int = 0, int4: bool = False) -> Effects:
    """Effects of the heads of a pipeline on its first calibration prompt.

    Args:
        run: has generated before, so that its grid is known.
        draft: how steps are approximated to see what it does.
        errors: squared error of the heads' outputs under the draft, [buckets, layers, heads].
        seed: of the random cotangents.
        int4: also measure INT4 (zeros otherwise).
    """
    steps_of: list[list[int]] = [[] for _ in range(draft.buckets)]
    for step in range(run.num_steps):
        steps_of[draft.bucket_of(step, run.num_steps)].append(step)
    steps = [own[len(own) // 2] for own in steps_of]
    counts = [len(own) for own in steps_of]
    reference, inputs = _generate_recording(run, steps)
    generator = torch.Generator().manual_seed(seed)
    found, rounding = [], []
    with run.bar(draft.buckets, "calibration 3/4, effect of heads", "step") as bar:
        for bucket in range(draft.buckets):
            probe = _HeadProbe(run.pipe, draft, bucket, int4)
            measured = [probe.measure(arguments, generator) for arguments in inputs[steps[bucket]]]
            sensitivity, rounded = (torch.stack(parts).mean(0) for parts in zip(*measured, strict=True))
            found.append(sensitivity)
            rounding.append(rounded)
            bar.update()
    sensitivities = torch.stack(found)
    gains = _propagation(run, draft, reference, (sensitivities * errors).sum((1, 2)), counts)
    weights = sensitivities * gains.view(-1, 1, 1)
    steps_per_bucket = torch.tensor(counts, dtype=torch.float64).view(-1, 1, 1)
    return Effects(weights, int4=(torch.stack(rounding) * weights * steps_per_bucket).sum(0))


def _generate_recording(run: CalibrationRun, steps: Sequence[int]) -> tuple[Tensor, dict[int, list[dict[str, Any]]]]:
    """Final latents of the first prompt, and the transformer's arguments at some steps (two calls under guidance)."""
    transformer = transformer_of(run.pipe)
    inputs: dict[int, list[dict[str, Any]]] = {step: [] for step in steps}
    schedule = Schedule(run.pipe.scheduler, lambda _: None)

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if schedule.step in inputs:
            inputs[schedule.step].append({"args": args, "kwargs": kwargs})

    hook = transformer.register_forward_pre_hook(record, with_kwargs=True)
    try:
        return run.generate_one(0), inputs
    finally:
        hook.remove()
        schedule.remove()


class _HeadProbe:
    """Backward passes through the transformer at one step bucket."""

    def __init__(self, pipe: Any, draft: Plan, bucket: int, int4: bool):
        self._pipe = pipe
        self._bucket = bucket
        self._layers = [draft.layer(index) for index in range(draft.model.layers)]
        self._int4 = int4

    def measure(self, arguments: Mapping[str, Any], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """For one recorded call: squared change of the model's output per squared error of a head's output, and the
        squared error of a head in INT4 (zero if not asked for); each [layers, heads] float64.
        """
        transformer = transformer_of(self._pipe)
        touched: list[Tensor] = []  # zeros added to each layer's attention, whose gradient is wanted
        rounding: list[Tensor] = []

        def intercept(layer_plan: LayerPlan) -> Any:
            def attend(
                query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dense: Callable[[], Tensor]
            ) -> Tensor:
                output = dense()
                if self._int4:
                    rounding.append(self._int4_error(layer_plan, (query, key, value), scale))
                touched.append(torch.zeros_like(output, requires_grad=True))
                return output + touched[-1]

            return attend

        attachment = Attachment(
            self._pipe, [intercept(layer) for layer in self._layers], lambda grid: None, lambda schedule: None
        )
        try:
            with _without_weight_gradients(transformer), torch.enable_grad():
                output = transformer(*arguments["args"], **arguments["kwargs"])[0]
                totals = torch.zeros(len(touched), touched[0].shape[2], dtype=torch.float64)
                for number in range(COTANGENTS):
                    cotangent = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
                    gradients = torch.autograd.grad(output, touched, cotangent, retain_graph=number < COTANGENTS - 1)
                    for layer, gradient in enumerate(gradients):
                        totals[layer] += gradient.double().square().sum((0, 1, 3)).cpu()
        finally:
            attachment.remove()
        batch, tokens, _, head_dim = touched[0].shape
        return totals / (COTANGENTS * batch * tokens * head_dim), torch.stack(rounding) if rounding else 0 * totals

    @torch.no_grad()
    def _int4_error(self, layer_plan: LayerPlan, tensors: tuple[Tensor, ...], scale: float | None) -> Tensor:
        """Squared difference of INT4 to the plan's own precision, per sample, float64 [heads]."""
        rounded = replace(layer_plan, precisions=(Precision("int4", "int4"),) * layer_plan.heads)
        exact, in_int4 = (self._run(plan, tensors, scale) for plan in (layer_plan, rounded))
        return (in_int4 - exact).double().square().sum((0, 1, 3)).cpu() / len(exact)

    def _run(self, layer_plan: LayerPlan, tensors: tuple[Tensor, ...], scale: float | None) -> Tensor:
        query, key, value = tensors
        op: PreparedAttention = prepare(layer_plan, device=query.device, dtype=query.dtype, scale=scale)
        return op(query, key, value, step=torch.tensor(self._bucket, device=query.device))


@contextmanager
def _without_weight_gradients(module: nn.Module) -> Any:
    """Autograd then keeps nothing for the weights."""
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def _propagation(
    run: CalibrationRun, draft: Plan, reference: Tensor, output_changes: Tensor, counts: Sequence[int]
) -> Tensor:
    """Squared change of the final latents over that of the transformer's output, float64 [buckets].

    Some buckets are approximated alone, each in a generation of its own; in between, logarithms are interpolated over
    the schedule.
    """
    measured = spread(PROPAGATION_RUNS, draft.buckets)
    found = []
    with run.bar(len(measured), "calibration 4/4, propagation of steps", "run") as bar:
        for bucket in measured:
            with apply(run.pipe, _only_in(draft, bucket)):
                final = run.generate_one(0)
            change = float((final.double() - reference.double()).square().sum())
            found.append(change / max(float(output_changes[bucket]) * counts[bucket], 1e-30))
            bar.update()
    gains = torch.tensor(found, dtype=torch.float64).clamp(min=1e-30).log()
    return torch.stack([_between(measured, gains, bucket) for bucket in range(draft.buckets)]).exp()


def _between(places: Sequence[int], values: Tensor, place: int) -> Tensor:
    """Linear interpolation, constant outside."""
    right = next((number for number, own in enumerate(places) if own >= place), len(places) - 1)
    left = max(right - 1, 0) if places[right] > place else right
    if left == right or place >= places[right]:
        return values[right]
    share = (place - places[left]) / (places[right] - places[left])
    return values[left] * (1 - share) + values[right] * share


def _only_in(plan: Plan, bucket: int) -> Plan:
    """The plan with all blocks computed in every other bucket."""
    rows, columns = block_count(plan.grid.tokens, plan.block_q), block_count(plan.grid.tokens, plan.block_kv)
    everything = pack_bits(torch.ones(1, rows, columns, dtype=torch.bool))
    index = torch.full_like(plan.mask_index, len(plan.mask_table))
    index[bucket] = plan.mask_index[bucket]
    compensate = torch.zeros_like(plan.compensate)
    compensate[bucket] = plan.compensate[bucket]
    return replace(plan, mask_table=torch.cat((plan.mask_table, everything)), mask_index=index, compensate=compensate)
