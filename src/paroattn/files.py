"""Writing files so that a reader never meets half of one, and naming them."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it to `path`.

    When `write` raises, the temporary file is removed and an existing `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def plain_name(name: str) -> str:
    """A name of a variant as part of a file's name.

    Example:
        >>> plain_name("paroattn 0.3 + INT8")
        'paroattn-0.3-+-int8'
    """
    return re.sub(r"[^\w.+-]+", "-", name.lower()).strip("-")
