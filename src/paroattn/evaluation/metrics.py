"""How close a video is to the one generated with full attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cosine_similarity
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure


@dataclass(frozen=True)
class Closeness:
    """Metrics against full attention: psnr in dB (infinite for equal videos), ssim and cosine up to 1."""

    psnr: float
    ssim: float
    cosine: float


def compare(frames: Tensor, reference: Tensor) -> Closeness:
    """Compare two videos [F, 3, H, W] in [0, 1].

    PSNR is taken over the whole video, SSIM averaged over its frames, cosine similarity of all pixels as one vector.

    Example:
        >>> compare(torch.full((2, 3, 16, 16), 0.5), torch.full((2, 3, 16, 16), 0.6)).psnr
        20.0
    """
    if frames.shape != reference.shape or frames.ndim != 4:
        raise ValueError(
            f"frames are {list(frames.shape)}, reference {list(reference.shape)}; expected equal [F, 3, H, W]"
        )
    ssim = structural_similarity_index_measure(frames, reference, data_range=1.0)
    assert isinstance(ssim, Tensor)  # a tuple only when asked for the full image
    return Closeness(
        psnr=float(peak_signal_noise_ratio(frames, reference, data_range=1.0)),
        ssim=float(ssim),
        cosine=float(cosine_similarity(frames.flatten().double(), reference.flatten().double(), dim=0)),
    )
