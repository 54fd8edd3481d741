"""What a plan is for, as its header alone says, and the name of its file in the cache and in shared folders."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from paroattn.files import plain_name
from paroattn.grid import TokenGrid
from paroattn.plan_file import FORMAT_VERSION
from paroattn.plan_header import ModelIdentity, parts_of
from paroattn.quantize import Precision

_FROM_THE_MOST_EXACT = ("exact", "bf16", "int8", "fp8", "int4")


@dataclass(frozen=True)
class PlanWish:
    """What was asked for when a plan was made."""

    density: float
    precision: Precision


@dataclass(frozen=True)
class PlanSummary:
    """What the header of a plan's file says, so that files of gigabytes need not be read to choose one.

    Attributes:
        name: of the file.
        density: that the plan was made for; None if its provenance does not say.
        precision: the least exact one of its heads: dense layers and sensitive heads are more exact than was asked.
        steps: of the schedule that calibration ran.
        prompts: that it was calibrated on; None if its provenance does not say.
        quality: measured figures by name.
    """

    name: str
    model: ModelIdentity
    grid: TokenGrid
    density: float | None
    precision: Precision
    steps: int
    prompts: int | None
    quality: Mapping[str, float]


def summary_of(name: str, header: Mapping[str, Any]) -> PlanSummary:
    """The summary of a file's header.

    Raises:
        PlanError: a key that is missing, or a value of another type or beyond a limit.
    """
    parts = parts_of(header)
    prompts = parts["provenance"].get("prompts")
    return PlanSummary(
        name=name,
        model=parts["model"],
        grid=parts["grid"],
        density=noted_density(parts["provenance"]),
        precision=max(parts["precisions"], key=coarseness),
        steps=len(parts["schedule"]),
        prompts=len(prompts) if isinstance(prompts, list) else None,
        quality=parts["quality"],
    )


def noted_density(provenance: Mapping[str, Any]) -> float | None:
    """The density that a plan's provenance says it was made for; None if it says none that is in (0, 1]."""
    density = provenance.get("density")
    number = isinstance(density, int | float) and not isinstance(density, bool)
    return float(density) if number and 0 < density <= 1 else None  # type: ignore[arg-type, operator]


def coarseness(precision: Precision) -> tuple[int, int]:
    """Orders precisions from the most exact to the least."""
    return _FROM_THE_MOST_EXACT.index(precision.qk), _FROM_THE_MOST_EXACT.index(precision.pv)


def note_of(wish: PlanWish) -> dict[str, Any]:
    """A wish as JSON values."""
    return {"density": float(wish.density), "precision": str(wish.precision)}


def key_of(model: ModelIdentity, grid: TokenGrid, wish: PlanWish) -> str:
    """SHA-256 of what a plan is for; it serves any number of text tokens, if it has some."""
    asked = {
        "version": FORMAT_VERSION,
        "model": asdict(model),
        "grid": grid.boxes if grid.references else grid.size,
        "text": grid.text_position if grid.text_tokens else None,
        **note_of(wish),
    }
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def file_name(model: ModelIdentity, grid: TokenGrid, wish: PlanWish) -> str:
    """A name to read, such as "Model-21x30x52-0.3-int8-0123456789ab.safetensors"; no folder is ever part of it."""
    model_class = re.sub(r"\W", "", model.class_name, flags=re.ASCII)[:100]  # systems allow 255 bytes in all
    parts = (model_class, "x".join(map(str, grid.size)), f"{wish.density:g}", plain_name(str(wish.precision)))
    return f"{'-'.join(parts)}-{key_of(model, grid, wish)[:12]}.safetensors"
