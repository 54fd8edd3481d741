"""Plans: what calibration found for one model, validated, immutable, kept in one file (docs/plan-format.md)."""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paroattn.block_mask import BlockMask, count_bits, pack_bits, text_blocks, usual_block_q
from paroattn.errors import InputError, PlanError
from paroattn.grid import TokenGrid
from paroattn.hub import add_plan, find_plan, push_plan
from paroattn.keep import check_density, check_reachable, keep_best
from paroattn.mask_coding import MaskRules
from paroattn.order import check_order, fitting_order, same_blocks, token_order
from paroattn.plan_file import TensorKinds, check_tensor, digest_of, open_plan_file, write_plan_file
from paroattn.plan_header import ModelIdentity, check_parts, header_of, parts_of
from paroattn.quantize import Precision
from paroattn.transfer import block_distances, resample_masks

_TENSOR_DTYPES = {
    "order_index": torch.uint8,
    "precision_index": torch.uint8,
    "mask_table": torch.uint8,
    "mask_index": torch.int32,
    "compensate": torch.bool,
    "usage": torch.float32,
}
_HEADER_PARTS = (
    "model", "grid", "order_names", "precisions", "schedule", "bucket_edges", "block_q", "block_kv", "provenance",
    "quality", "unknown",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """A plan's part for one layer, the input of `paroattn.prepare`.

    Attributes:
        precisions: one per head; their number is the number of heads.
        orders: int32 or int64 [distinct orders, N], gather indices, or None for the model's own order.
        order_index: integer [H] or [step buckets, H] into orders; None if there is one order per head.
        mask_table: uint8 [masks, q blocks, ceil(kv blocks / 8)], or None for dense attention.
        mask_index: int32 [step buckets, H] into mask_table; None if there is one mask per head, for all steps.
        compensate: bool [step buckets, H], or None for nowhere.
        tokens: sequence length N, or None for any.
        grid: with a grid, calls may have another number of text tokens than it says.
        block_q, block_kv: tokens per block.
    """

    precisions: tuple[Precision, ...]
    orders: Tensor | None = None
    order_index: Tensor | None = None
    mask_table: Tensor | None = None
    mask_index: Tensor | None = None
    compensate: Tensor | None = None
    tokens: int | None = None
    grid: TokenGrid | None = None
    block_q: int = 64
    block_kv: int = 64

    @property
    def heads(self) -> int:
        return len(self.precisions)

    @property
    def permutation(self) -> Tensor | None:
        """The heads' orders as gather indices [H, N], or None; not for orders by step bucket."""
        if self.orders is None or self.order_index is None:
            return self.orders
        return self.orders.index_select(0, self.order_index)

    def of_heads(self, heads: Tensor) -> LayerPlan:
        """The part for some heads of a layer that has all of its indices.

        Args:
            heads: integer [heads] or [step buckets, heads], their numbers in the order wanted; in all step buckets of
                the same precisions.
        """
        assert self.order_index is not None
        assert self.mask_index is not None
        assert self.compensate is not None
        by_bucket = heads.expand(len(self.mask_index), heads.shape[-1]).to(self.mask_index.device, torch.int64)
        order = self.order_index.expand(len(by_bucket), -1).gather(1, by_bucket)
        return replace(
            self,
            precisions=tuple(self.precisions[head] for head in by_bucket[0].tolist()),
            order_index=order[0] if bool((order == order[0]).all()) else order,
            mask_index=self.mask_index.gather(1, by_bucket),
            compensate=self.compensate.gather(1, by_bucket),
        )


@dataclass(frozen=True, eq=False)
class Plan:
    """Token orders, block masks and precisions of one model at one grid; lives on the CPU.

    Attributes:
        model: the model the plan was made for.
        grid: the token grid it was made for.
        order_names: distinct token orders used, see `paroattn.order.token_order`.
        order_index: uint8 [layers, heads] into order_names.
        precisions: distinct precisions used.
        precision_index: uint8 [layers, heads] into precisions.
        schedule: noise level of every step that calibration ran, descending. A noise level is a timestep as a share
            of the training timesteps: 1 is pure noise, 0 none; of flow models it is sigma.
        bucket_edges: where each step bucket starts, as a fraction of the schedule; ascending from 0.
        mask_table: uint8 [unique masks, q blocks, ceil(kv blocks / 8)], see `paroattn.block_mask.pack_bits`.
        mask_index: int32 [step buckets, layers, heads] into mask_table.
        compensate: bool [step buckets, layers, heads], whether skipped blocks are approximated by their means.
        usage: float32 [step buckets, layers], the share of a bucket's steps in which a layer is called: 1 where a
            pipeline has one transformer; of two (Wan 2.2), each is called in its own steps.
        provenance: how it was calibrated; JSON values.
        block_q, block_kv: tokens per block.
        quality: measured figures by name, such as {"psnr": 31.2}; finite numbers.
        unknown: what the file's header says beyond this, of a later paroattn; it is kept when the plan is saved.

    Raises:
        PlanError: any part that does not fit the others; the message names it.

    Example:
        >>> plan = paroattn.calibrate(pipe, prompts=["a cat"], density=0.3)     # doctest: +SKIP
        >>> plan.save("cat.safetensors"); paroattn.Plan.load("cat.safetensors")  # doctest: +SKIP
    """

    model: ModelIdentity
    grid: TokenGrid
    order_names: tuple[str, ...]
    order_index: Tensor
    precisions: tuple[Precision, ...]
    precision_index: Tensor
    schedule: tuple[float, ...]
    bucket_edges: tuple[float, ...]
    mask_table: Tensor
    mask_index: Tensor
    compensate: Tensor
    usage: Tensor
    provenance: Mapping[str, Any] = field(default_factory=dict)
    block_q: int = 64
    block_kv: int = 64
    quality: Mapping[str, float] = field(default_factory=dict)
    unknown: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _validate(self)
        MaskRules(self.grid, self.block_q, self.block_kv).check(self.mask_table)

    @property
    def buckets(self) -> int:
        return len(self.bucket_edges)

    def densities(self, *, visual_only: bool = False) -> Tensor:
        """Kept blocks over all blocks, float64 [step buckets, layers, heads]; `visual_only` leaves text blocks out."""
        text = text_blocks(self.grid, self.block_q, self.block_kv)
        counted = ~text if visual_only else torch.ones_like(text)
        if not bool(counted.any()):  # every block touches text, and those are all computed
            return torch.ones(self.mask_index.shape, dtype=torch.float64)
        bits, blocks = pack_bits(counted), int(counted.sum())
        shares = torch.tensor([count_bits(mask & bits) for mask in self.mask_table], dtype=torch.float64) / blocks
        return shares[self.mask_index.long()]

    def density(self, *, visual_only: bool = False) -> float:
        """Mean of `densities` over heads and over the calls of layers in a schedule."""
        calls = call_shares(self.bucket_edges, self.usage)
        return float((self.densities(visual_only=visual_only).mean(2) * calls).sum() / calls.sum())

    def head_densities(self) -> Tensor:
        """Density of each layer and head over the steps in which the layer is called, float64 [layers, heads]."""
        calls = call_shares(self.bucket_edges, self.usage).unsqueeze(-1)
        return (self.densities() * calls).sum(0) / calls.sum(0).clamp(min=1e-30)

    @property
    def digest(self) -> str:
        """A hash of all that attention depends on, the same in other processes."""
        told = {name: value for name, value in header_of(self).items() if name not in ("provenance", "quality")}
        return digest_of(told, {name: getattr(self, name).contiguous() for name in _TENSOR_DTYPES})

    @property
    def bucket_levels(self) -> tuple[float, ...]:
        """The noise level from which on downwards each step bucket but the first is in force, descending.

        It lies half way between the calibrated steps around it, so that schedules with other steps agree.
        """
        starts = first_steps(self.bucket_edges, len(self.schedule))[1:]
        return tuple((self.schedule[start - 1] + self.schedule[start]) / 2 for start in starts)

    def bucket_of(self, level: float) -> int:
        """Step bucket of a call at a noise level."""
        return sum(level <= start for start in self.bucket_levels)

    def layer(self, index: int) -> LayerPlan:
        """The part of layer `index`; the tables of orders and masks are shared by all layers."""
        return self.layers()[index]

    def layers(self, device: torch.device | str = "cpu") -> list[LayerPlan]:
        """The parts of all layers on a device, where they share one copy of the tables of orders and masks."""
        orders = torch.stack([token_order(name, self.grid) for name in self.order_names])
        shared: dict[str, Any] = {
            "orders": orders.to(device, torch.int32),
            "mask_table": self.mask_table.to(device),
            "tokens": self.grid.tokens,
            "grid": self.grid,
            "block_q": self.block_q,
            "block_kv": self.block_kv,
        }
        index, masks, compensate = (x.to(device) for x in (self.order_index.int(), self.mask_index, self.compensate))
        return [
            LayerPlan(
                precisions=tuple(self.precisions[i] for i in self.precision_index[layer].tolist()),
                order_index=index[layer],
                mask_index=masks[:, layer],
                compensate=compensate[:, layer],
                **shared,
            )
            for layer in range(self.model.layers)
        ]

    def mask(self, bucket: int, layer: int) -> BlockMask:
        """The masks of a layer's heads in a step bucket, over the sequence in each head's order."""
        bits = self.mask_table[self.mask_index[bucket, layer].long()]
        return BlockMask(bits, self.grid.tokens, self.block_q, self.block_kv)

    def adapt(self, grid: TokenGrid, device: torch.device | str = "cpu") -> Plan:
        """The plan for another grid: each block keeps what lies as far from it as what this plan keeps at its place.

        Each mask keeps the same share of its blocks. Token orders keep the shape of their blocks, as far as it
        fits; steps, precisions and what is compensated stay.

        Args:
            grid: frames, height and width in tokens of as many boxes, and the number of text tokens.
            device: that computes the masks, which are many for a large model.

        Returns:
            The plan itself for its own grid.

        Raises:
            InputError: a grid with more or fewer boxes of visual tokens.

        Example:
            >>> plan.adapt(TokenGrid(21, 45, 80))  # doctest: +SKIP
        """
        if grid == self.grid:
            return self
        if len(grid.boxes) != len(self.grid.boxes):
            raise InputError(f"grid is {grid}; the plan is for {self.grid}, and can be adapted to as many boxes only")
        names = tuple(same_blocks(name, self.grid, grid) for name in self.order_names)
        both = self.mask_index.long() * len(names) + self.order_index.long()
        used, index = both.unique(return_inverse=True)
        table: list[Tensor] = []
        place = torch.empty(len(used), dtype=torch.int32)
        for number, (name, new_name) in enumerate(zip(self.order_names, names, strict=True)):
            own = (used % len(names) == number).nonzero().flatten()
            place[own] = torch.arange(len(own), dtype=torch.int32) + sum(map(len, table))
            if len(own):
                bits = self.mask_table[used[own] // len(names)]
                table.append(resample_masks(bits, name, self.block_q, self.grid, new_name, grid, device))
        provenance = {**self.provenance, "adapted_from": [*self.provenance.get("adapted_from", []), str(self.grid)]}
        return replace(
            self,
            grid=grid,
            order_names=names,
            mask_table=torch.cat(table),
            mask_index=place[index],
            provenance=provenance,
            quality={},  # was measured at the other size
        )

    @classmethod
    def default(
        cls, model: ModelIdentity, grid: TokenGrid, density: float, precision: str | Precision = "exact"
    ) -> Plan:
        """A plan from positions alone, without calibration: each block keeps those that are near, the others are
        approximated.

        Args:
            model: from `paroattn.identify`.
            grid: the token grid of the requests it is for.
            density: kept blocks over all blocks, in (0, 1].
            precision: of all heads.

        Raises:
            InputError: a density outside (0, 1], or an unknown precision.
            PlanError: a density below what text blocks and one block per row need.

        Example:
            >>> plan = Plan.default(paroattn.identify(pipe), TokenGrid(21, 30, 52), 0.3, "int8")  # doctest: +SKIP
        """
        check_density(density)
        block_q = usual_block_q(grid.tokens)
        check_reachable(density, grid, block_q)
        name = fitting_order("4x4x4", grid)
        required = text_blocks(grid, block_q)
        mask = keep_best(-block_distances(name, grid, block_q), density, required)
        heads = (model.layers, model.heads)
        return cls(
            model=model,
            grid=grid,
            order_names=(name,),
            order_index=torch.zeros(heads, dtype=torch.uint8),
            precisions=(Precision.parse(precision),),
            precision_index=torch.zeros(heads, dtype=torch.uint8),
            schedule=(1.0,),
            bucket_edges=(0.0,),
            mask_table=pack_bits(mask).unsqueeze(0),
            mask_index=torch.zeros(1, *heads, dtype=torch.int32),
            compensate=torch.full((1, *heads), not bool(mask.all())),
            usage=torch.ones(1, model.layers),
            block_q=block_q,
            provenance={"method": "positions", "density": density},
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to one safetensors file, whole or not at all; equal plans become equal files.

        Masks are written in the order in which layers, heads and step buckets use them, without those that none uses.

        Raises:
            PlanError: masks or a provenance too large for a file (docs/plan-format.md), or too deeply nested.
            OSError: the file cannot be written.
        """
        write_plan_file(path, header_of(self), {name: getattr(self, name) for name in _TENSOR_DTYPES})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read and validate a plan file, of this format version or an earlier one.

        Raises:
            PlanError: no such file, truncated, not a plan, of a newer version, changed after it was written,
                inconsistent, or beyond a limit of docs/plan-format.md.
        """
        with open_plan_file(path) as file:
            parts = parts_of(file.header)
            rules = MaskRules(parts["grid"], parts["block_q"], parts["block_kv"])
            kinds = _tensor_kinds(parts["model"], len(parts["bucket_edges"]), rules)
            plan = object.__new__(cls)  # `Plan(...)` would check all masks again, in a fifth of the time
            plan.__dict__.update(parts, **file.read(kinds, rules))
            _validate(plan)
        return plan

    @classmethod
    def from_pretrained(
        cls,
        repo: str | os.PathLike[str],
        *,
        model: ModelIdentity | None = None,
        grid: TokenGrid | None = None,
        density: float = 0.3,
        precision: str | Precision | None = None,
        **download_arguments: Any,
    ) -> Plan:
        """The nearest plan of a folder, or of a Hub repository, of which only the plan's own file is downloaded.

        A plan fits if it is for the model and of the precision that are asked for. Of those, the one of the nearest
        size is taken; of several, the one of the nearest density; then the most exact one; then the first by name. It
        is returned as it is: `apply(..., other_sizes="adapt")` and `adapt` fit it to another size.

        Args:
            repo: a folder, or the name of a repository, such as "owner/name".
            model: from `paroattn.identify(pipe)`; may be left out where all plans are for one model.
            grid: frames, height and width in tokens. Default: any size is as good.
            density: kept blocks over all blocks, in (0, 1].
            precision: such as "int8". Default: any.
            download_arguments: `revision`, `token`, `endpoint`, `cache_dir`, `local_files_only` and the like, as of
                `huggingface_hub.hf_hub_download`.

        Raises:
            PlanError: no such repository or revision, no plan that fits, or a broken one; the message says what there
                is.
            InputError: an argument of another type or range.
            MissingPartError: a repository, without huggingface_hub.

        Example:
            >>> plan = Plan.from_pretrained("owner/name", model=paroattn.identify(pipe))  # doctest: +SKIP
        """
        return cls.load(
            find_plan(repo, model=model, grid=grid, density=density, precision=precision, **download_arguments)
        )

    def save_pretrained(self, folder: str | os.PathLike[str], **card_arguments: Any) -> Path:
        """Add the plan to a folder that `push_to_hub`'s repositories look like, see `paroattn.hub.add_plan`."""
        return add_plan(self, folder, **card_arguments)

    def push_to_hub(self, repo: str, **upload_arguments: Any) -> str:
        """Add the plan to a Hub repository, which is made if there is none, see `paroattn.hub.push_plan`."""
        return push_plan(self, repo, **upload_arguments)


def bucket_of(edges: tuple[float, ...], step: int, num_steps: int) -> int:
    """Index of the last bucket edge that is not after `step / num_steps`."""
    return bisect_right(first_steps(edges, num_steps), step) - 1


def first_steps(edges: tuple[float, ...], num_steps: int) -> list[int]:
    """The first step of each bucket in a schedule of `num_steps` steps."""
    # Edges such as 1/3 must not lose their own step to rounding.
    return [math.ceil(edge * num_steps - 1e-6) for edge in edges]


def bucket_lengths(edges: tuple[float, ...]) -> Tensor:
    """Share of the schedule in each step bucket, float64 [buckets]."""
    return torch.tensor([*edges, 1.0], dtype=torch.float64).diff()


def call_shares(edges: tuple[float, ...], usage: Tensor) -> Tensor:
    """Share of the schedule in which each layer is called in each step bucket, float64 [buckets, layers]."""
    return bucket_lengths(edges).unsqueeze(1) * usage


def _tensor_kinds(model: ModelIdentity, buckets: int, rules: MaskRules) -> TensorKinds:
    per_head, per_bucket = (model.layers, model.heads), (buckets, model.layers, model.heads)
    shapes: dict[str, tuple[int | None, ...]] = {
        "order_index": per_head,
        "precision_index": per_head,
        "mask_table": (None, rules.rows, rules.row_bytes),
        "mask_index": per_bucket,
        "compensate": per_bucket,
        "usage": per_bucket[:2],
    }
    return {name: (dtype, shapes[name]) for name, dtype in _TENSOR_DTYPES.items()}


def _validate(plan: Plan) -> None:
    """Raise `PlanError` unless everything but the masks themselves is right."""
    check_parts(**{name: getattr(plan, name) for name in _HEADER_PARTS})
    _validate_schedule(plan)
    rules = MaskRules(plan.grid, plan.block_q, plan.block_kv)
    for name, kind in _tensor_kinds(plan.model, plan.buckets, rules).items():
        tensor = getattr(plan, name)
        check_tensor(name, tensor.dtype, tuple(tensor.shape), kind)
    masks = len(plan.mask_table)
    for name, length in (("order", len(plan.order_names)), ("precision", len(plan.precisions)), ("mask", masks)):
        index = getattr(plan, f"{name}_index")
        if int(index.min()) < 0 or int(index.max()) >= length:
            raise PlanError(
                f"{name}_index ranges from {int(index.min())} to {int(index.max())}; expected 0 to {length - 1}"
            )
    for order in plan.order_names:
        try:
            check_order(order, plan.grid)
        except InputError as error:
            raise PlanError(str(error)) from error
    if not bool(((plan.usage >= 0) & (plan.usage <= 1)).all()) or not bool(plan.usage.any()):
        raise PlanError("usage holds numbers outside [0, 1], or says that no layer is ever called")


def _validate_schedule(plan: Plan) -> None:
    edges, levels = plan.bucket_edges, plan.schedule
    if edges[0] != 0 or not all(a < b for a, b in zip(edges, (*edges[1:], 1.0), strict=True)):
        raise PlanError(f"bucket_edges are {list(edges)}; expected an ascending list from 0 to below 1")
    if not all(0 <= level <= 1 for level in levels) or any(a < b for a, b in pairwise(levels)):
        raise PlanError(f"schedule is {list(levels)}; expected noise levels from 1 down to 0")
    starts = first_steps(edges, len(levels))
    if starts[-1] >= len(levels) or any(levels[start - 1] == levels[start] for start in starts[1:]):
        raise PlanError(
            f"bucket_edges are {list(edges)}; in a schedule of {len(levels)} steps each has to be one at "
            "which the noise level falls"
        )
