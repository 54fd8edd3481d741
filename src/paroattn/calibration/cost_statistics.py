"""What calibration measured of skipping blocks: plans of any density are selected from it, without the model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paroattn.calibration.cost_codes import decoded, with_added
from paroattn.errors import InputError
from paroattn.files import load_tensors, save_tensors
from paroattn.grid import TokenGrid
from paroattn.plan import ModelIdentity, call_shares

SUFFIX = ".statistics"
"""What the name of a plan's file gets for that of its statistics."""
_HEADER_KEY = "paroattn_statistics"
_VERSION = 1


def statistics_path(plan: str | os.PathLike[str]) -> Path:
    """Where the statistics of a plan file are."""
    return Path(f"{os.fspath(plan)}{SUFFIX}")


@dataclass(frozen=True, eq=False)
class CostStatistics:
    """What calibration measured of skipping blocks; plans of any density are selected from it.

    Attributes:
        model, grid: what it was measured on.
        order_names: distinct orders; order_index uint8 [layers, heads]: the order chosen for each head.
        schedule: noise level of each step, descending.
        bucket_edges: start of each step bucket, fractions of the schedule.
        block_q: queries per block.
        block_sums: of P, [buckets, layers, heads, q blocks, kv blocks], or None where they were not asked for.
        costs: of skipping one block, dropped or approximated by its means, summed over `samples`, bfloat16 or codes in
            uint8 (`cost_codes`), [2, buckets, layers, heads, q, kv]; comparable within a head.
        tops: what the codes of each head are relative to, float32 [buckets, layers, heads], or None in bfloat16.
        errors: squared change of the head's output at the densities `LEVELS`, [2, buckets, layers, heads, levels].
        norms: squared norm of the head's output, [buckets, layers, heads].
        weights: squared change of the final result per unit of error in one step of a bucket, [buckets, layers, heads].
        int4_effects: squared change of the final result when a head is computed in INT4, [layers, heads].
        usage: share of each bucket's steps in which a layer is called, float32 [buckets, layers].
        samples: how many attention calls were looked at, float32 [buckets, layers].
        provenance: prompts, seed, steps and the like; JSON values.
    """

    model: ModelIdentity
    grid: TokenGrid
    order_names: tuple[str, ...]
    order_index: Tensor
    schedule: tuple[float, ...]
    bucket_edges: tuple[float, ...]
    block_q: int
    block_sums: Tensor | None
    costs: Tensor
    tops: Tensor | None
    errors: Tensor
    norms: Tensor
    weights: Tensor
    int4_effects: Tensor
    usage: Tensor
    samples: Tensor
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name in ("errors", "norms", "weights", "int4_effects"):
            if not bool(getattr(self, name).isfinite().all()):
                raise InputError(
                    f"{name} of the calibration are not finite; calibrate with the pipeline in float32 or bfloat16"
                )

    @property
    def shares(self) -> Tensor:
        """Share of all calls of heads in a schedule, float64 like `norms`; it sums to 1."""
        calls = call_shares(self.bucket_edges, self.usage).unsqueeze(-1).expand(self.norms.shape)
        return calls / calls.sum()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, whole or not at all; most of it is a byte or two per block.

        Raises:
            OSError: the file cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        header: dict[str, Any] = {"version": _VERSION}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                tensors[field.name] = value.contiguous()
            elif value is not None:
                header[field.name] = value
        header |= {"model": asdict(self.model), "grid": self.grid.as_json()}
        save_tensors(path, tensors, {_HEADER_KEY: json.dumps(header)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CostStatistics:
        """Read what `save` wrote; costs of blocks stay in the file until they are looked at.

        Raises:
            InputError: no such file, or one that holds no statistics of this version.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(
                f"there are no statistics {str(path)!r}; keep them by `paroattn calibrate --keep-statistics`"
            )
        try:
            tensors, header = load_tensors(path, _HEADER_KEY)
            if header.pop("version") == _VERSION:
                header |= {"model": ModelIdentity(**header["model"]), "grid": TokenGrid(**header["grid"])}
                header |= {name: tuple(header[name]) for name in ("order_names", "schedule", "bucket_edges")}
                return cls(**{"block_sums": None, "tops": None, **header, **tensors})
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"{str(path)!r} holds no readable statistics ({error}); calibrate again") from error
        raise InputError(f"statistics {str(path)!r} are of another version of paroattn; calibrate again")

    def merged(self, others: Sequence[CostStatistics]) -> tuple[CostStatistics, int]:
        """These statistics and those of other prompts, as if all prompts had been calibrated at once.

        Costs of a head can be added where its token order is the same. Where it is another one, the head keeps what
        these statistics have; calibrations that start from one another (`paroattn.calibrate(start=)`) have equal ones.

        Returns:
            The statistics, and how many heads of the others had another order.

        Raises:
            InputError: statistics of another model, grid, schedule, or division into buckets and blocks.
        """
        found, skipped = self, 0
        for other in others:
            _check_alike(self, other)
            same = _same_orders(self, other)
            skipped += int((~same).sum())
            found = _added(found, other, same)
        prompts = [prompt for own in (self, *others) for prompt in own.provenance.get("prompts") or ()]
        return replace(found, provenance={**self.provenance, "prompts": prompts}), skipped


def _check_alike(first: CostStatistics, second: CostStatistics) -> None:
    """Raise `InputError` unless what was measured can be added up."""
    named = {"model": "model", "block_q": "block_q", "schedule": "schedule", "bucket_edges": "step buckets"}
    pairs = {label: (getattr(first, name), getattr(second, name)) for name, label in named.items()}
    pairs["grid"] = (str(first.grid), str(second.grid))
    pairs["kind of costs"] = (str(first.costs.dtype), str(second.costs.dtype))
    for label, (one, two) in pairs.items():
        if one != two:
            raise InputError(
                f"calibrations cannot be merged: the {label} of the first is {one}, of another one {two}; calibrate "
                "with the same arguments, and start from the first plan"
            )


def _same_orders(first: CostStatistics, second: CostStatistics) -> Tensor:
    """Which heads have the same token order in both, bool [layers, heads]."""
    names = {name: number for number, name in enumerate(first.order_names)}
    numbers = torch.tensor([names.get(name, -1) for name in second.order_names])
    return numbers[second.order_index.long()] == first.order_index.long()


def _added(first: CostStatistics, second: CostStatistics, same: Tensor) -> CostStatistics:
    """Statistics with those of another calibration in the heads that have the same order."""
    ones, twos = first.samples.double().unsqueeze(-1), second.samples.double().unsqueeze(-1)
    share = (twos / (ones + twos).clamp(min=1e-30)) * same  # of the second, float64 [buckets, layers, heads]
    costs, tops = torch.empty_like(first.costs), None if first.tops is None else first.tops.clone()
    for bucket, layer in torch.cartesian_prod(*map(torch.arange, ones.shape[:2])).tolist():
        place = (slice(None), bucket, layer)
        costs[place] = first.costs[place]
        heads = same[layer].nonzero().flatten()
        mine, its = first.costs[place][:, heads], second.costs[place][:, heads]
        if tops is None or second.tops is None:
            costs[place][:, heads] = mine + its
        elif len(heads):
            largest = tops[bucket, layer, heads]
            costs[place][:, heads] = with_added(mine, decoded(its, second.tops[bucket, layer, heads]), largest)
            tops[bucket, layer, heads] = largest
    mean_weights = first.weights.clamp(min=1e-30).log().lerp(second.weights.clamp(min=1e-30).log(), share).exp()
    block_sums = None
    if first.block_sums is not None and second.block_sums is not None:
        block_sums = first.block_sums.lerp(second.block_sums, share.float()[..., None, None])
    return replace(
        first,
        block_sums=block_sums,
        costs=costs,
        tops=tops,
        errors=first.errors.lerp(second.errors, share.unsqueeze(-1)),
        norms=first.norms.lerp(second.norms, share),
        weights=torch.where(first.weights > 0, mean_weights, 0.0),
        int4_effects=(first.int4_effects + second.int4_effects) / 2,
        samples=first.samples + second.samples,
    )
