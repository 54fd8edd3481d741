"""A model's own rotary embedding, computed by one kernel where eager PyTorch takes eight passes for each tensor.

A model has its own function, of which there are a dozen. What its arguments say is read here, and the first result is
compared with the function's: one that computes something else stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from paroattn.ops.gpu import device
from paroattn.ops.inputs import is_traced

if TYPE_CHECKING:
    from paroattn.ops.gpu.rotary import Rotation

Function = Callable[..., Tensor]

_ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-20}
_agreements: dict[Any, bool] = {}
"""Whether the kernel computes what a function does, by the function's code and how its arguments were read."""


class Reading(NamedTuple):
    """What the arguments of a model's function say.

    Attributes:
        rotation: of the channels.
        layout: of the tensor, "NHD" [B, N, H, D], "HND" [B, H, N, D] or "NC" [B, N, C], one head to it.
    """

    rotation: Rotation
    layout: Literal["NHD", "HND", "NC"]

    def heads_last(self, x: Tensor) -> Tensor:
        """The tensor as [B, N, H, D]."""
        return x.transpose(1, 2) if self.layout == "HND" else x.unsqueeze(2) if self.layout == "NC" else x

    def undo(self, x: Tensor) -> Tensor:
        """The tensor as it came, from [B, N, H, D]."""
        return x.transpose(1, 2) if self.layout == "HND" else x.squeeze(2) if self.layout == "NC" else x


def rotated(function: Function, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What `function(x, ...)` returns: by one kernel on a GPU where it computes the same, else by the function."""
    # What is compiled fuses by itself.
    if is_traced(x) or device.unavailable() or device.unsupported(x.device):
        return function(x, *args, **kwargs)
    if x.requires_grad and torch.is_grad_enabled():
        return function(x, *args, **kwargs)
    from paroattn.ops.gpu import rotary

    found = read(x, *args, **kwargs)
    if found is None or not rotary.takes(found.heads_last(x), found.rotation):
        return function(x, *args, **kwargs)
    key = (getattr(function, "__code__", function), x.dtype, found.layout, found.rotation.pairs)
    agrees = _agreements.get(key)
    if agrees:
        return found.undo(rotary.rotate(found.heads_last(x), found.rotation))
    own = function(x, *args, **kwargs)
    # A captured graph cannot be waited for, and what turns nothing proves nothing.
    captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
    if agrees is None and not captured and not torch.equal(own, x):
        turned = found.undo(rotary.rotate(found.heads_last(x), found.rotation))
        _agreements[key] = agree(turned, own, x)
    return own


def agree(turned: Tensor, own: Tensor, x: Tensor) -> bool:
    """Whether two results for x differ by no more than rounding them to their dtype explains."""
    if turned.shape != own.shape or turned.dtype != own.dtype:
        return False
    limit = _ROUNDING[x.dtype] * (own.float().abs() + x.float().abs().amax(-1, keepdim=True))
    return bool(((turned.float() - own.float()).abs() <= limit).all())


def read(x: Tensor, *freqs: Any, **options: Any) -> Reading | None:
    """What the arguments of a model's function say; None for what is not known."""
    from paroattn.ops.gpu.rotary import Rotation

    if options.keys() - {"use_real", "use_real_unbind_dim", "sequence_dim"}:
        return None
    if len(freqs) == 2:
        if x.ndim != 4 or not all(_is_real(table, 4) and table.shape[2] == 1 for table in freqs):
            return None
        cos, sin = freqs[0][:, :, 0, 0::2], freqs[1][:, :, 0, 1::2]  # Wan: numbers for each channel, every other used
        return Reading(Rotation("interleaved", (cos, cos), (sin, sin)), "NHD")
    if len(freqs) != 1:
        return None
    (tables,) = freqs
    if isinstance(tables, Tensor):
        if x.ndim != 4 or not tables.is_complex() or tables.ndim not in (2, 3):
            return None
        tables = tables.unsqueeze(0) if tables.ndim == 2 else tables
        return Reading(Rotation("interleaved", (tables.real,) * 2, (tables.imag,) * 2), "NHD")
    if not isinstance(tables, (tuple, list)) or len(tables) != 2 or not options.get("use_real", True):
        return None
    if x.ndim == 3 and all(_is_real(table, 3) for table in tables):
        return Reading(_of_all_channels("interleaved", *tables), "NC")
    if x.ndim != 4 or not all(_is_real(table, 2) for table in tables):
        return None
    layout, pairs = options.get("sequence_dim", 2), options.get("use_real_unbind_dim", -1)
    if layout not in (1, 2) or pairs not in (-1, -2):
        return None
    turned = _of_all_channels("interleaved" if pairs == -1 else "halves", *(table.unsqueeze(0) for table in tables))
    return Reading(turned, "NHD" if layout == 1 else "HND")


def _of_all_channels(pairs: Literal["interleaved", "halves"], cos: Tensor, sin: Tensor) -> Rotation:
    """A rotation of tables [1 or B, N, D], which have a number for each channel."""
    from paroattn.ops.gpu.rotary import Rotation

    half = cos.shape[-1] // 2
    parts = (slice(0, None, 2), slice(1, None, 2)) if pairs == "interleaved" else (slice(0, half), slice(half, None))
    return Rotation(pairs, (cos[..., parts[0]], cos[..., parts[1]]), (sin[..., parts[0]], sin[..., parts[1]]))


def _is_real(table: Any, ndim: int) -> bool:
    return isinstance(table, Tensor) and table.is_floating_point() and table.ndim == ndim
