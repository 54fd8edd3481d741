"""Low precision in plain PyTorch: what INT8 and INT4 attention compute, scales and rounding included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from paroattn.errors import InputError

NumberFormat = Literal["exact", "bf16", "int8", "int4", "fp8"]
FORMATS = ("exact", "bf16", "int8", "int4", "fp8")
GROUP = 64  # tokens of q and of k that share one scale, whatever the block size of the mask
HEAD_WIDTHS = (64, 128, 256)  # channels that kernels pad heads to, and sizes of the Hadamard matrix
_INTEGERS = ("int8", "int4")
_LARGEST = {"int8": 127, "int4": 7, "fp8": 448}  # numbers of formats that need a scale; fp8 is e4m3
_FP8_P_STEPS = 256  # P in [0, 1] in fp8 is held as a multiple of 1 / 256


@dataclass(frozen=True)
class Precision:
    """Number formats of the two products of attention.

    Attributes:
        qk: format of query and key in QK^T.
        pv: format of the attention probabilities and the value in PV.

    "exact" is float32 arithmetic (16-bit products with float32 sums for bfloat16 input), "bf16" rounds the operands to
    bfloat16, "int8" and "int4" quantise them (paper, section 4.3), "fp8" scales and rounds them to e4m3 (PV only).

    Example:
        >>> Precision.parse("int8")
        Precision(qk='int8', pv='int8')
    """

    qk: NumberFormat = "exact"
    pv: NumberFormat = "exact"

    def __post_init__(self) -> None:
        for name in ("qk", "pv"):
            if getattr(self, name) not in FORMATS:
                raise InputError(f"precision {name} is {getattr(self, name)!r}; expected one of {', '.join(FORMATS)}")

    @classmethod
    def parse(cls, value: str | Precision) -> Precision:
        """A `Precision`, or one format name for both products, or "qk/pv" as `str(precision)` writes it."""
        if isinstance(value, Precision):
            return value
        if not isinstance(value, str):
            raise InputError(f"precision is {value!r}; expected a Precision or one of {', '.join(FORMATS)}")
        qk, _, pv = value.partition("/")
        return cls(qk, pv or qk)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return self.qk if self.qk == self.pv else f"{self.qk}/{self.pv}"


@dataclass(frozen=True)
class PQuantization:
    """How a backend scales the probabilities P before rounding; P is relative to the row maximum found so far.

    Attributes:
        granularity: "block": one scale per block (block_q x block_kv) from its largest entry, as the paper has it;
            "row": one per row of a block, which costs kernels nothing, as it is the row's maximum in the block;
            "fixed": the scale 1, which P never exceeds.
        steps: largest integer for 8 bits, 255 (unsigned) or 127 (signed); 4 bits use 15 or 7 accordingly.
    """

    granularity: Literal["block", "row", "fixed"] = "block"
    steps: Literal[127, 255] = 255


@dataclass(frozen=True)
class Quantized:
    """Numbers of a format held in floating point, with the scale that turns them back: `values * scale`."""

    values: Tensor
    scale: Tensor


def is_integer(number_format: str) -> bool:
    return number_format in _INTEGERS


def is_scaled(number_format: str) -> bool:
    """Whether numbers need a scale to fit the format."""
    return number_format in _LARGEST


def padded_head_dim(head_dim: int) -> int:
    """The smallest of `HEAD_WIDTHS` that holds a head of at most the largest of them."""
    return next(width for width in HEAD_WIDTHS if head_dim <= width)


def rotate_channels(x: Tensor) -> Tensor:
    """Channels of x [..., D] padded with zeros to `padded_head_dim`, turned by the Hadamard matrix of that size.

    Turning q and k alike leaves their products as they are and spreads channels with large values over all of them, so
    that 4 bits suffice better.
    """
    width = padded_head_dim(x.shape[-1])
    matrix = torch.ones(1, 1, dtype=x.dtype, device=x.device)
    while len(matrix) < width:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return torch.nn.functional.pad(x, (0, width - x.shape[-1])) @ matrix * width**-0.5


def quantize_tokens(x: Tensor, number_format: NumberFormat) -> Quantized:
    """Round x [B, N, D] to a format; scaled formats get one symmetric scale per group of `GROUP` tokens.

    Returns:
        values [B, N, D] and scale [B, N, 1] (repeated inside a group; 1 for "exact" and "bf16").
    """
    if not is_scaled(number_format):
        return Quantized(round_to(x, number_format), torch.ones_like(x[..., :1]))
    groups = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[-2] % GROUP)).unflatten(-2, (-1, GROUP))
    scale = _symmetric_scale(groups.abs().amax((-2, -1), keepdim=True), number_format)
    per_token = scale.expand(*groups.shape[:-1], 1).flatten(-3, -2)[..., : x.shape[-2], :]
    return Quantized(round_to(x / per_token, number_format), per_token)


def quantize_channels(x: Tensor, number_format: NumberFormat) -> Quantized:
    """Round x [B, N, D] to a format; scaled formats get one scale per channel: values [B, N, D], scale [B, 1, D]."""
    if not is_scaled(number_format):
        return Quantized(round_to(x, number_format), torch.ones_like(x[..., :1, :]))
    scale = _symmetric_scale(x.abs().amax(-2, keepdim=True), number_format)
    return Quantized(round_to(x / scale, number_format), scale)


def quantize_probabilities(p: Tensor, number_format: NumberFormat, how: PQuantization) -> Quantized:
    """Round P [B, rows, blocks, block_kv], values in [0, 1]: same shape, scale [B, 1 or rows, blocks, 1]."""
    if not is_integer(number_format):
        scale = torch.ones_like(p[:, :1, :, :1]) / (_FP8_P_STEPS if number_format == "fp8" else 1)
        return Quantized(round_to(p / scale, number_format), scale)
    steps = how.steps if number_format == "int8" else how.steps // 16
    if how.granularity == "fixed":
        largest = torch.ones_like(p[:, :1, :, :1])
    else:
        largest = p.amax(3 if how.granularity == "row" else (1, 3), keepdim=True)
    scale = _scale(largest, steps)
    return Quantized((p / scale).round().clamp(max=steps), scale)


def round_to(x: Tensor, number_format: NumberFormat) -> Tensor:
    """X after one rounding to a format, in x's dtype; integers and fp8 are scaled already."""
    if is_integer(number_format):
        return x.round()
    dtypes = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
    return x.to(dtypes[number_format]).to(x.dtype) if number_format in dtypes else x


def _symmetric_scale(largest: Tensor, number_format: NumberFormat) -> Tensor:
    return _scale(largest, _LARGEST[number_format])


def _scale(largest: Tensor, steps: int) -> Tensor:
    """The size of one step, never zero: values too small for a scale round to zero."""
    return (largest / steps).clamp(min=torch.finfo(largest.dtype).tiny)
