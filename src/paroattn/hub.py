"""Plans that are shared: folders, and repositories of the Hugging Face Hub, that hold many plan files each.

Both look alike: plan files at the top, beside each a picture of its densities, and a card (README.md) that lists them.
Any plan file counts, whatever its name; what it is for is read from its header.
"""

from __future__ import annotations

import json
import math
import os
import struct
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from paroattn.errors import InputError, PlanError, require
from paroattn.files import write_atomically
from paroattn.grid import TokenGrid
from paroattn.keep import check_density
from paroattn.plan_card import picture_name, save_picture, updated_card
from paroattn.plan_file import HEADER_KEY, OtherFileError, one_line, parse_header, read_header
from paroattn.plan_header import ModelIdentity, header_of
from paroattn.plan_summary import PlanSummary, PlanWish, coarseness, file_name, noted_density, summary_of
from paroattn.quantize import Precision

CARD = "README.md"
_SUFFIX = ".safetensors"
_AT_ONCE = 8  # headers that are asked for at the same time


@dataclass(frozen=True)
class _Listing:
    """The plans of a folder or repository, and a line for each file that cannot be read."""

    place: str
    plans: list[PlanSummary]
    broken: list[str]


def find_plan(
    repo: str | os.PathLike[str],
    *,
    model: ModelIdentity | None,
    grid: TokenGrid | None,
    density: float,
    precision: str | Precision | None,
    revision: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **download_arguments: Any,
) -> Path:
    """The file of the nearest plan of a folder or repository, downloaded; arguments and errors as of
    `Plan.from_pretrained`.

    Args:
        revision: branch, tag or commit of the repository.
        token: for private repositories; default: that of `hf auth login`.
        endpoint: address of the hub; default: what `HF_ENDPOINT` says, else the public one.
        cache_dir: where downloads are kept.
        local_files_only: choose among the plans that were downloaded before, as with `HF_HUB_OFFLINE=1`.
    """
    if not isinstance(model, ModelIdentity | None):
        raise InputError(f"model is a {type(model).__name__}; expected what paroattn.identify(pipe) returns")
    if not isinstance(grid, TokenGrid | None):
        raise InputError(f"grid is {grid!r}; expected a TokenGrid")
    check_density(density)
    choose = partial(
        _nearest,
        model=model,
        grid=grid,
        density=density,
        precision=None if precision is None else Precision.parse(precision),
    )
    if Path(repo).is_dir():
        return Path(repo) / choose(_in_folder(Path(repo)))
    with _one_line_errors(repo, revision):
        from huggingface_hub import HfApi, constants, snapshot_download

        repo = str(repo)
        if local_files_only or constants.HF_HUB_OFFLINE:
            folder = snapshot_download(repo, revision=revision, cache_dir=cache_dir, local_files_only=True)
            return Path(folder) / choose(_in_folder(Path(folder)))
        api = HfApi(endpoint=endpoint, token=token)
        files = [file.rfilename for file in api.model_info(repo, revision=revision).siblings or []]
        name = choose(_in_repository(api, repo, revision, files))
        return Path(api.hf_hub_download(repo, name, revision=revision, cache_dir=cache_dir, **download_arguments))


