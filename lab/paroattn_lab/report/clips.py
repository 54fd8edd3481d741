"""Videos and images of a report, with their differences from full attention, as small files inside the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import interpolate
from tqdm.auto import tqdm

from paroattn.cli.frames import mp4_bytes, webp_bytes
from paroattn_lab.quality.pairs import FULL, Pair
from paroattn_lab.quality.table_rows import TableRow
from paroattn_lab.report.embedding import CLIP_BYTES, data_uri

DIFFERENCE_GAIN = 4
_LEAST_WIDTH, _MOST_WIDTH = 256, 480  # of a video; small pixels would be smeared by the codec's half-size colours
_MOST_IMAGE_WIDTH = 1024


def embedded_clips(
    pairs: Sequence[Pair],
    videos: Mapping[str, Sequence[Tensor]],
    rows: Sequence[TableRow],
    shown: TableRow,
    fps: int,
    *,
    limit: int = CLIP_BYTES,
) -> dict[str, Any]:
    """What the page's player shows, as JSON values: per pair the clip of each variant and its amplified difference.

    Pairs are embedded from the one in which the shown variant is farthest from full attention, each with the shown
    variant first, until `limit` bytes are used; "wanted" says how many clips there would have been.

    Args:
        pairs: prompts and seeds.
        videos: by variant (`FULL` for full attention), one [F, 3, H, W] for each of the first pairs.
        rows: of the variants, for the figures beside them.
        shown: the row that comes first.
        fps: frames per second.
        limit: most bytes, as base64.
    """
    by_name = {row.name: row for row in rows if row.name in videos}
    names = [shown.name, *(name for name in by_name if name != shown.name)] if shown.name in by_name else list(by_name)
    closeness = shown.pair_values("psnr")
    numbers = list(range(len(videos[FULL])))
    if len(closeness) >= len(numbers):
        numbers.sort(key=lambda number: (closeness[number] is None, closeness[number]))
    used = embedded = 0
    found = []
    for number in tqdm(numbers, desc="clips of the report", unit="pair", delay=2, leave=False):
        prompt, seed = pairs[number]
        reference = _sized(videos[FULL][number])
        pair: dict[str, Any] = {"prompt": prompt, "seed": seed, "full": _encoded(reference, fps), "variants": []}
        used += len(pair["full"])
        for name in names:
            own = _sized(videos[name][number])
            difference = ((own - reference).abs() * DIFFERENCE_GAIN).clamp(max=1)
            clip, gap = _encoded(own, fps), _encoded(difference, fps)
            if used + len(clip) + len(gap) > limit:
                break
            used += len(clip) + len(gap)
            embedded += 1
            figures = _figures(by_name[name], number)
            pair["variants"].append({"name": name, "clip": clip, "difference": gap, "figures": figures})
        if pair["variants"]:
            found.append(pair)
        if len(pair["variants"]) < len(names):
            break
    frames = videos[FULL][0]
    return {
        "pairs": found,
        "images": len(frames) == 1,
        "fps": fps,
        "gain": DIFFERENCE_GAIN,
        "size": f"{frames.shape[3]} x {frames.shape[2]}",
        "shown_size": f"{_sized(frames).shape[3]} x {_sized(frames).shape[2]}",
        "embedded": embedded,
        "wanted": len(pairs) * len(names),
    }


def _figures(row: TableRow, number: int) -> str:
    """The row's metrics of one pair in words."""
    parts = []
    for figure in row.figures.values():
        values = row.pair_values(figure.name)
        if number < len(values):
            parts.append(f"{figure.label} {figure.shown(values[number])}")
    return ", ".join(parts)


def _sized(frames: Tensor) -> Tensor:
    """Small videos with every pixel repeated, large ones averaged down; width and height even, as the codec needs."""
    height, width = frames.shape[2:]
    if len(frames) == 1:
        if width <= _MOST_IMAGE_WIDTH:
            return frames
        return interpolate(frames, size=(round(height * _MOST_IMAGE_WIDTH / width), _MOST_IMAGE_WIDTH), mode="area")
    if width > _MOST_WIDTH:
        return interpolate(frames, size=(2 * round(height * _MOST_WIDTH / width / 2), _MOST_WIDTH), mode="area")
    factor = max(1, -(-_LEAST_WIDTH // width))
    large = frames.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return large[:, :, : large.shape[2] // 2 * 2, : large.shape[3] // 2 * 2]


def _encoded(frames: Tensor, fps: int) -> str:
    if len(frames) == 1:
        return data_uri(webp_bytes(frames, fps), "image/webp")
    return data_uri(mp4_bytes(frames, fps), "video/mp4")
