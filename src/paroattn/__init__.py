"""paroattn: faster attention for visual diffusion transformers by reordering, block sparsity and low precision."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from paroattn.block_mask import BlockMask
from paroattn.errors import PlanError
from paroattn.grid import TokenGrid
from paroattn.ops import attention, backends, prepare
from paroattn.plan import LayerPlan, Plan
from paroattn.quantize import Precision

if TYPE_CHECKING:
    from paroattn.integrations.apply import apply
    from paroattn.integrations.calibrate import calibrate

__version__ = version("paroattn")

__all__ = [
    "BlockMask",
    "LayerPlan",
    "Plan",
    "PlanError",
    "Precision",
    "TokenGrid",
    "apply",
    "attention",
    "backends",
    "calibrate",
    "prepare",
]


def __getattr__(name: str) -> Any:
    """Import `apply` and `calibrate` on first use: they bring diffusers, which the operator alone does not need."""
    if name == "apply":
        from paroattn.integrations.apply import apply

        return apply
    if name == "calibrate":
        from paroattn.integrations.calibrate import calibrate

        return calibrate
    raise AttributeError(f"module 'paroattn' has no attribute {name!r}")
