"""A folder of plans that were made before, found by what they are for: model, grid, density and precision."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from paroattn.errors import InputError, PlanError, require
from paroattn.files import check_output, write_atomically
from paroattn.grid import TokenGrid
from paroattn.plan import ModelIdentity, Plan
from paroattn.plan_file import read_header
from paroattn.plan_summary import PlanWish, file_name, key_of, note_of
from paroattn.quantize import Precision

FOLDER_VARIABLE = "PAROATTN_PLAN_CACHE"
_PLAN_FILE = re.compile(r".+-[0-9a-f]{12}\.safetensors")  # the cache deletes no other files
_UNFINISHED = ".paroattn-"  # folders that plans are written in; one that is a day old was left by a killed process
_DAY = 24 * 3600
_Content = TypeVar("_Content")


@dataclass(frozen=True)
class CachedPlan:
    """A file of the cache, and what its header says; nothing, but for a note why, where it is broken.

    `name` is without suffix, `bytes` its size; it was `used` (put or found) so many seconds after 1970. `model` is the
    transformer's class; density and precision are those that were asked for.
    """

    name: str
    path: Path
    bytes: int
    used: float
    model: str | None = None
    grid: TokenGrid | None = None
    density: float | None = None
    precision: Precision | None = None
    note: str = ""


class PlanCache:
    """Plans in a folder, one file each, which several processes may use at once.

    Args:
        folder: default: what the environment variable `PAROATTN_PLAN_CACHE` names, else "paroattn/plans" among the
            user's caches. It is made when a plan is put; other files in it are left alone.
        limit_gb: in 10^9 bytes; beyond it, `put` deletes the plans that were not used for longest.

    Example:
        >>> wish = PlanWish(0.3, Precision.parse("int8"))
        >>> cache = PlanCache(); cache.put(plan, wish)  # doctest: +SKIP
        >>> cache.find(plan.model, plan.grid, wish)  # doctest: +SKIP
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, limit_gb: float = 16.0):
        if not limit_gb >= 0:
            raise InputError(f"limit_gb is {limit_gb!r}; expected a number of at least 0")
        self.folder = _users_folder() if folder is None else Path(folder)
        self.limit_gb = limit_gb

    def find(self, model: ModelIdentity, grid: TokenGrid, wish: PlanWish) -> Plan | None:
        """The plan that was put for this model, grid (with any number of text tokens, or none) and wish.

        A file that cannot be used is deleted with a warning.
        """
        path = self.folder / file_name(model, grid, wish)
        try:
            plan = _read(path, Plan.load)
            if plan is None:
                return None
            found = (key_of(plan.model, plan.grid, wish), plan.provenance.get("wish"))
            if found != (key_of(model, grid, wish), note_of(wish)):
                raise PlanError(f"{str(path)!r} holds a plan for another model, grid or wish than its name says")
        except PlanError as error:
            with suppress(OSError):
                path.unlink()
            warnings.warn(f"a cached plan cannot be used and is deleted: {error}", stacklevel=2)
            return None
        with suppress(OSError):  # another process has deleted it, or the folder is only for reading
            os.utime(path)
        return plan

    def put(self, plan: Plan, wish: PlanWish) -> Path:
        """Write a plan to its file, in place of an earlier one, and delete what is beyond the limit.

        Raises:
            InputError: the folder cannot be written.
        """
        path = self.folder / file_name(plan.model, plan.grid, wish)
        noted = replace(plan, provenance={**plan.provenance, "wish": note_of(wish)})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # In a folder of its own: the temporary files of safetensors do not say whose they are.
            with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=self.folder) as unfinished:
                noted.save(Path(unfinished) / path.name)
                (Path(unfinished) / path.name).replace(path)
        except OSError as error:
            raise InputError(
                f"plan cache {str(self.folder)!r} cannot be written ({error}); set {FOLDER_VARIABLE} to another folder"
            ) from error
        with suppress(OSError):  # the plan is written; what cannot be deleted now is left to the next
            self._prune(path)
        return path

    def entries(self) -> list[CachedPlan]:
        """The plans, most recently used first."""
        return [entry for path, status in self._files() if (entry := _entry(path, status))]

    def remove(self, *names: str) -> list[str]:
        """Delete the plans of these names, or of beginnings that only one name has; returns the names.

        Raises:
            InputError: a name that is unknown or ambiguous; nothing is deleted.
        """
        return _delete([self._path(name) for name in names])

    def clear(self) -> list[str]:
        """Delete all plans; returns their names."""
        return _delete([path for path, _ in self._files()])

    def export(self, name: str, path: str | os.PathLike[str]) -> None:
        """Copy the plan of this name, or of a beginning that only one name has, to a file.

        Raises:
            InputError: a name that is unknown or ambiguous, a broken plan, or a path that cannot be written.
        """
        source = self._path(name)
        check_output(path, source)
        read_header(source)
        write_atomically(path, lambda temporary: shutil.copyfile(source, temporary))

    def _path(self, name: str) -> Path:
        paths = {path.stem: path for path, _ in self._files()}
        wanted = name.removesuffix(".safetensors")
        found = [stem for stem in paths if wanted and stem.startswith(wanted)]
        if wanted in paths or len(found) == 1:
            return paths[wanted if wanted in paths else found[0]]
        problem = "begins several names" if found else "is no plan"
        there = ", ".join(sorted(found or paths)) or "no plans"
        raise InputError(f"{name!r} {problem} in {str(self.folder)!r}; there are: {there}")

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        """All plan files, most recently used first."""
        found = []
        with suppress(FileNotFoundError):  # no folder yet
            for item in os.scandir(self.folder):
                with suppress(FileNotFoundError):  # another process has deleted it
                    if _PLAN_FILE.fullmatch(item.name) and item.is_file():
                        found.append((Path(item.path), item.stat()))
        return sorted(found, key=lambda file: file[1].st_mtime_ns, reverse=True)

    def _prune(self, written: Path) -> None:
        """Delete the plans beyond the limit, but never `written`, and what killed processes left."""
        total = 0
        for path, status in sorted(self._files(), key=lambda file: file[0] != written):
            total += status.st_size
            if total > self.limit_gb * 1e9 and path != written:
                path.unlink(missing_ok=True)
        for folder in self.folder.glob(f"{_UNFINISHED}*"):
            with suppress(FileNotFoundError):
                if folder.stat().st_mtime < time.time() - _DAY:
                    shutil.rmtree(folder, ignore_errors=True)


