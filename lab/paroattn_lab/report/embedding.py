"""What goes into a page as data URIs, and how much of it."""

from __future__ import annotations

import base64

PAGE_BYTES = 20_000_000
"""Most bytes of a page; the parts below leave room for text and charts."""

CLIP_BYTES = 10_000_000
MAP_BYTES = 5_000_000
MASK_BYTES = 3_000_000


def data_uri(content: bytes, kind: str) -> str:
    """A data URI; `kind` is a MIME type such as "image/webp"."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
