"""How close a video is to the one generated with full attention."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn.functional import cosine_similarity
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from paroattn.errors import InputError

LEAST_MS_SSIM_SIDE = 176
"""MS-SSIM halves frames four times and then wants whole windows of 11 pixels: smaller ones have none."""

CLOSENESS = ("psnr", "ssim", "ms_ssim", "cosine", "relative_l2", "latent_cosine", "latent_relative_l2")
_LOWER_IS_CLOSER = ("l2", "lpips", "fvd", "error", "distance")  # words in the names of such metrics


@dataclass(frozen=True)
class Closeness:
    """Metrics against full attention; None where one is not defined.

    Attributes:
        psnr: in dB, infinite for equal videos.
        ssim: up to 1.
        cosine: of all pixels as one vector.
        ms_ssim: None for frames with a side below `LEAST_MS_SSIM_SIDE` pixels.
        relative_l2: norm of the difference over the norm of the reference.
        latent_cosine, latent_relative_l2: the same of the final latents, where the pipeline yields them.
        others: figures of learned metrics, by name.
    """

    psnr: float
    ssim: float
    cosine: float
    ms_ssim: float | None = None
    relative_l2: float | None = None
    latent_cosine: float | None = None
    latent_relative_l2: float | None = None
    others: Mapping[str, float] = field(default_factory=dict)

    def values(self) -> dict[str, float | None]:
        """All figures by name."""
        return {**{name: getattr(self, name) for name in CLOSENESS}, **self.others}

    @classmethod
    def from_values(cls, values: Mapping[str, float | None]) -> Closeness:
        """Undo `values`; a PSNR of None is infinite, since JSON has no infinity."""
        own = {name: values.get(name) for name in CLOSENESS}
        others = {name: value for name, value in values.items() if name not in CLOSENESS and value is not None}
        psnr = math.inf if own["psnr"] is None else own["psnr"]
        return cls(**{**own, "psnr": psnr}, others=others)  # type: ignore[arg-type]


def compare(
    frames: Tensor, reference: Tensor, latents: Tensor | None = None, reference_latents: Tensor | None = None
) -> Closeness:
    """Compare two videos.

    Args:
        frames, reference: [F, 3, H, W] in [0, 1]. PSNR is taken over the whole video, SSIM and MS-SSIM are averaged
            over its frames.
        latents, reference_latents: final latents of any one shape, or None.

    Raises:
        InputError: different shapes, or frames that are no video.

    Example:
        >>> compare(torch.full((2, 3, 16, 16), 0.5), torch.full((2, 3, 16, 16), 0.6)).psnr
        20.0
    """
    if frames.shape != reference.shape or frames.ndim != 4:
        raise InputError(
            f"frames are {list(frames.shape)}, reference {list(reference.shape)}; expected equal [F, 3, H, W]"
        )
    ssim = structural_similarity_index_measure(frames, reference, data_range=1.0)
    assert isinstance(ssim, Tensor)  # a tuple only when asked for the full image
    has_latents = latents is not None and reference_latents is not None and latents.shape == reference_latents.shape
    return Closeness(
        psnr=float(peak_signal_noise_ratio(frames, reference, data_range=1.0)),
        ssim=float(ssim),
        cosine=_cosine(frames, reference),
        ms_ssim=_ms_ssim(frames, reference),
        relative_l2=_relative_l2(frames, reference),
        latent_cosine=_cosine(latents, reference_latents) if has_latents else None,  # type: ignore[arg-type]
        latent_relative_l2=_relative_l2(latents, reference_latents) if has_latents else None,  # type: ignore[arg-type]
    )


def summary(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean of a metric over pairs, standard error of the mean (None for one pair), standard deviation and worst case.

    All are None where a pair has no figure, or an infinite one.

    Example:
        >>> summary("psnr", [20.0, 24.0])
        {'psnr': 22.0, 'psnr_error': 2.0, 'psnr_spread': 2.8284271247461903, 'psnr_worst': 20.0}
    """
    found = [value for value in values if value is not None]
    if len(found) < len(values) or not found:
        return dict.fromkeys((name, f"{name}_error", f"{name}_spread", f"{name}_worst"))
    worst = max(found) if lower_is_closer(name) else min(found)
    spread = statistics.stdev(found) if len(found) > 1 and all(map(math.isfinite, found)) else 0.0
    return {
        name: finite(statistics.fmean(found)),
        f"{name}_error": finite(standard_error(found)),
        f"{name}_spread": spread,
        f"{name}_worst": finite(worst),
    }


def lower_is_closer(name: str) -> bool:
    """Whether a lower figure of a metric is nearer to full attention."""
    return any(word in name for word in _LOWER_IS_CLOSER)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; NaN for a single value or infinite ones."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values) / math.sqrt(len(values))


def finite(value: float) -> float | None:
    """None for what JSON cannot hold."""
    return value if math.isfinite(value) else None


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


def _relative_l2(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def _ms_ssim(frames: Tensor, reference: Tensor) -> float | None:
    if min(frames.shape[-2:]) < LEAST_MS_SSIM_SIDE:
        return None
    return float(multiscale_structural_similarity_index_measure(frames, reference, data_range=1.0, normalize="relu"))
