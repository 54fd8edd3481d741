"""The bundled models and what belongs to them: weights, prompt vocabulary, pixel folding."""

from pathlib import Path

VIDEO, IMAGE = "moving-digits", "painted-digits"
VIDEO_LARGE, IMAGE_LARGE = f"{VIDEO}-large", f"{IMAGE}-large"
BUNDLED = (VIDEO, IMAGE, VIDEO_LARGE, IMAGE_LARGE)
TINY, LARGE = "tiny", "large"  # for CPUs and for GPUs; short names on the command line


def bundled_name(size: str, *, image: bool) -> str:
    """The bundled model of a size, `TINY` or `LARGE`."""
    return {TINY: (VIDEO, IMAGE), LARGE: (VIDEO_LARGE, IMAGE_LARGE)}[size][image]


def folder_of(name: str) -> Path:
    """The folder of a bundled model, in diffusers' pipeline format."""
    return Path(__file__).parent / name.replace("-", "_")
