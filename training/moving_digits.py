"""Data of the moving-digits model: a handwritten digit bouncing over a panning photograph.

Digits come from scikit-learn (1,797 scans of 8 x 8 pixels), photographs from scikit-image and scikit-learn; both ship
inside the packages, so nothing is downloaded. Every clip is drawn anew from a seeded generator.
"""

from __future__ import annotations

import numpy as np
import torch
from skimage import data as skimage_data
from skimage.filters import gaussian
from skimage.transform import resize
from sklearn import datasets
from torch import Tensor
from torch.nn import functional as F

from paroattn.models.vocabulary import PADDING

SIZE = 128  # frame height and width in pixels
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {"white": (1.0, 1.0, 1.0), "red": (0.95, 0.1, 0.1), "green": (0.1, 0.85, 0.2), "yellow": (1.0, 0.9, 0.1)}
SPEEDS = {"slow": 2.5, "fast": 6.0}  # pixels per frame
PANS = {
    "still": (0, 0),
    "left": (0, -1),
    "right": (0, 1),
    "up": (-1, 0),
    "down": (1, 0),
}  # direction of the camera (y, x)
PAN_SPEED = 3.0  # pixels per frame
PLACES = ("astronaut", "cat", "coffee", "rocket", "temple", "flower")
WORDS = [PADDING, "a", *SPEEDS, *COLOURS, *DIGIT_WORDS, "over", "the", *PLACES, "camera", *PANS]
PROMPT_LENGTH = 12  # words, padding included


def photographs() -> dict[str, np.ndarray]:
    images = (
        skimage_data.astronaut(),
        skimage_data.chelsea(),
        skimage_data.coffee(),
        skimage_data.rocket(),
        datasets.load_sample_image("china.jpg"),
        datasets.load_sample_image("flower.jpg"),
    )
    return dict(zip(PLACES, images, strict=True))


class MovingDigits:
    """Draws (video, prompt) pairs.

    Args:
        blur: standard deviation in pixels of the blur that puts the photographs out of focus; digits stay sharp.
    """

    def __init__(self, blur: float) -> None:
        self.photographs = {name: self._prepare(image, blur) for name, image in photographs().items()}
        digits = datasets.load_digits()
        self.scans = torch.from_numpy(digits.images / 16.0).float()  # [1797, 8, 8]
        self.labels = torch.from_numpy(digits.target)

    @staticmethod
    def _prepare(image: np.ndarray, blur: float) -> Tensor:
        """Scale a photograph to 192 pixels on its shorter side: [1, 3, h, w] in [0, 1]."""
        height, width = image.shape[:2]
        factor = 192 / min(height, width)
        shape = (round(height * factor), round(width * factor), 3)
        scaled = resize(image.astype(np.float64) / 255, shape, anti_aliasing=True)
        scaled = gaussian(scaled, blur, channel_axis=-1)
        return torch.from_numpy(scaled).float().permute(2, 0, 1).unsqueeze(0).clamp(0, 1)

    def sample(self, frames: int, generator: torch.Generator) -> tuple[Tensor, str]:
        """One clip [frames, 3, SIZE, SIZE] in [0, 1] and its prompt."""

        def pick(options: tuple[str, ...]) -> str:
            return options[int(torch.randint(len(options), (), generator=generator))]

        place, pan = pick(PLACES), pick(tuple(PANS))
        speed, colour = pick(tuple(SPEEDS)), pick(tuple(COLOURS))
        scan = int(torch.randint(len(self.scans), (), generator=generator))
        background = self._pan(self.photographs[place], PANS[pan], frames, generator)
        alpha = self._bounce(self.scans[scan], SPEEDS[speed], frames, generator)
        ink = torch.tensor(COLOURS[colour]).view(1, 3, 1, 1)
        clip = background * (1 - alpha) + ink * alpha
        digit = DIGIT_WORDS[int(self.labels[scan])]
        return clip, f"a {speed} {colour} {digit} over the {place} camera {pan}"

    def _pan(self, photograph: Tensor, direction: tuple[int, int], frames: int, generator: torch.Generator) -> Tensor:
        height, width = photograph.shape[2:]
        start = []
        for room, sign in zip((height - SIZE, width - SIZE), direction, strict=True):
            travel = sign * PAN_SPEED * (frames - 1)
            low, high = max(0.0, -travel), min(float(room), room - travel)
            start.append(low + (high - low) * float(torch.rand((), generator=generator)))
        time = torch.arange(frames).view(-1, 1, 1)
        y = start[0] + direction[0] * PAN_SPEED * time + torch.arange(SIZE).view(1, -1, 1)
        x = start[1] + direction[1] * PAN_SPEED * time + torch.arange(SIZE).view(1, 1, -1)
        return _look_up(photograph, y.expand(-1, -1, SIZE), x.expand(-1, SIZE, -1))

    def _bounce(self, scan: Tensor, speed: float, frames: int, generator: torch.Generator) -> Tensor:
        """Opacity [frames, 1, SIZE, SIZE] of a digit that moves straight and bounces off the frame's edges."""
        side = 48.0 + 16.0 * float(torch.rand((), generator=generator))
        room = SIZE - side
        angle = 2 * torch.pi * torch.rand((), generator=generator)
        velocity = speed * torch.stack((angle.sin(), angle.cos()))
        path = torch.rand(2, generator=generator) * room + velocity * torch.arange(frames).view(-1, 1)
        corner = room - (path.remainder(2 * room) - room).abs()  # a triangle wave: reflected at 0 and room
        pixels = torch.arange(SIZE)
        scale = scan.shape[0] / side
        y = (pixels.view(1, -1, 1) - corner[:, 0].view(-1, 1, 1)) * scale - 0.5
        x = (pixels.view(1, 1, -1) - corner[:, 1].view(-1, 1, 1)) * scale - 0.5
        alpha = _look_up(scan.view(1, 1, 8, 8), y.expand(-1, -1, SIZE), x.expand(-1, SIZE, -1), mode="bicubic")
        return ((alpha - 0.2) * 2).clamp(0, 1)


def _look_up(image: Tensor, y: Tensor, x: Tensor, mode: str = "bilinear") -> Tensor:
    """Values of image [1, C, h, w] at pixel positions y, x [frames, H, W]; zero outside."""
    height, width = image.shape[2:]
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), dim=-1)
    images = image.expand(len(grid), -1, -1, -1)
    return F.grid_sample(images, grid.float(), mode=mode, padding_mode="zeros", align_corners=False)
