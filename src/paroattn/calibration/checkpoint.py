"""Finished parts of a calibration, kept in files so that one that was interrupted can continue."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paroattn.errors import InputError
from paroattn.files import load_tensors, save_tensors

SUFFIX = ".calibration"
_FACTS = "paroattn_calibration"


class Checkpoint:
    """Tensors and facts of a calibration's parts, one file per part.

    Args:
        folder: where the files are; made when something is saved. None keeps nothing.
        fingerprint: of everything that the calibration depends on, see `fingerprint`: files of another one are not
            looked at.

    Example:
        >>> checkpoint = Checkpoint(folder, fingerprint(seed=0))  # doctest: +SKIP
        >>> checkpoint.save("orders", {"errors": torch.zeros(3)}, {"done": 1})  # doctest: +SKIP
        >>> checkpoint.load("orders")  # doctest: +SKIP
        ({'errors': tensor([0., 0., 0.])}, {'done': 1})
    """

    def __init__(self, folder: Path | None = None, fingerprint: str = ""):
        self._folder = folder
        self._fingerprint = fingerprint
        self._in_files: set[int] = set()  # addresses of tensors from `zeros` that lie in files

    def save(self, part: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keep a part, in place of what was kept of it before; whole or not at all.

        A part with a tensor that lies in a file is not kept: it is measured anew after an interruption.
        """
        if self._folder is None or any(tensor.data_ptr() in self._in_files for tensor in tensors.values()):
            return
        own = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {_FACTS: json.dumps(dict(facts))}
        save_tensors(self._path(self._folder, part), own, metadata)

    def load(self, part: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was kept of a part, or None.

        Raises:
            InputError: a file that cannot be read.
        """
        if self._folder is None or not self._path(self._folder, part).is_file():
            return None
        path = self._path(self._folder, part)
        try:
            return load_tensors(path, _FACTS)
        except ValueError as error:
            raise InputError(f"work file {str(path)!r} cannot be read ({error}); delete it to begin anew") from error

    def check_room(self, size: int, memory: float) -> None:
        """Raise `InputError` where a tensor of `size` bytes fits neither into `memory` bytes nor onto the disk."""
        free = shutil.disk_usage(self._file_folder).free
        if size > memory and size > free:
            raise InputError(
                f"what skipping blocks costs takes {size / 1e9:.1f} GB: more than memory_gb is, and than the "
                f"{free / 1e9:.1f} GB that are free in {str(self._file_folder)!r}; give more of either: "
                "work_dir, or the variable TMPDIR, names another disk"
            )

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, memory: float) -> Tensor:
        """Zeros, in a file that ends with the tensor if they take more than `memory` bytes."""
        count, size = math.prod(shape), math.prod(shape) * dtype.itemsize
        if size <= memory:
            return torch.zeros(shape, dtype=dtype)
        self.check_room(size, memory)
        with tempfile.NamedTemporaryFile(dir=self._file_folder, prefix=".costs-") as file:
            file.truncate(size)
            tensor = torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)
        self._in_files.add(tensor.data_ptr())
        return tensor

    @property
    def _file_folder(self) -> Path:
        if self._folder is None:
            return Path(tempfile.gettempdir())
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def _path(self, folder: Path, part: str) -> Path:
        return folder / f"{self._fingerprint[:16]}-{part}{SUFFIX}"


def remove_work(folder: str | os.PathLike[str] | None) -> None:
    """Delete the files of all checkpoints in a folder, and the folder if nothing else is in it."""
    if folder is None or not Path(folder).is_dir():
        return
    folder = Path(folder)
    for path in folder.glob(f"*{SUFFIX}"):
        path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def fingerprint(**parts: Any) -> str:
    """SHA-256 of values: numbers, strings, tensors, and lists and mappings of them; others by what they print.

    Example:
        >>> fingerprint(seed=0, size=[1, 2]) == fingerprint(size=(1, 2), seed=0)
        True
    """
    digest = hashlib.sha256()
    _feed(digest, parts)
    return digest.hexdigest()


def weights_fingerprint(modules: Sequence[torch.nn.Module]) -> str:
    """Of a few weights of each parameter: enough to tell a fine-tune from its origin."""
    parameters = [parameter for module in modules for parameter in module.parameters() if not parameter.is_meta]
    return fingerprint(weights=[_plain(parameter.detach()).flatten()[:4].float() for parameter in parameters])


def _plain(tensor: Tensor) -> Tensor:
    """The values of a tensor, also of one that a library keeps in fewer bits."""
    return tensor if type(tensor) is Tensor or not hasattr(tensor, "dequantize") else tensor.dequantize()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().flatten()
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"{key}=".encode())
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"{len(value)}:".encode())
        for item in value:
            _feed(digest, item)
    elif hasattr(value, "tobytes"):  # pictures and arrays print only a part of themselves
        digest.update(value.tobytes())
    else:
        digest.update(f"{type(value).__name__} {value!r};".encode())
