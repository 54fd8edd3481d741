"""Data of the moving-digits model: a handwritten digit bouncing over a panning photograph.

Digits come from scikit-learn (1,797 scans of 8 x 8 pixels), photographs from scikit-image and scikit-learn; both ship
inside the packages, so nothing is downloaded. Clips are drawn in batches, on the device that trains, from a seeded
generator.
"""

from __future__ import annotations

import numpy as np
import torch
from paroattn_lab.models.vocabulary import PADDING
from skimage import data as skimage_data
from skimage.filters import gaussian
from skimage.transform import resize
from sklearn import datasets
from torch import Tensor
from torch.nn import functional as F

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {"white": (1.0, 1.0, 1.0), "red": (0.95, 0.1, 0.1), "green": (0.1, 0.85, 0.2), "yellow": (1.0, 0.9, 0.1)}
SPEEDS = {"slow": 2.5, "fast": 6.0}  # per frame, as all lengths in pixels of a frame of 128 x 128
PANS = {
    "still": (0, 0),
    "left": (0, -1),
    "right": (0, 1),
    "up": (-1, 0),
    "down": (1, 0),
}  # direction of the camera (y, x)
PAN_SPEED = 3.0
PHOTOGRAPH = 192  # shorter side of a photograph
DIGIT = (48.0, 64.0)  # least and greatest side of a digit
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
    """Draws batches of (clips, prompts).

    Args:
        size: frame height and width in pixels.
        blur: standard deviation in pixels (of 128) of the blur that puts the photographs out of focus; digits stay
            sharp.
        device: where clips are drawn.
    """

    def __init__(self, size: int = 128, blur: float = 0.0, device: torch.device | str = "cpu") -> None:
        self.size, self.unit, self.device = size, size / 128, torch.device(device)
        prepared = [self._prepare(image, blur) for image in photographs().values()]
        self._extents = torch.tensor([image.shape[1:] for image in prepared], device=device)  # [places, 2]
        height, width = self._extents.amax(0).tolist()
        self._photographs = torch.stack(
            [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in prepared]
        ).to(device)
        digits = datasets.load_digits()
        self._scans = torch.from_numpy(digits.images / 16.0).float().to(device).unsqueeze(1)  # [1797, 1, 8, 8]
        self._labels = digits.target.tolist()

    def _prepare(self, image: np.ndarray, blur: float) -> Tensor:
        """Scale a photograph by its shorter side: [3, h, w] in [0, 1]."""
        height, width = image.shape[:2]
        factor = PHOTOGRAPH * self.unit / min(height, width)
        shape = (round(height * factor), round(width * factor), 3)
        scaled = resize(image.astype(np.float64) / 255, shape, anti_aliasing=True)
        if blur:
            scaled = gaussian(scaled, blur * self.unit, channel_axis=-1)
        return torch.from_numpy(scaled).float().permute(2, 0, 1).clamp(0, 1)

    def batch(self, count: int, frames: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """Clips [count, frames, 3, size, size] in [0, 1] and their prompts; the generator is the CPU's."""

        def drawn(options: int) -> list[int]:
            return torch.randint(options, (count,), generator=generator).tolist()

        places, pans, speeds = drawn(len(PLACES)), drawn(len(PANS)), drawn(len(SPEEDS))
        colours, scans = drawn(len(COLOURS)), drawn(len(self._scans))
        backgrounds = self._pan(places, [list(PANS.values())[pan] for pan in pans], frames, generator)
        alpha = self._bounce(scans, [list(SPEEDS.values())[speed] for speed in speeds], frames, generator)
        ink = torch.tensor([list(COLOURS.values())[colour] for colour in colours], device=self.device)
        clips = backgrounds * (1 - alpha) + ink.view(-1, 1, 3, 1, 1) * alpha
        names = [list(table) for table in (SPEEDS, COLOURS, PANS)]
        prompts = [
            f"a {names[0][speed]} {names[1][colour]} {DIGIT_WORDS[self._labels[scan]]} over the {PLACES[place]} "
            f"camera {names[2][pan]}"
            for speed, colour, scan, place, pan in zip(speeds, colours, scans, places, pans, strict=True)
        ]
        return clips, prompts

    def _pan(
        self, places: list[int], directions: list[tuple[int, int]], frames: int, generator: torch.Generator
    ) -> Tensor:
        """[count, frames, 3, size, size]: a window that moves over each photograph and stays inside."""
        velocity = torch.tensor(directions, device=self.device) * PAN_SPEED * self.unit
        room, travel = self._extents[places] - self.size, velocity * (frames - 1)
        low, high = (-travel).clamp(min=0), torch.minimum(room, room - travel)
        start = low + (high - low) * self._uniform((len(places), 2), generator)
        corner = start.unsqueeze(1) + velocity.unsqueeze(1) * torch.arange(frames, device=self.device).view(1, -1, 1)
        pixels = torch.arange(self.size, device=self.device)
        return _look_up(self._photographs[places], corner.unsqueeze(-1) + pixels, mode="bilinear")

    def _bounce(self, scans: list[int], speeds: list[float], frames: int, generator: torch.Generator) -> Tensor:
        """Opacity [count, frames, 1, size, size] of digits that move straight and bounce off the frame's edges."""
        count = len(scans)
        side = (DIGIT[0] + (DIGIT[1] - DIGIT[0]) * self._uniform((count, 1, 1), generator)) * self.unit
        room = self.size - side
        angle = 2 * torch.pi * self._uniform((count,), generator)
        speed = torch.tensor(speeds, device=self.device) * self.unit
        velocity = (speed * torch.stack((angle.sin(), angle.cos()))).T.unsqueeze(1)
        moved = velocity * torch.arange(frames, device=self.device).view(1, -1, 1)
        path = self._uniform((count, 1, 2), generator) * room + moved
        corner = room - (path.remainder(2 * room) - room).abs()  # a triangle wave: reflected at 0 and room
        pixels = torch.arange(self.size, device=self.device)
        scale = self._scans.shape[-1] / side.unsqueeze(-1)
        alpha = _look_up(self._scans[scans], (pixels - corner.unsqueeze(-1)) * scale - 0.5, mode="bicubic")
        return ((alpha - 0.2) * 2).clamp(0, 1)

    def _uniform(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.rand(shape, generator=generator).to(self.device)


def _look_up(images: Tensor, positions: Tensor, mode: str) -> Tensor:
    """Values of images [count, C, h, w] in a window per frame: [count, frames, C, size, size]; zero outside.

    Args:
        positions: [count, frames, 2, size], the window's rows and columns in pixels of the image.
    """
    frames, size = positions.shape[1], positions.shape[3]
    extents = torch.tensor(images.shape[2:], device=images.device).view(1, 1, 2, 1)
    y, x = ((2 * positions + 1) / extents - 1).float().unbind(2)
    grid = torch.stack((x.unsqueeze(2).expand(-1, -1, size, -1), y.unsqueeze(3).expand(-1, -1, -1, size)), dim=-1)
    values = F.grid_sample(images, grid.flatten(1, 2), mode=mode, padding_mode="zeros", align_corners=False)
    return values.unflatten(2, (frames, size)).transpose(1, 2)
