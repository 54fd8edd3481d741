"""What computes a head's statistics: the functions of this package, or a backend's that do the same faster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from paroattn.calibration.skip_cost import SkipCosts, skip_costs
from paroattn.calibration.statistics import block_sums


@dataclass(frozen=True)
class Kernels:
    """Functions that take heads on one kind of device; results are on the CPU.

    Attributes:
        skip_costs: as `calibration.skip_cost.skip_costs`.
        block_sums: as `calibration.statistics.block_sums`.
    """

    skip_costs: Callable[..., SkipCosts]
    block_sums: Callable[..., Tensor]


REFERENCE = Kernels(skip_costs, block_sums)

KernelsFor = Callable[[torch.device], Kernels]


def reference_everywhere(device: torch.device) -> Kernels:
    """A `KernelsFor` without any backend."""
    return REFERENCE
