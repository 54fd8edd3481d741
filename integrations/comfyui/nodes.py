"""The nodes, in ComfyUI's V3 schema. They only hand their inputs on."""

from __future__ import annotations

import os
from typing import Any

from comfy_api.latest import ComfyExtension, io, ui

from paroattn import InputError

from . import plans
from .adapter import apply_plan, plan_on
from .checks import OTHER_SIZES, PARTS

CATEGORY = "model_patches/paroattn"
PlanType = io.Custom("PARO_PLAN")


class LoadParoPlan(io.ComfyNode):
    """A plan file of the models folder `paroattn_plans`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="LoadParoPlan",
            display_name="Load PARO plan",
            category=CATEGORY,
            description="A plan made with `paroattn calibrate`, from models/paroattn_plans.",
            inputs=[io.Combo.Input("plan", options=plans.plan_names())],
            outputs=[PlanType.Output(display_name="plan"), io.String.Output(display_name="about")],
        )

    @classmethod
    def fingerprint_inputs(cls, plan: str) -> float:
        """A file that was replaced is read again."""
        return os.path.getmtime(plans.path_of(plan))

    @classmethod
    def execute(cls, plan: str) -> io.NodeOutput:
        """Read and validate the file."""
        loaded = plans.load(plan)
        return io.NodeOutput(loaded, plans.describe(loaded))


class ApplyParoPlan(io.ComfyNode):
    """A model whose self-attention runs as a plan says."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        share: dict[str, Any] = {"min": 0.0, "max": 1.0, "step": 0.01}
        return io.Schema(
            node_id="ApplyParoPlan",
            display_name="Apply PARO plan",
            category=CATEGORY,
            description="Runs the model's self-attention as a plan says: reordered, block-sparse, in low precision.",
            inputs=[
                io.Model.Input("model"),
                PlanType.Input("plan"),
                io.Combo.Input(
                    "part",
                    options=list(PARTS),
                    default=PARTS[0],
                    tooltip="Wan 2.2 has two models in one plan: the one that samples first is the high noise part.",
                ),
                io.Float.Input(
                    "start", default=0.0, tooltip="Share of the schedule from which on the plan is used.", **share
                ),
                io.Float.Input(
                    "end", default=1.0, tooltip="Share of the schedule up to which the plan is used.", **share
                ),
                io.Combo.Input(
                    "other_sizes",
                    options=list(OTHER_SIZES),
                    default=OTHER_SIZES[0],
                    tooltip="Other sizes than the plan's: the model's own attention, an adapted plan, or an error.",
                ),
                io.Boolean.Input(
                    "repair",
                    default=False,
                    tooltip="Closer to the model's own attention by 64 exact rows of a call.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls, model: Any, plan: Any, part: str, start: float, end: float, other_sizes: str, repair: bool = False
    ) -> io.NodeOutput:
        """Clone the model and put the plan on the clone."""
        settings: dict[str, Any] = {
            "part": part,
            "start": start,
            "end": end,
            "other_sizes": other_sizes,
            "repair": repair,
        }
        return io.NodeOutput(apply_plan(model, plan, **settings))


class ParoReport(io.ComfyNode):
    """What ran sparse and what dense, and why; the latent passes through, so that this comes after the sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ParoReport",
            display_name="PARO report",
            category=CATEGORY,
            description="How many attention calls ran as planned since the last report, and why the others did not.",
            inputs=[io.Model.Input("model"), io.Latent.Input("samples")],
            outputs=[io.Latent.Output(display_name="samples"), io.String.Output(display_name="report")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, samples: Any) -> io.NodeOutput:
        """Hand the latent on, and the report."""
        applied = plan_on(model)
        if applied is None:
            raise InputError("model has no plan; connect the output of 'Apply PARO plan'")
        text = str(applied.report())
        return io.NodeOutput(samples, text, ui=ui.PreviewText(text))


class ParoExtension(ComfyExtension):
    """The pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes."""
        return NODES


NODES: list[type[io.ComfyNode]] = [LoadParoPlan, ApplyParoPlan, ParoReport]
