"""The least time that a GPU could take for an attention: its matrix rate and its exponentials, at its highest clock."""

from __future__ import annotations

import torch

from paroattn.quantize import Precision

# Matrix operations (a product and a sum are two) and exponentials per clock and multiprocessor, by compute capability.
_MATRIX = {(8, 0): {"16": 2048, "int8": 4096}, (9, 0): {"16": 4096, "int8": 8192, "fp8": 8192}}
_EXPONENTIALS = 16


def gpu_rooflines(precision: Precision, scores: float, head_dim: int, device: torch.device) -> dict[str, float | None]:
    """Milliseconds that the products and the exponentials of `scores` entries of QK^T take at least.

    Returns:
        `matrix_roofline_ms` and `exp2_roofline_ms`; None for GPUs whose rates are not known here.
    """
    unknown: dict[str, float | None] = {"matrix_roofline_ms": None, "exp2_roofline_ms": None}
    if device.type != "cuda" or torch.version.hip:
        return unknown
    properties = torch.cuda.get_device_properties(device)
    rates, clock = _MATRIX.get((properties.major, properties.minor)), getattr(properties, "clock_rate", None)
    if rates is None or clock is None:
        return unknown
    per_ms = properties.multi_processor_count * clock  # clock is in kHz
    operations = sum(2 * scores * head_dim / rates[_width(part)] for part in (precision.qk, precision.pv))
    return {"matrix_roofline_ms": operations / per_ms, "exp2_roofline_ms": scores / _EXPONENTIALS / per_ms}


def _width(number_format: str) -> str:
    return number_format if number_format in ("int8", "fp8") else "16"
