"""paroattn: faster attention for visual diffusion transformers by reordering, block sparsity and low precision."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from paroattn.block_mask import BlockMask
from paroattn.errors import InputError, MissingPartError, PlanError, require
from paroattn.grid import TokenGrid
from paroattn.ops import attention, backends, prepare
from paroattn.plan import LayerPlan, Plan
from paroattn.quantize import Precision

if TYPE_CHECKING:
    from paroattn.calibration.calibrate import calibrate
    from paroattn.calibration.paper import calibrate_paper
    from paroattn.integrations.apply import apply
    from paroattn.integrations.observe import observe

__version__ = version("paroattn")

__all__ = [
    "BlockMask",
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
    "observe",
    "prepare",
]

_NEED_DIFFUSERS = {
    "apply": "paroattn.integrations.apply",
    "calibrate": "paroattn.calibration.calibrate",
    "calibrate_paper": "paroattn.calibration.paper",
    "observe": "paroattn.integrations.observe",
}


def __getattr__(name: str) -> Any:
    """Import on first use what brings diffusers, which the operator alone does not need."""
    if name not in _NEED_DIFFUSERS:
        raise AttributeError(f"module 'paroattn' has no attribute {name!r}")
    require("paroattn[diffusers]", "diffusers")
    return getattr(import_module(_NEED_DIFFUSERS[name]), name)
