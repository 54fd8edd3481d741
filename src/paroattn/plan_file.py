"""The file of a plan (docs/plan-format.md): a header and tensors, checked before anything large is allocated."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from paroattn.errors import PlanError
from paroattn.files import save_tensors
from paroattn.mask_coding import MaskRules, check_stacks, decode_masks, encode_masks

FORMAT_VERSION = 1
HEADER_KEY = "paroattn_plan"
"""Where the metadata of a safetensors file holds a plan's header."""
HEADER_BYTES = 2**20
"""Most bytes of a file before its tensors."""
MASK_GIGABYTES = 16
"""Most gigabytes of the masks of a plan, decoded."""
_NESTING = 64
_TENSOR_LIST_BYTES = 4096
_NO_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[^\[\]{}]', re.DOTALL)
_DIGEST = "sha256"
_MESSAGE_LENGTH = 400  # a message may quote what a stranger wrote
_DTYPES = {"U8": torch.uint8, "BOOL": torch.bool, "I32": torch.int32, "I64": torch.int64, "F32": torch.float32}
TensorKind = tuple[torch.dtype, tuple[int | None, ...]]
"""The dtype and shape of a tensor; a size that is None may be any from 1."""
TensorKinds = Mapping[str, TensorKind]


def write_plan_file(path: str | os.PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a plan's file, whole or not at all; equal plans become equal bytes.

    Args:
        header: JSON values of all keys but "version".
        tensors: of the plan, "mask_table" and "mask_index" as the plan has them.

    Raises:
        PlanError: masks or a header too large for a file, or a header too deeply nested.
    """
    text = json.dumps({"version": FORMAT_VERSION, **header}, sort_keys=True)
    length = len(json.dumps(text)) + _TENSOR_LIST_BYTES  # as a string within safetensors' own header
    if length > HEADER_BYTES:
        raise PlanError(
            f"the plan's header takes {length:,} bytes; expected at most {HEADER_BYTES:,}. Shorten its provenance"
        )
    _check_nesting(text)
    _check_memory(*tensors["mask_table"].shape)
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if name != "mask_table"}
    kept.update(encode_masks(tensors["mask_table"], tensors["mask_index"]))
    kept[_DIGEST] = torch.frombuffer(bytearray(_digest(text.encode(), kept)), dtype=torch.uint8)
    save_tensors(path, kept, {HEADER_KEY: text})


class OtherFileError(PlanError):
    """A safetensors file that is no plan, such as a model's weights."""


class PlanFile:
    """A plan's file, opened: its header was read, its tensors were not. Made by `open_plan_file`.

    Attributes:
        header: all its keys, JSON values; only "version" was checked.
    """

    def __init__(self, text: str, header: dict[str, Any], file: Any):
        self.header = header
        self._text, self._file = text, file

    def read(self, kinds: TensorKinds, rules: MaskRules) -> dict[str, Tensor]:
        """The tensors of the plan, of which the masks were checked.

        Args:
            kinds: of all of them, of which "mask_table" and "mask_index" are decoded where the file has them coded.
            rules: of its masks.

        Raises:
            PlanError: another list of tensors, another dtype or shape, a wrong checksum, or wrong masks.
        """
        if self.header["version"] == 0:
            self._check(kinds)
            tensors = self._load()
            if self.header.get("digest") != _version_0_digest(self.header, tensors):
                raise PlanError("the content does not match its checksum: the file was changed after it was written")
            rules.check(tensors["mask_table"])
            return tensors
        coded = {name: kind for name, kind in kinds.items() if name != "mask_table"}
        coded["mask_stacks"] = (torch.int64, (None, 4))
        coded["mask_data"] = (torch.uint8, (None,))
        coded[_DIGEST] = (torch.uint8, (32,))
        self._check(coded)
        tensors = self._load()
        digest = tensors.pop(_DIGEST)
        if bytes(digest.tolist()) != _digest(self._text.encode(), tensors):
            raise PlanError("the content does not match its checksum: the file was changed after it was written")
        stacks, data, index = tensors.pop("mask_stacks"), tensors.pop("mask_data"), tensors["mask_index"]
        masks = int(index.max()) + 1
        _check_memory(masks, rules.rows, rules.row_bytes)
        check_stacks(stacks, len(data), masks)
        return {**tensors, "mask_table": decode_masks(stacks, data, rules)}

    def _check(self, kinds: TensorKinds) -> None:
        names = list(self._file.keys())
        if sorted(names) != sorted(kinds):
            raise PlanError(f"tensors are {sorted(names)}; expected {sorted(kinds)}")
        for name, kind in kinds.items():
            found = self._file.get_slice(name)
            check_tensor(name, _DTYPES.get(found.get_dtype(), found.get_dtype()), tuple(found.get_shape()), kind)

    def _load(self) -> dict[str, Tensor]:
        return {name: self._file.get_tensor(name) for name in self._file.keys()}


@contextmanager
def open_plan_file(path: str | os.PathLike[str]) -> Iterator[PlanFile]:
    """Open a plan's file; a `PlanError` that is raised meanwhile gets its path, as one line.

    Raises:
        PlanError: no such file, truncated, not a plan, or of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise PlanError(f"plan file {str(path)!r} does not exist; make one with `paroattn calibrate`")
    try:
        _check_length(path)
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError, RuntimeError) as error:  # the last two if it was just deleted
        raise PlanError(
            f"{str(path)!r} is not a readable safetensors file ({one_line(error)}); it may be truncated: copy or make "
            "it anew"
        ) from error
    try:
        with file:
            text = (file.metadata() or {}).get(HEADER_KEY)
            yield PlanFile(text or "", parse_header(text), file)
    except PlanError as error:
        raise type(error)(f"{str(path)!r}: {one_line(error)}") from error


def _check_length(path: Path) -> None:
    """Refuse a header that is larger than a parser should be given."""
    with path.open("rb") as start:
        length, size = int.from_bytes(start.read(8), "little"), os.fstat(start.fileno()).st_size
    if HEADER_BYTES < length < size:
        raise OtherFileError(f"{str(path)!r} has a header of {length:,} bytes; expected at most {HEADER_BYTES:,}")


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of a plan file (docs/plan-format.md), without its tensors: only the version is checked.

    Raises:
        PlanError: no such file, truncated, not a plan, or of a newer version.
    """
    with open_plan_file(path) as file:
        return file.header


def check_tensor(name: str, dtype: torch.dtype | str, shape: tuple[int, ...], kind: TensorKind) -> None:
    """Raise `PlanError` unless a tensor of this dtype (or another one's name) and shape is of a kind."""
    fits = len(shape) == len(kind[1]) and all(
        size >= 1 if wanted is None else size == wanted for size, wanted in zip(shape, kind[1], strict=True)
    )
    if dtype != kind[0] or not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in kind[1])
        raise PlanError(f"{name} is {dtype} {list(shape)}; expected {kind[0]} [{wanted}]")


