"""The bundled models: small video and image models that are called with words of their own."""

from paroattn_lab.models.bundled import (
    BUNDLED_MODELS,
    IMAGE,
    IMAGE_LARGE,
    LARGE,
    TINY,
    VIDEO,
    VIDEO_LARGE,
    bundled_name,
    folder_of,
    load_bundled,
)

__all__ = [
    "BUNDLED_MODELS",
    "IMAGE",
    "IMAGE_LARGE",
    "LARGE",
    "TINY",
    "VIDEO",
    "VIDEO_LARGE",
    "bundled_name",
    "folder_of",
    "load_bundled",
]
