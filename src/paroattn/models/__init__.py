"""The bundled small models and what belongs to them: weights, prompt vocabulary, pixel folding."""

from pathlib import Path

VIDEO, IMAGE = "moving-digits", "painted-digits"
BUNDLED = (VIDEO, IMAGE)


def folder_of(name: str) -> Path:
    """The folder of a bundled model, in diffusers' pipeline format."""
    return Path(__file__).parent / name.replace("-", "_")
