"""paroattn: faster attention for visual diffusion transformers by reordering, block sparsity and low precision."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paroattn.block_mask import BlockMask
    from paroattn.calibration.budget import select_by_cost
    from paroattn.calibration.calibrate import calibrate
    from paroattn.calibration.cost_statistics import CostStatistics
    from paroattn.calibration.paper import calibrate_paper
    from paroattn.calibration.self_calibrating import apply
    from paroattn.errors import InputError, MissingPartError, PlanError
    from paroattn.grid import TokenGrid
    from paroattn.integrations.linear import quantize_linears
    from paroattn.integrations.observe import observe
    from paroattn.integrations.parallel import cp_plan
    from paroattn.ops.attention import attention
    from paroattn.ops.backend import backends
    from paroattn.ops.prepared import prepare
    from paroattn.plan import LayerPlan, Plan
    from paroattn.quantize import Precision

__version__ = version("paroattn")

__all__ = [
    "BlockMask",
    "CostStatistics",
    "InputError",
    "LayerPlan",
    "MissingPartError",
    "Plan",
    "PlanError",
    "Precision",
    "TokenGrid",
    "apply",
    "attention",
    "backends",
    "calibrate",
    "calibrate_paper",
    "cp_plan",
    "identify",
    "observe",
    "prepare",
    "quantize_linears",
    "select_by_cost",
]

_NEED_TORCH = {
    "BlockMask": "paroattn.block_mask",
    "CostStatistics": "paroattn.calibration.cost_statistics",
    "InputError": "paroattn.errors",
    "LayerPlan": "paroattn.plan",
    "MissingPartError": "paroattn.errors",
    "Plan": "paroattn.plan",
    "PlanError": "paroattn.errors",
    "Precision": "paroattn.quantize",
    "TokenGrid": "paroattn.grid",
    "attention": "paroattn.ops",
    "backends": "paroattn.ops",
    "prepare": "paroattn.ops",
    "select_by_cost": "paroattn.calibration.budget",
}
_NEED_DIFFUSERS = {
    "apply": "paroattn.calibration.self_calibrating",
    "calibrate": "paroattn.calibration.calibrate",
    "calibrate_paper": "paroattn.calibration.paper",
    "cp_plan": "paroattn.integrations.parallel",
    "identify": "paroattn.integrations.pipeline",
    "observe": "paroattn.integrations.observe",
    "quantize_linears": "paroattn.integrations.linear",
}


def __getattr__(name: str) -> Any:
    """Import on first use: torch takes seconds, and the operator alone does not need diffusers."""
    module = _NEED_TORCH.get(name)
    if module is None:
        if name not in _NEED_DIFFUSERS:
            raise AttributeError(f"module 'paroattn' has no attribute {name!r}")
        from paroattn.errors import require

        require("paroattn[diffusers]", "diffusers")
        module = _NEED_DIFFUSERS[name]
    globals()[name] = getattr(import_module(module), name)
    return globals()[name]
