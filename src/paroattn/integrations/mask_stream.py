"""The masks of one step bucket on a device, brought there a step ahead of use.

A large model's masks of all steps take hundreds of megabytes of GPU memory. There only the current step's are kept, in
buffers whose addresses never change, so that captured graphs read them; the next step's wait beside them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paroattn.plan import Plan


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
