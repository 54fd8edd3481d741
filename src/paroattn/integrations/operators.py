"""A plan's operators, made for the devices and dtypes that a model brings, and the masks of the current step there.

A large model's masks of all steps take hundreds of megabytes of GPU memory. On a GPU only those of the current step are
kept, in buffers whose addresses never change, so that captured graphs read them; the next step's wait beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from paroattn.errors import InputError
from paroattn.integrations.observe import ObservedCall
from paroattn.integrations.rebind import AttentionCall
from paroattn.ops import PreparedAttention
from paroattn.ops.backend import choose_backend
from paroattn.ops.inputs import CallKind
from paroattn.ops.prepared import choose_for_layer
from paroattn.plan import LayerPlan, Plan


class Operators:
    """The operators of all layers.

    Args:
        plan: the plan, or None with `layers` that serve any number of tokens.
        layers: the parts of layers where there is no plan.
        backend: "auto" or a backend's name.

    Raises:
        InputError: an unknown backend, or a precision it does not have.
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
            choose_backend(backend, CallKind(plan.precisions, block_shape=(plan.block_q, plan.block_kv)))

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

    operator: PreparedAttention
    bucket: Tensor

    def fits(self, query: Tensor, scale: float | None) -> bool:
        """Whether it was made for queries like this one."""
        return (
            query.dtype == self.operator.dtype and query.device == self.operator.device and scale == self.operator.scale
        )

    def run(self, call: AttentionCall | ObservedCall) -> Tensor:
        """The output of a call, [B, N, H, D]."""
        return self.operator(call.query, call.key, call.value, bucket=self.bucket, key_mask=call.key_mask)


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

    def __call__(self, call: AttentionCall) -> Tensor:
        if self._request.stays_dense or not call.attends_to_itself:
            return call.dense()
        query, scale = call.query, call.scale
        ready = self._ready
        if ready is None or not ready.fits(query, scale):
            if torch.compiler.is_compiling():
                raise InputError(
                    f"paroattn has no operator for {query.dtype} on {query.device} in compiled code; apply it after "
                    "torch.compile(pipe.transformer), or compile with pipe.transformer.compile_repeated_blocks()"
                )
            ready = self._ready = self._operators.ready(self._layer, query.device, query.dtype, scale)
        return ready.run(call)


@dataclass
class Request:
    """What is known of the forward call in progress."""

    stays_dense: bool = False


class MaskStream:
    """The masks of all layers of a plan at the current step bucket.

    Args:
        plan: the plan.
        device: where the masks are needed.

    Attributes:
        current: uint8 [layers, heads, q blocks, bytes] on the device, changed in place by `show`.
    """

    def __init__(self, plan: Plan, device: torch.device):
        on_gpu = device.type == "cuda"
        self._table = plan.mask_table
        self._index = plan.mask_index.long()  # [step buckets, layers, heads]
        shape = (*self._index.shape[1:], *self._table.shape[1:])
        self._host = torch.empty(shape, dtype=torch.uint8, pin_memory=on_gpu)
        self._next = torch.empty(shape, dtype=torch.uint8, device=device)
        self.current = torch.empty_like(self._next)
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._waiting: int | None = None  # the bucket in `_next`
        self._shown: int | None = None

    def show(self, bucket: int) -> None:
        """Make a bucket's masks current, for what is enqueued from now on, and fetch those of the bucket after it."""
        if bucket == self._shown:
            return
        if bucket != self._waiting:
            self._fetch(bucket)
        if self._stream is not None:
            torch.cuda.current_stream(self.current.device).wait_stream(self._stream)
        self.current.copy_(self._next)
        self._shown = bucket
        self._fetch((bucket + 1) % len(self._index))

    def _fetch(self, bucket: int) -> None:
        self._waiting = bucket
        if self._stream is None:
            self._gather(bucket)
            self._next.copy_(self._host)
            return
        self._stream.synchronize()  # the copy before this one has read `_host`; it was started a step ago
        self._gather(bucket)
        self._stream.wait_stream(torch.cuda.current_stream(self.current.device))  # `_next` has become current
        with torch.cuda.stream(self._stream):
            self._next.copy_(self._host, non_blocking=True)

    def _gather(self, bucket: int) -> None:
        masks: Tensor = self._index[bucket].flatten()
        torch.index_select(self._table, 0, masks, out=self._host.view(len(masks), *self._table.shape[1:]))