def add_plan(plan: Any, folder: str | os.PathLike[str], **card_arguments: Any) -> Path:
    """Write a plan into a folder, beside those that are there, with a picture of its densities and a new card.

    A plan for the same model, size, density and precision is replaced. The plan's file is named after them, and its
    provenance says the density if it did not.

    Args:
        plan: a `Plan`.
        folder: is made if there is none.
        card_arguments: `base_model` and `license`, which the card says from then on (`plan_card.updated_card`).

    Returns:
        The plan's file.

    Raises:
        InputError: a card that cannot be read, or leads out of the folder.
        MissingPartError: without huggingface_hub or Pillow.

    Example:
        >>> plan.save_pretrained("plans", license="apache-2.0")  # doctest: +SKIP
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = [item.name for item in folder.iterdir()]
    card = _inside(folder, CARD).read_bytes() if CARD in files else None
    return _write(plan, folder, _in_folder(folder), files, card, "owner/name", **card_arguments)


def push_plan(
    plan: Any,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    **commit_arguments: Any,
) -> str:
    """Add a plan to a Hub repository as `add_plan` does to a folder, in one commit.

    Args:
        plan: a `Plan`.
        repo: its name, such as "owner/name"; made if there is none.
        private: whether to make it a private one.
        revision: branch to commit to.
        token: with the right to write; default: that of `hf auth login`.
        endpoint: address of the hub; default: what `HF_ENDPOINT` says, else the public one.
        base_model, license: what the card says from then on (`plan_card.updated_card`).
        commit_arguments: `commit_message`, `create_pr` and the like, as of `huggingface_hub.HfApi.create_commit`.

    Returns:
        Address of the commit, or of the pull request.

    Raises:
        PlanError: the repository cannot be reached or written; the message says what to do.
        InputError: a card in the repository that cannot be read.
        MissingPartError: without huggingface_hub or Pillow.

    Example:
        >>> plan.push_to_hub("owner/name", base_model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")  # doctest: +SKIP
    """
    with _one_line_errors(repo, revision), tempfile.TemporaryDirectory() as temporary:
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi(endpoint=endpoint, token=token)
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        there = api.model_info(repo, revision=revision)
        files = [file.rfilename for file in there.siblings or []]
        card, folder = None, Path(temporary) / "new"
        folder.mkdir()
        if CARD in files:
            card = Path(api.hf_hub_download(repo, CARD, revision=there.sha, cache_dir=temporary)).read_bytes()
        listing = _in_repository(api, repo, there.sha, files)
        path = _write(plan, folder, listing, files, card, repo, base_model=base_model, license=license)
        try:
            commit = api.create_commit(
                repo,
                [CommitOperationAdd(item.name, item) for item in sorted(folder.iterdir())],
                revision=revision,
                parent_commit=there.sha,  # the card lists the plans of this commit
                **{"commit_message": f"Add {path.stem}", **commit_arguments},
            )
        except RuntimeError as error:  # what huggingface_hub makes of an upload that fails
            raise ConnectionError(str(error)) from error
        return str(commit.pr_url or commit.commit_url)


def _write(
    plan: Any,
    folder: Path,
    listing: _Listing,
    files: Collection[str],
    card: bytes | None,
    repo: str,
    **card_arguments: str | None,
) -> Path:
    """Write a plan's file, its picture and the card to a folder; `listing` and `files` are what the repository has."""
    require("paroattn[diffusers]", "huggingface_hub", "PIL")  # before anything is written
    density = noted_density(plan.provenance)
    if density is None:
        density = round(plan.density(), 4)
        plan = replace(plan, provenance={**plan.provenance, "density": density})
    precision = max(plan.precisions, key=coarseness)
    path = folder / file_name(plan.model, plan.grid, PlanWish(density, precision))
    others = [other for other in listing.plans if other.name != path.name]
    broken = [line for line in listing.broken if not line.startswith(repr(path.name))]
    if broken:
        warnings.warn(
            f"the card of {listing.place!r} leaves out what cannot be read: {'; '.join(broken)}", stacklevel=4
        )
    picture = picture_name(path.name)
    own = summary_of(path.name, json.loads(json.dumps(header_of(plan))))
    text = updated_card(card, [*others, own], {*files, picture}, repo, **card_arguments)
    plan.save(path)
    save_picture(folder / picture, plan.head_densities())
    write_atomically(folder / CARD, lambda temporary: temporary.write_bytes(text.encode()))
    return path


def _nearest(
    listing: _Listing, model: ModelIdentity | None, grid: TokenGrid | None, density: float, precision: Precision | None
) -> str:
    """Name of the file of the plan that `Plan.from_pretrained` takes."""
    place, broken = repr(listing.place), "; ".join(listing.broken)
    if not listing.plans:
        raise PlanError(f"{place} holds no plan" + (f" that can be read: {broken}" if broken else ""))
    if broken:
        warnings.warn(f"{place} holds plans that cannot be read and are left out: {broken}", stacklevel=4)
    models = {plan.model for plan in listing.plans}
    there = "; ".join(sorted(map(_described, models)))
    if model is None and len(models) > 1:
        raise PlanError(f"{place} holds plans for {there}: say which by model=paroattn.identify(pipe)")
    wanted = model or listing.plans[0].model
    plans = [plan for plan in listing.plans if plan.model == wanted]
    if not plans:
        raise PlanError(f"{place} holds no plan for {_described(wanted)}; it has plans for {there}")
    fitting = [plan for plan in plans if precision in (None, plan.precision)]
    if not fitting:
        there = ", ".join(sorted({str(plan.precision) for plan in plans}))
        raise PlanError(f"{place} holds no plan of precision {precision}; it has plans of {there}")

    def distance(plan: PlanSummary) -> tuple[int, float, float, tuple[int, int], str]:
        asked_for = grid or plan.grid
        of_boxes = abs(len(plan.grid.references) - len(asked_for.references))
        sizes = zip(plan.grid.size, asked_for.size, strict=True)
        of_size = sum(abs(math.log(own / asked)) for own, asked in sizes)
        of_density = math.inf if plan.density is None else abs(math.log(plan.density / density))
        return of_boxes, of_size, of_density, coarseness(plan.precision), plan.name

    return min(fitting, key=distance).name


def _described(model: ModelIdentity) -> str:
    return (
        f"{model.class_name} ({model.layers} layers of {model.heads} heads, head_dim {model.head_dim}, "
        f"config {model.config_hash[:8]})"
    )


def _in_folder(folder: Path) -> _Listing:
    files = [item.name for item in folder.iterdir()]
    return _read_all(str(folder), files, lambda name: read_header(_inside(folder, name)))


def _in_repository(api: Any, repo: str, revision: str | None, files: list[str]) -> _Listing:
    """The plans of a repository, of which only the headers are downloaded."""
    return _read_all(repo, files, partial(_remote_header, api, repo, revision))


def _remote_header(api: Any, repo: str, revision: str | None, name: str) -> dict[str, Any]:
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        text = api.parse_safetensors_file_metadata(repo, name, revision=revision).metadata.get(HEADER_KEY)
    # What huggingface_hub, which takes the file for a sound one, makes of one that is none.
    except (SafetensorsParsingError, AttributeError, RecursionError, TypeError, ValueError, struct.error) as error:
        raise PlanError(f"not a readable safetensors file ({one_line(error)})") from error
    return parse_header(text)


def _read_all(place: str, files: list[str], read: Callable[[str], Mapping[str, Any]]) -> _Listing:
    """Summaries of the plans among the files at the top of a folder or repository; other safetensors files are passed
    over.
    """

    def entry(name: str) -> PlanSummary | str | None:
        try:
            return summary_of(name, read(name))
        except OtherFileError:
            return None
        except PlanError as error:
            return f"{name!r}: {error}"

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        entries = list(pool.map(entry, sorted(name for name in files if name.endswith(_SUFFIX) and _is_plain(name))))
    plans = [found for found in entries if isinstance(found, PlanSummary)]
    return _Listing(place, plans, [found for found in entries if isinstance(found, str)])


def _is_plain(name: str) -> bool:
    """Whether a name from a repository is that of a file, without folders, on every system."""
    return name.isprintable() and name == PurePosixPath(name).name == PureWindowsPath(name).name


def _inside(folder: Path, name: str) -> Path:
    """A file of a folder; a link may not lead out of it, but from a snapshot in the Hub's cache to its blobs."""
    target, real = (Path(os.path.realpath(path)) for path in (folder / name, folder))
    snapshot = real.parent.name == "snapshots" and target.parent == real.parents[1] / "blobs"
    if not snapshot and not target.is_relative_to(real):
        raise PlanError(f"{str(folder / name)!r} is a link that leads out of the folder; copy the file instead")
    return folder / name


@contextmanager
def _one_line_errors(repo: str | os.PathLike[str], revision: str | None) -> Iterator[None]:
    """Turns what the Hub and the network answer into a line that says what to do."""
    require("paroattn[diffusers]", "huggingface_hub")
    from huggingface_hub import errors

    known = {
        errors.GatedRepoError: "asks for consent: give it on the repository's page, and log in with `hf auth login`",
        errors.RepositoryNotFoundError: "is not there, or private: check its name, log in with `hf auth login` or give "
        "token=",
        errors.RevisionNotFoundError: f"has no revision {revision!r}; give a branch, a tag or a commit",
        errors.HFValidationError: "is no folder, and no name of a repository, such as owner/name",
        errors.LocalEntryNotFoundError: "was not downloaded before, and cannot be downloaded now",
    }
    of_network: Any = errors.HfHubHTTPError.__bases__[0]  # of another library in other versions
    try:
        yield
    except (*known, of_network, OSError) as error:
        advice = next((text for kind, text in known.items() if isinstance(error, kind)), None)
        if getattr(getattr(error, "response", None), "status_code", None) == 412:
            advice = "was changed meanwhile; push again"
        elif advice is None:
            advice = (
                f"cannot be used; check the network, and what your token (`hf auth login`) allows: {one_line(error)}"
            )
        raise PlanError(f"repository {str(repo)!r} {advice}") from error
