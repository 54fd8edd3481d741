"""The exactly invertible maps between pixels and the latents of the bundled models."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

FOLD = 4  # each 4 x 4 square of pixels becomes 16 channels per colour


def frames_to_latents(frames: Tensor) -> Tensor:
    """Fold the pixels of a video into latent channels.

    Args:
        frames: [F, 3, H, W] floating point, values in [0, 1]; H and W multiples of 4.

    Returns:
        [1, 48, F, H / 4, W / 4] latents in [-1, 1], same dtype.

    Example:
        >>> frames_to_latents(torch.rand(16, 3, 128, 128)).shape
        torch.Size([1, 48, 16, 32, 32])
    """
    return F.pixel_unshuffle(frames * 2 - 1, FOLD).transpose(0, 1).unsqueeze(0)


def latents_to_frames(latents: Tensor) -> Tensor:
    """Unfold latents [1, 48, F, h, w] into frames [F, 3, 4 h, 4 w], clamped to [0, 1]."""
    frames = F.pixel_shuffle(latents[0].transpose(0, 1), FOLD)
    return ((frames + 1) / 2).clamp(0, 1)


def fold_pixels(pictures: Tensor) -> Tensor:
    """Fold pictures [B, 3, H, W] in [0, 1] into the image model's tokens [B, H / 4 * W / 4, 48] in [-1, 1]."""
    return F.pixel_unshuffle(pictures * 2 - 1, FOLD).flatten(2).mT


def unfold_pixels(tokens: Tensor, height: int) -> Tensor:
    """Unfold tokens [B, N, 48] into pictures [B, 3, height, 4 N / (height / 4)], clamped to [0, 1]."""
    pictures = F.pixel_shuffle(tokens.mT.unflatten(2, (height // FOLD, -1)), FOLD)
    return ((pictures + 1) / 2).clamp(0, 1)