def _users_folder() -> Path:
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return Path(os.path.expanduser(chosen))
    require("paroattn[diffusers]", "platformdirs")
    from platformdirs import user_cache_path

    return user_cache_path("paroattn") / "plans"


def _entry(path: Path, status: os.stat_result) -> CachedPlan | None:
    """What a file's header says; None if another process has deleted the file."""
    entry = CachedPlan(path.stem, path, status.st_size, status.st_mtime)
    try:
        header = _read(path, read_header)
        if header is None:
            return None
        model, grid, wish = str(header["model"]["class_name"]), header["grid"], header["provenance"]["wish"]
        density, precision = float(wish["density"]), Precision.parse(wish["precision"])
        return replace(entry, model=model, grid=TokenGrid(**grid), density=density, precision=precision)
    except PlanError as error:
        return replace(entry, note=str(error))
    except (ValueError, KeyError, TypeError) as error:
        return replace(entry, note=f"its header does not say what it is for: {error!r}")


def _read(path: Path, read: Callable[[Path], _Content]) -> _Content | None:
    """What `read` makes of a file, None if there is none; it fails only for a file that no process has just changed."""
    while before := _state(path):
        try:
            return read(path)
        except PlanError:
            if _state(path) == before:
                raise
    return None


def _state(path: Path) -> tuple[int, int, int] | None:
    with suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns, status.st_size
    return None


def _delete(paths: list[Path]) -> list[str]:
    for path in paths:
        path.unlink(missing_ok=True)
    return [path.stem for path in paths]
