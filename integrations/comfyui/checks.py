"""Whether a plan, a part of it and a model belong together; checked when the node runs, before anything is sampled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from paroattn import InputError, Plan, PlanError
from paroattn.grid import TokenGrid

from .models import Family

PARTS = ("whole", "high noise", "low noise")
"""Which layers of the plan a model has: all, or those of the first or the second transformer of two (Wan 2.2)."""
OTHER_SIZES = ("dense", "adapt", "error")
"""What other sizes than the plan's get: the model's own attention, an adapted plan, an error."""


def check_choices(part: str, start: float, end: float, other_sizes: str) -> None:
    """Raise `InputError` for inputs that a workflow edited by hand can hold."""
    for name, value, known in (("part", part, PARTS), ("other_sizes", other_sizes, OTHER_SIZES)):
        if value not in known:
            raise InputError(f"{name} is {value!r}; expected one of {', '.join(known)}")
    if not 0 <= start < end <= 1:
        raise InputError(f"start is {start} and end {end}; expected 0 <= start < end <= 1")


def layers_for(plan: Plan, part: str, model: Any, family: Family) -> range:
    """The plan's layers that a diffusion model has.

    Raises:
        PlanError: a plan for another model or part; the message says what is compared. Its `config_hash` is not: it
            is of diffusers' config, which ComfyUI does not have.
    """
    name, layers = type(model).__name__, len(family.block_names(model))
    heads, width = family.heads(model), family.width(model)
    planned = plan.model
    if planned.class_name not in family.plan_classes:
        raise PlanError(
            f"plan is for {planned.class_name}, the model is a {name} of ComfyUI; expected a plan for "
            f"{' or '.join(family.plan_classes)}. Load that model's plan."
        )
    for what, expected, found in (
        ("heads", planned.heads, heads),
        ("channels per head", planned.head_dim, width // heads),
    ):
        if expected != found:
            raise PlanError(f"plan is for {expected} {what}, this {name} has {found}. Load a plan for this model size.")
    if plan.grid.references:
        raise PlanError(
            f"plan is for {plan.grid.name}, with images to refer to; in ComfyUI they stay dense. Load a plan without."
        )
    return _layers_of(planned.layers, part, layers)


def _layers_of(planned: int, part: str, layers: int) -> range:
    if part == "whole" and planned == 2 * layers:
        raise PlanError(
            f"plan has {planned} layers, those of two models of {layers} as of Wan 2.2; part is 'whole'. Choose "
            "'high noise' for the model that samples first, 'low noise' for the other."
        )
    expected = planned if part == "whole" else planned // 2
    if expected != layers or (part != "whole" and planned % 2):
        of = "" if part == "whole" else f", half of them for part {part!r}"
        raise PlanError(
            f"plan has {planned} layers{of}; this model has {layers}. Load a plan for this model"
            + (", or choose part 'whole'." if planned == layers else ".")
        )
    return range(planned - layers, planned) if part == "low noise" else range(layers)


def with_text_side(plan: Plan, model: Any, family: Family) -> Plan:
    """The plan with its text tokens where the model has them.

    Orders put visual tokens first and text last, wherever the model has it, so that masks stay as they are.

    Raises:
        PlanError: text tokens in the plan and none in the model, or the other way round.
    """
    side, grid = family.text(model), plan.grid
    if (side is None) != (grid.text_tokens == 0):
        found = f"has {grid.text_tokens:,} text tokens" if grid.text_tokens else "has no text tokens"
        wanted = "none" if side is None else "some"
        raise PlanError(
            f"plan {found} in self-attention; a {type(model).__name__} has {wanted}. Load a plan for this model."
        )
    if side is None or side == grid.text_position:
        return plan
    return replace(plan, grid=replace(grid, text_position=side))


def at_size(plan: Plan, grid: TokenGrid) -> TokenGrid:
    """The grid of the plan that serves requests of a grid: their boxes, and the plan's own number of text tokens."""
    return replace(grid, text_tokens=plan.grid.text_tokens, text_position=plan.grid.text_position)