def parse_header(text: object) -> dict[str, Any]:
    """The header of a plan, from the text that a safetensors file has under `HEADER_KEY`; None if it has none.

    Raises:
        PlanError: not a plan, of a newer version, or not readable; only the version is checked.
    """
    if not isinstance(text, str):
        raise OtherFileError(f"no header {HEADER_KEY!r}: this is some other safetensors file, not a plan")
    _check_nesting(text)
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
        version = header["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise PlanError(f"the plan's header cannot be read ({error!r}); make the plan anew") from error
    if isinstance(version, bool) or not isinstance(version, int) or version < 0:
        raise PlanError(f"plan format version is {version!r}; expected an integer from 0")
    if version > FORMAT_VERSION:
        raise PlanError(
            f"plan format version is {version}; this paroattn reads up to {FORMAT_VERSION}. Install a newer paroattn"
        )
    return header


def _check_nesting(text: str) -> None:
    """Refuse what a parser would have to recur into deeply."""
    brackets = np.frombuffer(_NO_BRACKET.sub("", text).encode(), np.uint8)
    depth = np.where(np.isin(brackets, list(b"[{")), 1, -1).cumsum()
    if int(depth.max(initial=0)) > _NESTING:
        raise PlanError(f"the plan's header is nested {int(depth.max())} deep; expected at most {_NESTING}")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _check_memory(masks: int, rows: int, row_bytes: int) -> None:
    needed = masks * rows * row_bytes
    if needed > MASK_GIGABYTES * 1e9:
        raise PlanError(
            f"its {masks:,} masks of {rows:,} x {row_bytes:,} bytes take {needed / 1e9:.1f} GB; expected at most "
            f"{MASK_GIGABYTES} GB. Use fewer step buckets"
        )


def _digest(header: bytes, tensors: Mapping[str, Tensor]) -> bytes:
    """SHA-256 over the header as it stands in the file and the tensors' bytes in the order of their names."""
    digest = hashlib.sha256(header)
    for name in sorted(tensors):
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.digest()


def digest_of(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a header and tensors that need not be in a file, in hexadecimal digits."""
    return _digest(json.dumps(header, sort_keys=True).encode(), tensors).hex()


def _version_0_digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    content = {key: value for key, value in header.items() if key != "digest"}
    return digest_of(content, tensors)


def one_line(error: Exception) -> str:
    """An error's message on one line, cut where it is long."""
    text = " ".join(str(error).split())
    return text if len(text) <= _MESSAGE_LENGTH else f"{text[:_MESSAGE_LENGTH]}…"
