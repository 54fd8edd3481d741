"""What computes heads' statistics: the functions of this package, or a backend's that do the same faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paroattn.calibration.costs import SkipCosts, skip_costs
from paroattn.calibration.statistics import block_sums


def skip_costs_of_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    orders: Sequence[Tensor],
    scale: float,
    required: Tensor,
    *,
    heads: Sequence[int] | None = None,
    **settings: Any,
) -> list[SkipCosts]:
    """`skip_costs` of several heads, each in its own order or in several.

    On a CPU one thread takes one head at a time: many small operations in a row are faster so than each of them spread
    over all threads, above all when something else runs beside them.

    Args:
        q, k, v: [H, N, D] in the model's order.
        orders: gather indices [N].
        heads: number of the head that each order is for; default: one order per head.
        scale, required, settings: as `skip_costs`.
    """
    heads = range(len(q)) if heads is None else heads

    def in_order(head: int, order: Tensor) -> SkipCosts:
        return skip_costs(q[head], k[head], v[head], order, scale, required, **settings)

    threads = torch.get_num_threads()
    if q.device.type != "cpu" or threads == 1:
        return list(map(in_order, heads, orders))
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(in_order, heads, orders))
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Kernels:
    """Functions that take heads on one kind of device.

    Attributes:
        skip_costs: as `skip_costs_of_heads`.
        block_sums: as `calibration.statistics.block_sums`.
    """

    skip_costs: Callable[..., list[SkipCosts]]
    block_sums: Callable[..., Tensor]


REFERENCE = Kernels(skip_costs_of_heads, block_sums)

KernelsFor = Callable[[torch.device], Kernels]


def reference_everywhere(device: torch.device) -> Kernels:
    """A `KernelsFor` without any backend."""
    return REFERENCE
