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
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from filelock import FileLock, Timeout

from paroattn.errors import InputError, MissingPartError, PlanError
from paroattn.files import check_output, plain_name, write_atomically

_SETTINGS = "settings.json"
_AT_WORK = ".at-work-"
_SLUG = 60  # characters of a prompt in its file's name


def rank_and_count() -> tuple[int, int]:
    """Of this process, as torchrun and accelerate say it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_device(device: str | None = None) -> str | None:
    """The device of this process: of torchrun's processes each has a GPU of its own, unless a certain one is given."""
    import torch

    local = os.environ.get("LOCAL_RANK")
    if local is None or device not in (None, "cuda") or not torch.cuda.is_available():
        return device
    count = torch.cuda.device_count()
    if int(local) >= count:
        raise click.UsageError(f"process {local} of this machine has no GPU; expected --nproc-per-node {count} or less")
    torch.cuda.set_device(int(local))
    return f"cuda:{local}"


@dataclass(frozen=True)
class Output:
    """A prompt's file and seed."""

    prompt: str
    seed: int
    path: Path


def outputs_of(prompts: Sequence[str], folder: Path, suffix: str, seed: int) -> list[Output]:
    """The files of prompts, numbered from 1, and their seeds, counted from `seed`."""
    digits = max(4, len(str(len(prompts))))
    slugs = [plain_name(prompt)[:_SLUG].strip("-.") for prompt in prompts]
    names = [f"{number:0{digits}d}-{slug}".rstrip("-") for number, slug in enumerate(slugs, 1)]
    return [
        Output(prompt, seed + number, folder / f"{name}{suffix}")
        for number, (prompt, name) in enumerate(zip(prompts, names, strict=True))
    ]


def check_settings(folder: Path, prompts: Sequence[str], settings: Mapping[str, Any]) -> None:
    """`InputError` if outputs cannot be in a folder, or those in it were made with something else.

    Prompts may be added at the end, or left out there.
    """
    path = folder / _SETTINGS
    check_output(path)
    there = _read_settings(path)
    if there is None:
        return
    changed = [
        f"{name} {there.get(name)!r}, not {value!r}" for name, value in settings.items() if there.get(name) != value
    ]
    for number, (old, new) in enumerate(zip(there["prompts"], prompts, strict=False), 1):
        if old != new:
            changed.append(f"prompt {number} {old!r}, not {new!r}")
            break
    if changed:
        raise InputError(f"outputs in {str(folder)!r} were made with {'; '.join(changed)}; choose another --output-dir")


def note_settings(folder: Path, prompts: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Note what outputs in a folder are made with, for `check_settings`, which is asked once more."""
    path = folder / _SETTINGS
    with FileLock(folder / f".{_SETTINGS}.lock"):
        check_settings(folder, prompts, settings)
        there = _read_settings(path)
        if there is None or len(there["prompts"]) < len(prompts):
            content = json.dumps({**settings, "prompts": list(prompts)}, indent=1, ensure_ascii=False)
            write_atomically(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))


def _read_settings(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        there = None
    if not isinstance(there, dict) or not isinstance(there.get("prompts"), list):
        raise InputError(
            f"{str(path)!r} does not say what outputs beside it were made with; choose another --output-dir"
        )
    return there


@contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """While it is entered, `finish` of other processes waits for this one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_AT_WORK}{uuid.uuid4().hex}"
    with FileLock(path):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def make_all(outputs: Sequence[Output], make: Callable[[Output], None]) -> int:
    """Make what is missing of all outputs, together with other processes; returns how many were made here.

    Returns when every output is there or failed here: the last ones are waited for.

    Raises:
        PlanError, MissingPartError, OSError: from `make`, since they are not about one prompt.
    """
    rank, count = rank_and_count()
    own_first = [*outputs[rank::count], *(item for number, item in enumerate(outputs) if number % count != rank)]
    made = 0
    failed: set[Path] = set()
    for waits in (False, True):
        for output in own_first:
            if output.path.exists() or output.path in failed:
                continue
            lock = FileLock(output.path.with_name(f".{output.path.name}.lock"), timeout=-1 if waits else 0)
            with suppress(Timeout), lock:
                if not output.path.exists():
                    for begun in output.path.parent.glob(f".{glob.escape(output.path.stem)}-*{output.path.suffix}"):
                        begun.unlink()  # by a process that was killed
                    if _make(output, make, outputs):
                        made += 1
                    else:
                        failed.add(output.path)
                if output.path.exists():
                    Path(lock.lock_file).unlink(missing_ok=True)
    return made


def _make(output: Output, make: Callable[[Output], None], outputs: Sequence[Output]) -> bool:
    try:
        make(output)
    except (PlanError, MissingPartError, OSError):  # other prompts would end like this, too
        raise
    except Exception as error:
        if not isinstance(error, InputError):
            traceback.print_exc()
        click.echo(f"{_who()}{output.path.name} failed: {' '.join(str(error).split())}", err=True)
        return False
    done = sum(item.path.exists() for item in outputs)
    click.echo(f"{_who()}wrote {output.path} ({done} of {len(outputs)})")
    return True


def finish(outputs: Sequence[Output], folder: Path, made: int) -> None:
    """Say what was made, and raise `ClickException` if outputs are missing, which failed in every process.

    A process that ends with an error makes torchrun end the others. So what failed here, on a broken GPU say, is left
    to them first.
    """
    complete = all(output.path.exists() for output in outputs)
    if not complete and rank_and_count()[1] > 1:
        click.echo(f"{_who()}waits for the others, which may make what failed here")
    for path in folder.glob(f"{_AT_WORK}*"):
        with suppress(Timeout), FileLock(path, timeout=0 if complete else -1):
            path.unlink(missing_ok=True)  # of a process that was killed
    missing = sum(not output.path.exists() for output in outputs)
    there = len(outputs) - missing
    click.echo(f"{_who()}made {made} of {len(outputs)} outputs here; {there} are in {folder}")
    if missing:
        raise click.ClickException(f"{_who()}{missing} of {len(outputs)} prompts failed")


def _who() -> str:
    rank, count = rank_and_count()
    return f"rank {rank}: " if count > 1 else ""
