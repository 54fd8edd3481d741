"""The token grid: the boxes of visual tokens a model attends over, and where its text tokens stand."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Literal

from paroattn.errors import InputError

Box = tuple[int, int, int]
"""Frames, height and width in tokens."""
Boxes = tuple[Box, ...]
"""Of visual tokens: what is generated first, then what it refers to."""
MOST_REFERENCES = 16


@dataclass(frozen=True)
class TokenGrid:
    """Shape of one attention sequence.

    The visual tokens form a box of `frames` x `height` x `width` (in latent patches, not pixels), flattened with width
    fastest. `references` are boxes of further visual tokens that stand after it (or before it), such as images to edit.
    `text_tokens` more tokens stand before (`"prefix"`) or after (`"suffix"`) all of them.

    Raises:
        InputError: a size below 1, more than 16 references, a negative number of text tokens, or an unknown position.

    Example:
        >>> TokenGrid(13, 30, 45, text_tokens=226, text_position="prefix").tokens
        17776
    """

    frames: int
    height: int
    width: int
    text_tokens: int = 0
    text_position: Literal["prefix", "suffix"] = "suffix"
    references: Boxes = ()
    references_position: Literal["before", "after"] = "after"

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            _check_integer(name, getattr(self, name), least=1)
        if not isinstance(self.references, list | tuple) or len(self.references) > MOST_REFERENCES:
            raise InputError(f"references are {self.references!r}; expected up to {MOST_REFERENCES} boxes")
        for box in self.references:
            if not isinstance(box, list | tuple) or len(box) != 3:
                raise InputError(f"references hold {box!r}; expected frames, height and width")
            for side in box:
                _check_integer("a side of references", side, least=1)
        object.__setattr__(self, "references", tuple(map(tuple, self.references)))
        if self.references_position not in ("before", "after"):
            raise InputError(f"references_position is {self.references_position!r}; expected 'before' or 'after'")
        _check_integer("text_tokens", self.text_tokens, least=0)
        if self.text_position not in ("prefix", "suffix"):
            raise InputError(f"text_position is {self.text_position!r}; expected 'prefix' or 'suffix'")

    @property
    def size(self) -> Box:
        """Frames, height and width of the first box."""
        return self.frames, self.height, self.width

    @property
    def boxes(self) -> Boxes:
        """All boxes of visual tokens, the first one first: what plans are for, whatever the number of text tokens."""
        return (self.size, *self.references)

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each of `boxes` begins in the model's own sequence."""
        counts = [math.prod(box) for box in self.boxes]
        if self.references_position == "after":
            return tuple(accumulate(counts[:-1], initial=self.visual_start))
        *others, first = accumulate(counts[1:], initial=self.visual_start)
        return (first, *others)

    @property
    def name(self) -> str:
        """The boxes as text, such as "21x45x80", or "1x64x64 and 1x32x32"."""
        return " and ".join("x".join(map(str, box)) for box in self.boxes)

    @property
    def visual_tokens(self) -> int:
        return sum(map(math.prod, self.boxes))

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
        return f"{self.name} ({self.visual_tokens:,} visual tokens){text}"

    def as_json(self) -> dict[str, Any]:
        """The arguments of `TokenGrid` as JSON values, without references where there are none."""
        return {name: value for name, value in asdict(self).items() if self.references or "references" not in name}


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} is {value!r}; expected an integer of at least {least}")
