"""Small video and image models in diffusers' pipeline format, as data: `paroattn_lab.models` loads them."""

from pathlib import Path


def folder_of(name: str) -> Path:
    """The folder of a model such as "moving-digits"."""
    return Path(__file__).parent / name.replace("-", "_")
