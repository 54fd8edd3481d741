"""Files of prompts: one prompt per line, or VBench's JSON lists."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from paroattn.errors import InputError


@dataclass(frozen=True)
class FilePrompt:
    """A prompt, and the dimensions that a VBench file lists it under."""

    text: str
    dimensions: tuple[str, ...] = ()


def read_prompts(path: Path, *, merge: bool = True) -> list[FilePrompt]:
    """Read a file of prompts.

    Args:
        path: a text file with one prompt per line (empty lines and those that begin with # do not count), or, if its
            name ends in .json, a list of objects with `prompt_en` and `dimension`, a string or a list of them, as
            VBench's `VBench_full_info.json`.
        merge: of equal prompts only the first stays, with the dimensions of all.

    Returns:
        The prompts in the order of the file.

    Raises:
        InputError: no such file, not UTF-8, not such a list, or no prompt in it.

    Example:
        >>> read_prompts(Path("prompts.txt"))  # doctest: +SKIP
        [FilePrompt(text='a cat walks on grass', dimensions=())]
    """
    if not path.is_file():
        raise InputError(f"prompts {str(path)!r} is no file; expected one prompt per line, or VBench's JSON")
    try:
        content = path.read_text(encoding="utf-8-sig")  # editors on Windows begin files with a mark
    except UnicodeDecodeError as error:
        raise InputError(f"prompts {str(path)!r} is not UTF-8 text: {error}") from error
    if path.suffix == ".json":
        found = _vbench(path, content)
    else:
        lines = (line.strip() for line in content.splitlines())
        found = [FilePrompt(line) for line in lines if line and not line.startswith("#")]
    if not found:
        raise InputError(f"prompts {str(path)!r} holds no prompt; expected one per line")
    if not merge:
        return found
    merged: dict[str, tuple[str, ...]] = {}
    for prompt in found:
        merged[prompt.text] = tuple(dict.fromkeys((*merged.get(prompt.text, ()), *prompt.dimensions)))
    return [FilePrompt(text, dimensions) for text, dimensions in merged.items()]


def _vbench(path: Path, content: str) -> list[FilePrompt]:
    try:
        entries = json.loads(content)
    except ValueError as error:
        raise InputError(f"prompts {str(path)!r} is not JSON: {error}") from error
    if not isinstance(entries, list):
        raise InputError(f"prompts {str(path)!r} holds a {type(entries).__name__}; expected a list of objects")
    found = []
    for number, entry in enumerate(entries):
        text = entry.get("prompt_en") if isinstance(entry, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"prompts {str(path)!r}: entry {number} has no text prompt_en; every entry needs one")
        dimensions = entry.get("dimension", [])
        dimensions = [dimensions] if isinstance(dimensions, str) else dimensions
        if not isinstance(dimensions, list) or not all(isinstance(item, str) for item in dimensions):
            raise InputError(
                f"prompts {str(path)!r}: dimension of entry {number} is {dimensions!r}; expected a string or a list"
            )
        found.append(FilePrompt(text.strip(), tuple(dimensions)))
    return found
