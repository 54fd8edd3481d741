"""What requests tell of a pipeline's attention, and the plan that it makes: no other generation is needed.

Token orders are compared in an early step of each transformer of the first request. Costs of blocks are measured in one
step of each step bucket: of later ones in the first request, of all in the next. What errors do to the final result is
not measured: that of a step is taken from models that were, that of a head from what its layer's output projection
makes of it (docs/fidelity.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version

import torch
from torch import Tensor

from paroattn.block_mask import usual_block_q
from paroattn.calibration.budget import select_by_cost
from paroattn.calibration.calibrate import bucket_edges_by_change
from paroattn.calibration.capture import BlockCosts, OrderErrors
from paroattn.calibration.checkpoint import Checkpoint
from paroattn.calibration.cost_statistics import CostStatistics
from paroattn.calibration.run import QUICK, calibration_kernels, usage_of
from paroattn.grid import TokenGrid
from paroattn.integrations.observe import ObservedCall
from paroattn.order import candidate_orders
from paroattn.plan import ModelIdentity, Plan, bucket_of
from paroattn.quantize import Precision

_ORDER_SHARE = 0.25  # of the steps, in the last of which orders are compared: the later, the better they are chosen
_MOST_BUCKETS = 10
_PROBES = 64  # random inputs of an output projection
_EARLY_WEIGHT, _EARLY_LEVEL, _EARLY_WIDTH = 2.5, 0.9, 0.02  # see `early_weights`


class Observation:
    """Statistics of generations with one schedule, the first of which runs with the model's own attention.

    Args:
        model, grid: of the pipeline.
        schedule: noise level of each step, descending.
        memory_gb: as in `paroattn.calibrate`.
        projections: of the outputs of each layer's heads, None for layers that have none of their own.

    Attributes:
        requests: whose calls were taken, the present one included.

    Raises:
        InputError: statistics that fit neither in memory nor on the disk.
    """

    def __init__(
        self,
        model: ModelIdentity,
        grid: TokenGrid,
        schedule: tuple[float, ...],
        memory_gb: float,
        projections: Sequence[Callable[[Tensor], Tensor] | None],
    ):
        self._model, self.grid, self.schedule, self._projections = model, grid, schedule, projections
        steps = len(schedule)
        self._edges = bucket_edges_by_change([1.0] * (steps - 1), _MOST_BUCKETS)
        self._buckets = [bucket_of(self._edges, step, steps) for step in range(steps)]
        self._order_step = max(1, round(_ORDER_SHARE * steps)) - 1
        self._names = candidate_orders(grid)
        self._block_q = usual_block_q(grid.tokens)
        shape = (model.layers, model.heads)
        self._orders = OrderErrors(
            *shape, grid, self._names, self._block_q, QUICK.order_rows, 0, QUICK.order_levels, calibration_kernels
        )
        self._index = torch.zeros(shape, dtype=torch.uint8)
        self._costs = BlockCosts(
            len(self._edges), self._names, self._index, grid, self._block_q, row_share=QUICK.cost_rows,
            error_share=QUICK.error_rows, in_bytes=True, kernels_for=calibration_kernels,
            new_zeros=lambda shape, dtype: Checkpoint().zeros(shape, dtype, memory_gb * 1e9),
        )  # fmt: skip
        self._calls: dict[int, set[int]] = {}  # steps of the first request in which each layer was called
        self._seen: set[tuple[int, int]] = set()  # (step, layer) of this request
        self._new: set[tuple[int, int]] = set()  # (bucket, layer) that were measured in this request
        self._measured: set[tuple[int, int]] = set()  # in this one or an earlier one
        self.requests = 1
        self._head_weights: dict[int, Tensor] = {}  # of each layer that has a projection

    def next_request(self) -> None:
        """The calls that follow belong to another generation with the same schedule."""
        self.requests += 1
        self._seen, self._new = set(), set()

    def add(self, call: ObservedCall) -> None:
        """Take one attention call; of each step and layer of a request the first one counts."""
        if (call.step, call.layer) in self._seen:
            return
        self._seen.add((call.step, call.layer))
        call, is_first = call.first(1), self.requests == 1
        steps = self._calls.setdefault(call.layer, set())
        if is_first:
            steps.add(call.step)
        since = call.step - min(steps, default=call.step)  # a second transformer begins later
        if is_first and since == self._order_step:
            if len(self._names) > 1:
                self._orders.add(call)
            self._index[call.layer] = self._orders.choose()[call.layer]
            self._costs.use_orders(call.layer, [self._names[number] for number in self._index[call.layer].tolist()])
            projection = self._projections[call.layer]
            if projection is not None:
                self._head_weights[call.layer] = head_weights(projection, call.query[0, 0])
        bucket = self._buckets[call.step]
        middle = self._buckets.index(bucket) + (self._buckets.count(bucket) - 1) // 2
        place = bucket, call.layer
        if (not is_first or since >= self._order_step) and call.step >= middle and place not in self._new:
            self._new.add(place)
            if place not in self._measured:
                self._costs.clear(*place)  # of what `_fill` put there
                self._measured.add(place)
            self._costs.add(bucket, call)

    @property
    def is_of_use(self) -> bool:
        """Whether the last request told anything."""
        return bool(self._new)

    def plan(self, density: float, precision: Precision, device: torch.device) -> Plan:
        """The plan of a density; blocks are chosen on `device`."""
        return select_by_cost(self.statistics(), density=density, precision=precision, device=device)

    def statistics(self) -> CostStatistics:
        """What plans are selected from."""
        self._fill()
        found = self._costs.means()
        used, index = torch.unique(self._index, return_inverse=True)
        measured = {layer for _, layer in self._measured}
        called = [(step, layer) for layer, steps in self._calls.items() if layer in measured for step in steps]
        levels = torch.tensor(self.schedule, dtype=torch.float64)
        of_bucket = torch.tensor(self._buckets)
        mean_level = torch.stack([levels[of_bucket == bucket].mean() for bucket in range(len(self._edges))])
        known = list(self._head_weights.values())
        usual = torch.stack(known).mean() if known else torch.tensor(1.0, dtype=torch.float64)
        of_heads = torch.stack(
            [self._head_weights.get(layer, usual.expand(self._model.heads)) for layer in range(self._model.layers)]
        )
        return CostStatistics(
            model=self._model,
            grid=self.grid,
            order_names=tuple(self._names[number] for number in used.tolist()),
            order_index=index.to(torch.uint8),
            schedule=self.schedule,
            bucket_edges=self._edges,
            block_q=self._block_q,
            **found,
            weights=early_weights(mean_level).view(-1, 1, 1) * of_heads,
            int4_effects=torch.zeros(self._index.shape, dtype=torch.float64),
            usage=usage_of(called, self._edges, len(self.schedule), self._model.layers),
            provenance={
                "paroattn": version("paroattn"),
                "method": "paroattn, beside requests",
                "num_inference_steps": len(self.schedule),
                "requests": self.requests,
            },
        )

    def _fill(self) -> None:
        """Layers that were called in a bucket before they could be measured there take what the nearest one has."""
        for layer in self._calls:
            measured = [bucket for bucket, own in self._measured if own == layer]
            for bucket in range(len(self._edges)) if measured else ():
                if bucket not in measured:
                    self._costs.copy(min(measured, key=lambda own: (abs(own - bucket), own)), bucket, layer)


@torch.no_grad()
def head_weights(projection: Callable[[Tensor], Tensor], heads: Tensor) -> Tensor:
    """What an output projection makes of the squared error of each head's output, on average over its directions.

    The module is called, so that whatever it is made of counts: adapters, quantised weights.

    Args:
        projection: takes [..., H * D].
        heads: a token's heads [H, D], for their shape, dtype and device.

    Returns:
        float64 [H]: the squared Frobenius norm of each head's part, up to a factor, measured on random inputs.

    Example:
        >>> head_weights(lambda x: x * torch.tensor([1.0, 1.0, 2.0, 2.0]), torch.zeros(2, 2)).round(decimals=3)
        tensor([2.1640, 8.6560], dtype=torch.float64)
    """
    count, width = heads.shape
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(_PROBES, 1, width, generator=generator)
    inputs = (torch.eye(count).unsqueeze(-1).unsqueeze(1) * drawn).flatten(2)  # [H, probes, H * D]
    moved = projection(inputs.to(heads)) - projection(torch.zeros_like(inputs[:1, :1]).to(heads))  # without its bias
    return moved.double().square().sum(-1).mean(1).cpu()


def early_weights(level: Tensor) -> Tensor:
    """How much an error at a noise level is taken to count for the final result, relative to one in late steps.

    Example:
        >>> early_weights(torch.tensor([1.0, 0.9, 0.5]))
        tensor([12.0821,  3.4903,  1.0000])
    """
    return (_EARLY_WEIGHT * ((level - _EARLY_LEVEL) / _EARLY_WIDTH).sigmoid()).exp()
