"""Data of the painted-digits model: a handwritten digit on a photograph.

The sources are those of the moving-digits model; pictures are twice as large and the photographs are sharp. Whole
batches are drawn at once on the device that trains, from a seeded generator.
"""

from __future__ import annotations

import numpy as np
import torch
from moving_digits import COLOURS, DIGIT_WORDS, PLACES, photographs
from paroattn_lab.models.vocabulary import PADDING, PromptVocabulary
from skimage.transform import resize
from sklearn import datasets
from torch import Tensor
from torch.nn import functional as F

SIZE = 256  # height and width in pixels
SIZES = {"small": 64.0, "big": 112.0}  # side of the digit in pixels
SPOTS = {
    "middle": (0.5, 0.5),
    "left": (0.5, 0.0),
    "right": (0.5, 1.0),
    "top": (0.0, 0.5),
    "bottom": (1.0, 0.5),
}  # where in the room left by the digit's side (y, x)
WORDS = [PADDING, "a", *SIZES, *COLOURS, *DIGIT_WORDS, "over", "the", *PLACES, *SPOTS]
PROMPT_LENGTH = 16  # words, padding included
_SCALED = 320  # pixels on the shorter side of a photograph; a picture is a crop of it


class PaintedDigits:
    """Draws batches of (pictures, word indices).

    Args:
        device: where they are drawn.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._photographs = [self._prepare(image) for image in photographs().values()]
        digits = datasets.load_digits()
        self._scans = torch.from_numpy(digits.images / 16.0).float().to(device).unsqueeze(1)  # [1797, 1, 8, 8]
        self._labels = digits.target.tolist()
        self._vocabulary = PromptVocabulary(WORDS, torch.zeros(len(WORDS), 1), PROMPT_LENGTH)

    def _prepare(self, image: np.ndarray) -> Tensor:
        height, width = image.shape[:2]
        factor = _SCALED / min(height, width)
        shape = (round(height * factor), round(width * factor), 3)
        scaled = resize(image.astype(np.float64) / 255, shape, anti_aliasing=True)
        return torch.from_numpy(scaled).float().permute(2, 0, 1).clamp(0, 1).to(self.device)

    def batch(self, count: int, size: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """Pictures [count, 3, size, size] in [0, 1] and their prompts; smaller sizes are scaled down from SIZE."""

        def drawn(options: int) -> list[int]:
            return torch.randint(options, (count,), generator=generator).tolist()

        places, scans = drawn(len(PLACES)), drawn(len(self._scans))
        colours, sizes, spots = drawn(len(COLOURS)), drawn(len(SIZES)), drawn(len(SPOTS))
        corners = torch.rand(count, 3, generator=generator)
        backgrounds = torch.stack(
            [self._crop(place, corner) for place, corner in zip(places, corners.tolist(), strict=True)]
        )
        sides = torch.tensor([list(SIZES.values())[index] for index in sizes])
        wanted = torch.tensor([list(SPOTS.values())[index] for index in spots])
        jitter = (torch.rand(count, 2, generator=generator) - 0.5) * 24
        corner = (wanted * (SIZE - sides).unsqueeze(1) + jitter).clamp(min=0)
        alpha = self._digits(torch.tensor(scans), corner.minimum((SIZE - sides).unsqueeze(1)), sides)
        ink = torch.tensor([list(COLOURS.values())[index] for index in colours], device=self.device)
        pictures = backgrounds * (1 - alpha) + ink.view(-1, 3, 1, 1) * alpha
        if size != SIZE:
            pictures = F.interpolate(pictures, size=(size, size), mode="area")
        names = [list(table) for table in (SIZES, COLOURS, SPOTS)]
        prompts = [
            f"a {names[0][big]} {names[1][colour]} {DIGIT_WORDS[self._labels[scan]]} over the {PLACES[place]} "
            f"{names[2][spot]}"
            for big, colour, scan, place, spot in zip(sizes, colours, scans, places, spots, strict=True)
        ]
        return pictures, prompts

    def indices(self, prompts: list[str]) -> Tensor:
        """Word indices [count, PROMPT_LENGTH]."""
        return torch.stack([self._vocabulary.indices(prompt) for prompt in prompts]).to(self.device)

    def _crop(self, place: int, corner: list[float]) -> Tensor:
        photograph = self._photographs[place]
        height, width = photograph.shape[1:]
        top, left = round(corner[0] * (height - SIZE)), round(corner[1] * (width - SIZE))
        crop = photograph[:, top : top + SIZE, left : left + SIZE]
        return crop.flip(2) if corner[2] < 0.5 else crop

    def _digits(self, scans: Tensor, corner: Tensor, sides: Tensor) -> Tensor:
        """Opacity [count, 1, SIZE, SIZE] of scans drawn with their upper left corner at `corner` [count, 2]."""
        pixels = torch.arange(SIZE, device=self.device)
        corner, sides = corner.to(self.device), sides.to(self.device).view(-1, 1)
        y, x = (((pixels - corner[:, axis : axis + 1] + 0.5) / sides * 2 - 1) for axis in (0, 1))
        grid = torch.stack((x.unsqueeze(1).expand(-1, SIZE, -1), y.unsqueeze(2).expand(-1, -1, SIZE)), dim=-1)
        alpha = F.grid_sample(self._scans[scans.to(self.device)], grid, mode="bicubic", align_corners=False)
        return ((alpha - 0.2) * 2).clamp(0, 1)
