"""A plan's operators, made for the devices and dtypes that a model brings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from paroattn.integrations.mask_stream import MaskStream
from paroattn.ops import PreparedAttention
from paroattn.ops.backend import choose_backend
from paroattn.ops.prepared import choose_for_layer
from paroattn.plan import LayerPlan, Plan


class Operators:
    """The operators of all layers.

    Args:
        plan: the plan, or None with `layers` that serve any number of tokens.
        layers: the parts of layers where there is no plan.
        backend: "auto" or a backend's name.

    Raises:
        ValueError: an unknown backend, or a precision it does not have.
    """

    def __init__(self, plan: Plan | None, layers: list[LayerPlan], backend: str):
        self._plan = plan
        self._layers = layers
        self._backend = backend
        self._bucket = 0
        self._places: dict[torch.device, _Place] = {}
        if plan is None:
            for layer in layers:
                choose_for_layer(backend, layer)
        else:
            choose_backend(backend, plan.precisions, block_shape=(plan.block_q, plan.block_kv))

    def show(self, bucket: int) -> None:
        """Use a step bucket's masks from now on."""
        self._bucket = bucket
        for place in self._places.values():
            place.show(bucket)

    def ready(self, layer: int, device: torch.device, dtype: torch.dtype, scale: float | None) -> ReadyOperator:
        """The operator of a layer for tensors [B, N, H, D] of a device and dtype."""
        if device not in self._places:
            self._places[device] = _place(self._plan, self._layers, device)
            self._places[device].show(self._bucket)
        return self._places[device].operator(layer, dtype, scale, self._backend)


@dataclass(frozen=True)
class ReadyOperator:
    """An operator with the step bucket that it takes, a 0-dim tensor changed in place."""

    call: PreparedAttention
    bucket: Tensor

    def fits(self, query: Tensor, scale: float | None) -> bool:
        """Whether it was made for queries like this one."""
        return query.dtype == self.call.dtype and query.device == self.call.device and scale == self.call.scale


@dataclass
class _Place:
    """The operators on one device."""

    layers: list[LayerPlan]
    bucket: Tensor
    stream: MaskStream | None
    operators: dict[tuple[int, torch.dtype, float | None], ReadyOperator] = field(default_factory=dict)

    def show(self, bucket: int) -> None:
        self.bucket.fill_(bucket)
        if self.stream is not None:
            self.stream.show(bucket)

    def operator(self, layer: int, dtype: torch.dtype, scale: float | None, backend: str) -> ReadyOperator:
        key = (layer, dtype, scale)
        if key not in self.operators:
            prepared = PreparedAttention(self.layers[layer], self.bucket.device, dtype, "NHD", scale, backend)
            self.operators[key] = ReadyOperator(prepared, self.bucket)
        return self.operators[key]


def _place(plan: Plan | None, layers: list[LayerPlan], device: torch.device) -> _Place:
    bucket = torch.zeros((), dtype=torch.int64, device=device)
    if plan is None or device.type == "cpu":
        return _Place(layers if plan is None else plan.layers(), bucket, stream=None)
    stream = MaskStream(plan, device)
    return _Place(streamed_layers(plan, stream, device), bucket, stream)


def streamed_layers(plan: Plan, stream: MaskStream, device: torch.device) -> list[LayerPlan]:
    """The plan's layers with the masks of the stream's current step."""
    without_masks = replace(plan, mask_table=plan.mask_table[:1], mask_index=torch.zeros_like(plan.mask_index))
    return [
        replace(layer, mask_table=masks, mask_index=None)
        for layer, masks in zip(without_masks.layers(device), stream.current, strict=True)
    ]


class PlannedLayer:
    """The intercept of one layer: its operator, or the model's own attention where the plan has nothing to say.

    Args:
        operators: of the plan.
        layer: its number.
        request: the forward call in progress.
    """

    def __init__(self, operators: Operators, layer: int, request: Request):
        self._operators = operators
        self._layer = layer
        self._request = request
        self._ready: ReadyOperator | None = None

    def make_ready(self, device: torch.device, dtype: torch.dtype) -> None:
        """Get the operator before a call that may be compiled, where it could not be made."""
        self._ready = self._operators.ready(self._layer, device, dtype, None)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_mask: Tensor | None,
        scale: float | None,
        dense: Callable[[], Tensor],
    ) -> Tensor:
        if self._request.stays_dense or key.shape[1] != query.shape[1]:
            return dense()
        ready = self._ready
        if ready is None or not ready.fits(query, scale):
            if torch.compiler.is_compiling():
                raise ValueError(
                    f"paroattn has no operator for {query.dtype} on {query.device} in compiled code; apply it after "
                    "torch.compile(pipe.transformer), or compile with pipe.transformer.compile_repeated_blocks()"
                )
            ready = self._ready = self._operators.ready(self._layer, query.device, query.dtype, scale)
        return ready.call(query, key, value, step=ready.bucket, key_mask=key_mask)


@dataclass
class Request:
    """What is known of the forward call in progress."""

    stays_dense: bool = False
