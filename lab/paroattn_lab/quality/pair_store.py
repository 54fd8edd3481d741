"""Results of prompt/seed pairs, kept in a folder so that an evaluation that was interrupted can continue."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from paroattn.cli.frames import save_frames
from paroattn.errors import InputError
from paroattn.files import plain_name, save_tensors, write_atomically

_CONFIGURATION = "configuration.json"
_PAIRS = "pairs"
_VIDEOS = "videos"


class PairStore:
    """One small file per pair and contender, and what is needed until a pair is done; without a folder nothing is kept.

    Args:
        folder: of the evaluation.
        fps: frames per second of the videos.
        videos: also write every video as a file to look at.

    Example:
        >>> store = PairStore(folder)  # doctest: +SKIP
        >>> store.configure({"model": "moving-digits"})  # doctest: +SKIP
        >>> store.save(0, 1, {"psnr": 30.1})  # doctest: +SKIP
        >>> store.load(0, 1)  # doctest: +SKIP
        {'psnr': 30.1}
    """

    def __init__(self, folder: Path | None = None, *, fps: int = 16, videos: bool = False):
        self._folder = folder
        self._fps = fps
        self._videos = videos

    def configure(self, configuration: Mapping[str, Any]) -> None:
        """Say what is evaluated, in JSON values.

        Raises:
            InputError: the folder holds results of something else; the message names what differs.
        """
        if self._folder is None:
            return
        path = self._folder / _CONFIGURATION
        wanted = json.loads(json.dumps(dict(configuration)))
        if not path.is_file():
            _write_json(path, wanted)
            return
        found = _read_json(path)
        for name in sorted({*wanted, *found}):
            if wanted.get(name) != found.get(name):
                raise InputError(
                    f"folder {str(self._folder)!r} holds results of another evaluation: {name} was "
                    f"{_short(found.get(name))}, now {_short(wanted.get(name))}; give another folder or delete this one"
                )

    def load(self, pair: int, contender: int) -> dict[str, Any] | None:
        """The result of a contender, or None."""
        path = self._path(pair, contender, "json")
        return None if path is None or not path.is_file() else _read_json(path)

    def save(self, pair: int, contender: int, result: Mapping[str, Any]) -> None:
        path = self._path(pair, contender, "json")
        if path is not None:
            _write_json(path, result)

    def save_sample(self, pair: int, contender: int, frames: Tensor, latents: Tensor | None, *, exact: bool) -> None:
        """Keep frames [F, 3, H, W] in [0, 1], rounded to bytes unless exact, and latents."""
        path = self._path(pair, contender, "safetensors")
        if path is None:
            return
        tensors = {"frames": (frames if exact else (frames * 255).round().byte()).contiguous()}
        if latents is not None:
            tensors["latents"] = latents.contiguous()
        save_tensors(path, tensors)

    def load_sample(self, pair: int, contender: int) -> tuple[Tensor, Tensor | None] | None:
        """Frames in [0, 1] and latents, or None."""
        path = self._path(pair, contender, "safetensors")
        if path is None or not path.is_file():
            return None
        tensors = load_file(path)
        frames = tensors["frames"]
        return (frames.float() / 255 if frames.dtype == torch.uint8 else frames), tensors.get("latents")

    def drop_sample(self, pair: int, contender: int) -> None:
        path = self._path(pair, contender, "safetensors")
        if path is not None:
            path.unlink(missing_ok=True)

    def write_video(self, pair: int, name: str, frames: Tensor) -> None:
        """Write a contender's video, or image, to look at."""
        if self._folder is None or not self._videos:
            return
        suffix = "png" if len(frames) == 1 else "mp4"
        save_frames(frames, self._folder / _VIDEOS / f"{pair + 1:04d}-{plain_name(name)}.{suffix}", self._fps)

    def _path(self, pair: int, contender: int, suffix: str) -> Path | None:
        return None if self._folder is None else self._folder / _PAIRS / f"{pair + 1:04d}-{contender:02d}.{suffix}"


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(dict(content), allow_nan=False)))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"file {str(path)!r} cannot be read ({error}); delete it to compute it anew") from error


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
