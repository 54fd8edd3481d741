"""Many prompts, each made once: by one process, or by several that share a folder and nothing else.

Processes of torchrun or accelerate do not wait for each other. Each takes the next prompt that nobody works at; a lock
says so, which the system frees when its process ends, however it ends. So a lost process costs the prompt it was at,
which another one makes, and a later run makes what is missing.
"""

from __future__ import annotations

import glob
import json
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from filelock import FileLock, Timeout

from paroattn.errors import InputError
from paroattn.files import check_output, plain_name, write_atomically

_SETTINGS = "settings.json"
_SLUG = 60  # characters of a prompt in its file's name


def rank_and_count() -> tuple[int, int]:
    """Of this process, as torchrun and accelerate say it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_device() -> str | None:
    """The GPU of this process, or None where there is one process or no GPU."""
    import torch

    local = os.environ.get("LOCAL_RANK")
    return None if local is None or not torch.cuda.is_available() else f"cuda:{local}"


@dataclass(frozen=True)
class Output:
    """A prompt's file and seed."""

    prompt: str
    seed: int
    path: Path


def outputs_of(prompts: Sequence[str], folder: Path, suffix: str, seed: int) -> list[Output]:
    """The files of prompts, numbered from 1, and their seeds, counted from `seed`."""
    digits = max(4, len(str(len(prompts))))
    names = [f"{number:0{digits}d}-{plain_name(prompt)[:_SLUG]}" for number, prompt in enumerate(prompts, 1)]
    return [
        Output(prompt, seed + number, folder / f"{name}{suffix}")
        for number, (prompt, name) in enumerate(zip(prompts, names, strict=True))
    ]


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Note what outputs in a folder are made with; `InputError` if those in it were made with something else."""
    path = folder / _SETTINGS
    check_output(path)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{_SETTINGS}.lock"):
        if not path.exists():
            write_atomically(path, lambda temporary: temporary.write_text(json.dumps(settings, indent=1)))
            return
        there = json.loads(path.read_text())
    changed = [
        f"{name} {there.get(name)!r}, not {value!r}" for name, value in settings.items() if there.get(name) != value
    ]
    if changed:
        raise InputError(f"outputs in {str(folder)!r} were made with {'; '.join(changed)}; choose another --output-dir")


def make_all(outputs: Sequence[Output], make: Callable[[Output], None]) -> int:
    """Make what is missing of all outputs, together with other processes; returns how many failed.

    Returns when every output is there or failed here: the last ones are waited for.
    """
    rank, count = rank_and_count()
    own_first = [*outputs[rank::count], *(item for number, item in enumerate(outputs) if number % count != rank)]
    failed: set[Path] = set()
    for waits in (False, True):
        for output in own_first:
            if output.path.exists() or output.path in failed:
                continue
            lock = FileLock(output.path.with_name(f".{output.path.name}.lock"), blocking=waits)
            try:
                with lock:
                    if not output.path.exists():
                        for begun in output.path.parent.glob(f".{glob.escape(output.path.stem)}-*{output.path.suffix}"):
                            begun.unlink()  # by a process that was killed
                        _make(output, make, outputs, failed)
                    if output.path.exists():
                        Path(lock.lock_file).unlink(missing_ok=True)
            except Timeout:
                continue
    return len(failed)


def _make(output: Output, make: Callable[[Output], None], outputs: Sequence[Output], failed: set[Path]) -> None:
    rank, count = rank_and_count()
    who = f"rank {rank}: " if count > 1 else ""
    try:
        make(output)
    except Exception as error:  # the other prompts can be made nevertheless
        failed.add(output.path)
        if not isinstance(error, InputError):
            traceback.print_exc()
        click.echo(f"{who}{output.path.name} failed: {' '.join(str(error).split())}", err=True)
        return
    done = sum(item.path.exists() for item in outputs)
    click.echo(f"{who}wrote {output.path} ({done} of {len(outputs)})")
