"""What a plan says beside its tensors: the JSON header of its file, and the limits of all sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from paroattn.errors import PlanError
from paroattn.grid import TokenGrid
from paroattn.quantize import Precision

MOST = {
    "layers": 1024,
    "heads": 1024,
    "head_dim": 65_536,
    "step buckets": 1024,
    "steps of the schedule": 10_000,
    "tokens": 2**20,
    "token orders": 256,
    "precisions": 256,
    "characters of the model's class_name": 256,
    "characters of the model's config_hash": 256,
}
"""Most of everything that a plan counts; it has at least one of each, but for characters."""
KEYS = (
    "version", "digest", "model", "grid", "order_names", "precisions", "schedule", "bucket_edges", "block_q",
    "block_kv", "provenance", "quality",
)  # fmt: skip
"""The keys of a header; "digest" is version 0's only."""


@dataclass(frozen=True)
class ModelIdentity:
    """What a plan remembers of its model, compared with the model when the plan is applied."""

    class_name: str
    config_hash: str
    layers: int
    heads: int
    head_dim: int


def header_of(plan: Any) -> dict[str, Any]:
    """The header of a plan's file, JSON values; "version" is the file's."""
    return {
        **plan.unknown,
        "model": asdict(plan.model),
        "grid": plan.grid.as_json(),
        "order_names": plan.order_names,
        "precisions": [str(precision) for precision in plan.precisions],
        "schedule": plan.schedule,
        "bucket_edges": plan.bucket_edges,
        "block_q": plan.block_q,
        "block_kv": plan.block_kv,
        "provenance": dict(plan.provenance),
        "quality": dict(plan.quality),
    }


def parts_of(header: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Plan` that a header holds, of the right types and within the limits.

    Raises:
        PlanError: a key that is missing, or a value of another type or beyond a limit; the message names it.
    """
    model, grid = _object(header, "model"), _object(header, "grid")
    try:
        parts: dict[str, Any] = {
            "model": ModelIdentity(**model),
            "grid": TokenGrid(**grid),
            "precisions": tuple(Precision.parse(name) for name in _list(header, "precisions", str)),
        }
    except (TypeError, ValueError) as error:
        raise PlanError(f"the plan's header is incomplete or wrong: {error}") from error
    parts |= {
        "order_names": _list(header, "order_names", str),
        "schedule": _list(header, "schedule", float),
        "bucket_edges": _list(header, "bucket_edges", float),
        "block_q": _value(header, "block_q"),
        "block_kv": _value(header, "block_kv"),
        "provenance": _object(header, "provenance"),
        "quality": _object(header, "quality") if "quality" in header else {},
        "unknown": {key: value for key, value in header.items() if key not in KEYS},
    }
    check_parts(**parts)
    return parts


def check_parts(
    *,
    model: ModelIdentity,
    grid: TokenGrid,
    order_names: tuple[str, ...],
    precisions: tuple[Precision, ...],
    schedule: tuple[float, ...],
    bucket_edges: tuple[float, ...],
    block_q: int,
    block_kv: int,
    provenance: Mapping[str, Any],
    quality: Mapping[str, Any],
    unknown: Mapping[str, Any],
) -> None:
    """Raise `PlanError` for sizes beyond the limits and for values that are none; arguments as of `Plan`."""
    for name in ("class_name", "config_hash"):
        text = getattr(model, name)
        if not isinstance(text, str) or not text.isprintable():
            raise PlanError(f"the model's {name} is {text!r}; expected printable text")
        _check_count(f"characters of the model's {name}", len(text), least=0)
    for name in ("layers", "heads", "head_dim"):
        _check_count(name, getattr(model, name))
    _check_count("tokens", grid.tokens)
    counted = {"token orders": order_names, "precisions": precisions, "step buckets": bucket_edges}
    for name, values in {**counted, "steps of the schedule": schedule}.items():
        _check_count(name, len(values))
    if (block_q, block_kv) not in ((64, 64), (128, 64)) or not type(block_q) is type(block_kv) is int:
        raise PlanError(f"blocks are {block_q!r} x {block_kv!r}; expected 64 x 64 or 128 x 64")
    for name, figure in quality.items():
        if isinstance(figure, bool) or not isinstance(figure, int | float) or not math.isfinite(figure):
            raise PlanError(f"quality {name!r} is {figure!r}; expected a finite number")
    known = sorted(set(unknown) & set(KEYS))
    if known:
        raise PlanError(f"unknown has the keys {known}, which are known; give them by their own names")


def _check_count(name: str, count: object, least: int = 1) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or not least <= count <= MOST[name]:
        raise PlanError(f"the plan has {count!r} {name}; expected {least} to {MOST[name]:,}")


def _value(header: Mapping[str, Any], key: str) -> Any:
    if key not in header:
        raise PlanError(f"the plan's header has no {key}; make the plan anew")
    return header[key]


def _object(header: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = _value(header, key)
    if not isinstance(value, dict):
        raise PlanError(f"{key} is {value!r}; expected an object")
    return value


def _list(header: Mapping[str, Any], key: str, kind: type) -> tuple[Any, ...]:
    values = _value(header, key)
    kinds = (int, float) if kind is float else (kind,)
    if not isinstance(values, list) or not all(type(value) in kinds for value in values):
        raise PlanError(f"{key} is {values!r}; expected a list of {'numbers' if kind is float else 'strings'}")
    return tuple(values)
