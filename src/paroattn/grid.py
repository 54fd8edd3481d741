"""The token grid: the box of visual tokens a model attends over, and where its text tokens stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from paroattn.errors import InputError


@dataclass(frozen=True)
class TokenGrid:
    """Shape of one attention sequence.

    The visual tokens form a box of `frames` x `height` x `width` (in latent patches, not pixels), flattened with width
    fastest. `text_tokens` more tokens stand before (`"prefix"`) or after (`"suffix"`) them.

    Raises:
        InputError: a size below 1, a negative number of text tokens, or an unknown text position.

    Example:
        >>> TokenGrid(13, 30, 45, text_tokens=226, text_position="prefix").tokens
        17776
    """

    frames: int
    height: int
    width: int
    text_tokens: int = 0
    text_position: Literal["prefix", "suffix"] = "suffix"

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            _check_integer(name, getattr(self, name), least=1)
        _check_integer("text_tokens", self.text_tokens, least=0)
        if self.text_position not in ("prefix", "suffix"):
            raise InputError(f"text_position is {self.text_position!r}; expected 'prefix' or 'suffix'")

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width: what plans are for, whatever the number of text tokens."""
        return self.frames, self.height, self.width

    @property
    def visual_tokens(self) -> int:
        return self.frames * self.height * self.width

    @property
    def tokens(self) -> int:
        """Length of the whole sequence, text included."""
        return self.visual_tokens + self.text_tokens

    @property
    def visual_start(self) -> int:
        """Position of the first visual token in the model's own sequence."""
        return self.text_tokens if self.text_position == "prefix" else 0

    def __str__(self) -> str:
        text = f" + {self.text_tokens:,} text tokens ({self.text_position})" if self.text_tokens else ""
        return f"{self.frames}x{self.height}x{self.width} ({self.visual_tokens:,} visual tokens){text}"


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} is {value!r}; expected an integer of at least {least}")
