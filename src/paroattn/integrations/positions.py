"""Boxes of tokens, found in the values of positions and masks that a model is handed.

To read a value, the host waits for all that a GPU was given before. Pipelines hand over the same tensors in every step,
so that each is read in the first one only.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from paroattn.grid import Box, Boxes

_MOST = 8  # of results that are remembered: steps may alternate between prompts, and transformers
_Found = TypeVar("_Found")


def _read_once(function: Callable[[Tensor], _Found]) -> Callable[[Tensor], _Found]:
    """Remember what a function found in a tensor, for as long as nobody writes to it.

    Tensors of inference mode do not tell who writes to them, and are read each time.
    """
    results: deque[tuple[TensorWeakRef, tuple[object, ...], _Found]] = deque(maxlen=_MOST)

    @functools.wraps(function)
    def found(tensor: Tensor) -> _Found:
        if tensor.is_inference():
            return function(tensor)
        owner = tensor if tensor._base is None else tensor._base  # a view of it is another object in each step
        kind = (tensor._version, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype)
        for reference, known, result in tuple(results):
            if known == kind and reference() is owner:
                return result
        result = function(tensor)
        results.append((TensorWeakRef(owner), kind, result))
        return result

    return found


@_read_once
def first_of(tensor: Tensor) -> int:
    return int(tensor[0])


@_read_once
def common_sum(mask: Tensor) -> int | None:
    """What each row of a mask [B, N] sums to; None where they differ."""
    counts = mask.sum(1).tolist()
    return counts[0] if counts.count(counts[0]) == len(counts) else None


@_read_once
def count_at_end(kinds: Tensor) -> int | None:
    """How many tokens of kinds [B, N] are like the last one: None unless all are at the end, alike in every row."""
    last = kinds == kinds[:1, -1:]
    count = int(last[0].sum())
    return count if bool((last == last[0]).all() and last[0, -count:].all()) else None


def _box_of(ids: Tensor) -> Box | None:
    """The box whose tokens have positions ids [N, 3 or more], in any unit: frame, row, column and what is constant."""
    axes = [axis.unique(return_inverse=True)[1] for axis in ids.T]
    box = frames, height, width = [int(axis.amax()) + 1 for axis in axes[:3]]
    if len(ids) != frames * height * width or any(bool(axis.any()) for axis in axes[3:]):
        return None
    in_order = torch.cartesian_prod(*(torch.arange(size, device=ids.device) for size in box))
    return (frames, height, width) if torch.equal(torch.stack(axes[:3], 1), in_order) else None


box_of_positions = _read_once(_box_of)


@_read_once
def images_of_positions(ids: Tensor) -> Boxes | None:
    """The boxes of images that follow each other, each with a frame's number of its own."""
    starts = (ids[1:, 0] != ids[:-1, 0]).nonzero().flatten() + 1
    boxes = [_box_of(image) for image in ids.tensor_split(starts.cpu())]
    return tuple(box for box in boxes if box is not None) if None not in boxes else None


@_read_once
def last_video_of_positions(ids: Tensor) -> Boxes | None:
    """The box of a video behind its conditions, each of which begins with a frame that does not follow the one before.

    ids: [N, 3], all of one height and width.
    """
    in_frame = math.prod(len(ids[:, axis].unique()) for axis in (1, 2))
    if len(ids) % in_frame:
        return None
    frame = ids[::in_frame, 0]
    starts = [0, *((frame[1:] <= frame[:-1]).nonzero().flatten() + 1).tolist()]
    box = _box_of(ids[starts[-1] * in_frame :])
    return None if box is None else (box,)
