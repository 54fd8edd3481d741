"""Writing files so that a reader never meets half of one, and naming them."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from paroattn.errors import InputError


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


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file, whole or not at all; `OSError` where that fails, on a full disk, say."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    own = None if metadata is None else dict(metadata)
    try:
        write_atomically(path, lambda temporary: save_file(dict(tensors), temporary, metadata=own))
    except SafetensorError as error:
        raise OSError(f"{str(path)!r} cannot be written: {error}") from error


def load_tensors(path: str | os.PathLike[str], key: str) -> tuple[dict[str, Any], Any]:
    """The tensors of a safetensors file, and the JSON value that its metadata have under a key.

    Tensors stay in the file until they are looked at.

    Raises:
        ValueError: a file that cannot be read, or has no such value.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            value = json.loads((file.metadata() or {})[key])
            return {name: file.get_tensor(name) for name in file.keys()}, value
    except (SafetensorError, OSError, KeyError) as error:
        raise ValueError(str(error)) from error


def check_output(path: str | os.PathLike[str], *inputs: str | os.PathLike[str] | None) -> None:
    """Raise `InputError` where a file cannot be written later, or would take the place of one that is read.

    inputs: files that are read; None for one that was not given.
    """
    path = Path(path)
    for given in inputs:
        if given is not None and path.resolve() == Path(given).resolve():
            raise InputError(f"output {str(path)!r} is also an input; choose another file name")
    if path.is_dir():
        raise InputError(f"output {str(path)!r} is a directory; expected a file name")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        reason = "is not writable" if folder.is_dir() else "is no directory"
        raise InputError(f"output {str(path)!r} cannot be written: {str(folder)!r} {reason}")


def plain_name(name: str) -> str:
    """A name of a variant as part of a file's name.

    Example:
        >>> plain_name("paroattn 0.3 + INT8")
        'paroattn-0.3-+-int8'
    """
    return re.sub(r"[^\w.+-]+", "-", name.lower()).strip("-")
