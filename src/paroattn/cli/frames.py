"""Frames to video and image files, and to bytes that an HTML page can hold."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from paroattn.errors import InputError, require
from paroattn.files import write_atomically

VIDEO_SUFFIXES = (".mp4", ".webp", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".webp")


def check_path(path: Path, *, images: bool | None = None) -> None:
    """Raise `InputError` for a file name whose suffix is no format for videos, or for images; None allows both."""
    suffixes = {True: IMAGE_SUFFIXES, False: VIDEO_SUFFIXES, None: (*VIDEO_SUFFIXES, ".png", ".jpg")}[images]
    if path.suffix.lower() not in suffixes:
        kind = {True: "image", False: "video", None: "output"}[images]
        raise InputError(f"{kind} file {path.name!r} has no known suffix; expected one of {', '.join(suffixes)}")
    if path.suffix.lower() == ".mp4":
        require_video_writer()


def require_video_writer() -> None:
    """Raise `MissingPartError` where MP4 files cannot be written, before work begins."""
    require("paroattn[cli]", "imageio", "imageio_ffmpeg")


def save_frames(frames: Tensor, path: Path, fps: int) -> None:
    """Write frames [F, 3, H, W] in [0, 1] as a video, or a single frame as an image, whole or not at all."""
    check_path(path)
    if path.suffix.lower() in (".png", ".jpg"):
        if len(frames) != 1:
            raise InputError(f"{path.name!r} is an image file; got {len(frames)} frames")
        kind = {".png": "png", ".jpg": "jpeg"}[path.suffix.lower()]
        write_atomically(path, lambda temporary: Image.fromarray(_pixels(frames)[0]).save(temporary, kind, quality=92))
    elif path.suffix.lower() == ".mp4":
        import imageio.v3 as imageio

        pixels = _pixels(frames)
        write_atomically(path, lambda temporary: imageio.imwrite(temporary, pixels, fps=fps, macro_block_size=2))
    else:
        write_atomically(path, lambda temporary: _write_images(frames, temporary, fps, path.suffix[1:].lower()))


def webp_bytes(frames: Tensor, fps: int) -> bytes:
    """An animated WebP of frames [F, 3, H, W] in [0, 1]."""
    buffer = io.BytesIO()
    _write_images(frames, buffer, fps, "webp")
    return buffer.getvalue()


def mp4_bytes(frames: Tensor, fps: int) -> bytes:
    """An H.264 video of frames [F, 3, H, W] in [0, 1] that browsers play; width and height must be even."""
    import imageio.v3 as imageio

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        settings = ["-crf", "20", "-movflags", "+faststart"]
        imageio.imwrite(path, _pixels(frames), fps=fps, quality=None, macro_block_size=2, output_params=settings)
        return path.read_bytes()


def _pixels(frames: Tensor) -> np.ndarray:
    return (frames * 255).round().byte().permute(0, 2, 3, 1).numpy()


def _write_images(frames: Tensor, target: Path | io.BytesIO, fps: int, kind: str) -> None:
    first, *others = (Image.fromarray(frame) for frame in _pixels(frames))
    first.save(target, format=kind, save_all=True, append_images=others, duration=round(1000 / fps), loop=0, quality=88)
