"""Plans: what calibration found for one model, validated, immutable, kept in one safetensors file.

Format version 0: free to change until it is declared stable. See docs/plan-format.md.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from paroattn.block_mask import block_count, count_bits, pack_bits, text_blocks
from paroattn.errors import PlanError
from paroattn.files import save_tensors
from paroattn.grid import TokenGrid
from paroattn.order import token_order
from paroattn.quantize import Precision

FORMAT_VERSION = 0
FILE_NAME = "paroattn_plan.safetensors"
_HEADER_KEY = "paroattn_plan"
_TENSOR_DTYPES = {
    "order_index": torch.uint8,
    "precision_index": torch.uint8,
    "mask_table": torch.uint8,
    "mask_index": torch.int32,
    "compensate": torch.bool,
    "usage": torch.float32,
}


@dataclass(frozen=True)
class ModelIdentity:
    """What a plan remembers of its model, compared with the model when the plan is applied."""

    class_name: str
    config_hash: str
    layers: int
    heads: int
    head_dim: int


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """A plan's part for one layer, the input of `paroattn.prepare`.

    Attributes:
        precisions: one per head; their number is the number of heads.
        orders: int32 or int64 [distinct orders, N], gather indices, or None for the model's own order.
        order_index: integer [H] into orders; None if there is one order per head.
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
        """The heads' orders as gather indices [H, N], or None."""
        if self.orders is None or self.order_index is None:
            return self.orders
        return self.orders.index_select(0, self.order_index)


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

    def __post_init__(self) -> None:
        _validate(self)

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
        calls = bucket_lengths(self.bucket_edges).unsqueeze(1) * self.usage
        return float((self.densities(visual_only=visual_only).mean(2) * calls).sum() / calls.sum())

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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to one safetensors file, whole or not at all."""
        tensors = {name: getattr(self, name).contiguous() for name in _TENSOR_DTYPES}
        header = {
            "version": FORMAT_VERSION,
            "model": asdict(self.model),
            "grid": asdict(self.grid),
            "order_names": self.order_names,
            "precisions": [str(precision) for precision in self.precisions],
            "schedule": self.schedule,
            "bucket_edges": self.bucket_edges,
            "block_q": self.block_q,
            "block_kv": self.block_kv,
            "provenance": dict(self.provenance),
        }
        header = json.loads(json.dumps(header))  # as it will be read: provenance may have keys that are no strings
        header["digest"] = _digest(header, tensors)
        metadata = {_HEADER_KEY: json.dumps(header, sort_keys=True)}
        save_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read and validate a plan file.

        Raises:
            PlanError: no such file, truncated, not a plan, changed after it was written, or inconsistent.
        """
        path = Path(path)
        header, tensors = _read(path)
        try:
            return _from_file(header, tensors)
        except PlanError as error:
            raise PlanError(f"{str(path)!r}: {error}") from error

    @classmethod
    def from_pretrained(cls, repo: str | os.PathLike[str], **download_arguments: Any) -> Plan:
        """Load a plan from a folder, or from a Hub repository through `huggingface_hub.hf_hub_download`."""
        if Path(repo).is_dir():
            return cls.load(Path(repo) / FILE_NAME)
        from huggingface_hub import hf_hub_download

        return cls.load(hf_hub_download(str(repo), FILE_NAME, **download_arguments))

    def push_to_hub(self, repo: str, **upload_arguments: Any) -> None:
        """Upload the plan to a Hub repository through `huggingface_hub.HfApi.upload_file`."""
        import tempfile

        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / FILE_NAME
            self.save(path)
            HfApi().upload_file(path_or_fileobj=path, path_in_repo=FILE_NAME, repo_id=repo, **upload_arguments)


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


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the header without its digest and the bytes of the tensors."""
    content = {key: value for key, value in header.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of a plan file (docs/plan-format.md), without its tensors: only the version is checked.

    Raises:
        PlanError: no such file, truncated, not a plan, or of another version.
    """
    return _read(Path(path), with_tensors=False)[0]


def _read(path: Path, with_tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise PlanError(f"plan file {str(path)!r} does not exist; make one with `paroattn calibrate`")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys() if with_tensors}
    except (SafetensorError, OSError, RuntimeError) as error:  # the last from torch, if the file was just deleted
        raise PlanError(
            f"{str(path)!r} is not a readable safetensors file ({error}); it may be truncated: copy or make it anew"
        ) from error
    try:
        return _parse_header(metadata), tensors
    except PlanError as error:
        raise PlanError(f"{str(path)!r}: {error}") from error


def _parse_header(metadata: Mapping[str, str]) -> dict[str, Any]:
    if _HEADER_KEY not in metadata:
        raise PlanError(f"no header {_HEADER_KEY!r}: this is some other safetensors file, not a plan")
    try:
        header = json.loads(metadata[_HEADER_KEY])
        version = header["version"]
    except (json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
        raise PlanError(f"the plan's header cannot be read ({error!r}); make the plan anew") from error
    if version != FORMAT_VERSION:
        raise PlanError(f"plan format version is {version!r}; this paroattn reads {FORMAT_VERSION}. Calibrate again.")
    return header


def _from_file(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Plan:
    if set(tensors) != set(_TENSOR_DTYPES):
        raise PlanError(f"tensors are {sorted(tensors)}; expected {sorted(_TENSOR_DTYPES)}")
    if header.get("digest") != _digest(header, tensors):
        raise PlanError("the content does not match its checksum: the file was changed after it was written")
    try:
        return Plan(
            model=ModelIdentity(**header["model"]),
            grid=TokenGrid(**header["grid"]),
            order_names=tuple(header["order_names"]),
            precisions=tuple(Precision.parse(name) for name in header["precisions"]),
            schedule=tuple(header["schedule"]),
            bucket_edges=tuple(header["bucket_edges"]),
            block_q=header["block_q"],
            block_kv=header["block_kv"],
            provenance=header["provenance"],
            **tensors,
        )
    except PlanError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"the plan's header is incomplete or wrong: {error}") from error


def _validate(plan: Plan) -> None:
    layers, heads, buckets = plan.model.layers, plan.model.heads, len(plan.bucket_edges)
    if layers < 1 or heads < 1:
        raise PlanError(f"the model has {layers} layers of {heads} heads; expected at least one of each")
    edges = plan.bucket_edges
    if not edges or edges[0] != 0 or not all(a < b for a, b in zip(edges, (*edges[1:], 1.0), strict=True)):
        raise PlanError(f"bucket_edges are {list(edges)}; expected an ascending list from 0 to below 1")
    _validate_schedule(plan)
    if plan.block_q not in (64, 128) or plan.block_kv != 64:
        raise PlanError(f"blocks are {plan.block_q} x {plan.block_kv}; expected 64 x 64 or 128 x 64")
    rows = block_count(plan.grid.tokens, plan.block_q)
    columns = block_count(plan.grid.tokens, plan.block_kv)
    masks = plan.mask_table.shape[0] if plan.mask_table.ndim else 0
    shapes = {
        "order_index": (layers, heads),
        "precision_index": (layers, heads),
        "mask_table": (max(masks, 1), rows, -(-columns // 8)),
        "mask_index": (buckets, layers, heads),
        "compensate": (buckets, layers, heads),
        "usage": (buckets, layers),
    }
    for name, shape in shapes.items():
        tensor = getattr(plan, name)
        if tensor.dtype != _TENSOR_DTYPES[name] or tuple(tensor.shape) != shape:
            raise PlanError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}; expected {_TENSOR_DTYPES[name]} {list(shape)} for "
                f"{layers} layers, {heads} heads, {buckets} step buckets and grid {plan.grid}"
            )
    for name, length in (("order", len(plan.order_names)), ("precision", len(plan.precisions)), ("mask", masks)):
        index = getattr(plan, f"{name}_index")
        if int(index.min()) < 0 or int(index.max()) >= length:
            raise PlanError(
                f"{name}_index ranges from {int(index.min())} to {int(index.max())}; expected 0 to {length - 1}"
            )
    for order in plan.order_names:
        try:
            token_order(order, plan.grid)
        except ValueError as error:
            raise PlanError(str(error)) from error
    _validate_masks(plan, columns)


def _validate_schedule(plan: Plan) -> None:
    levels = plan.schedule
    if not levels or not all(0 <= level <= 1 for level in levels) or any(a < b for a, b in pairwise(levels)):
        raise PlanError(f"schedule is {list(levels)}; expected noise levels from 1 down to 0")
    starts = first_steps(plan.bucket_edges, len(levels))
    if starts[-1] >= len(levels) or any(levels[start - 1] == levels[start] for start in starts[1:]):
        raise PlanError(
            f"bucket_edges are {list(plan.bucket_edges)}; in a schedule of {len(levels)} steps each has to be one at "
            "which the noise level falls"
        )


def _validate_masks(plan: Plan, columns: int) -> None:
    if columns % 8 and bool((plan.mask_table[..., -1] >> (columns % 8)).any()):
        raise PlanError(f"mask_table has bits beyond its {columns} kv blocks")
    empty = (plan.mask_table == 0).all(-1).nonzero()
    if len(empty):
        raise PlanError(f"mask {int(empty[0, 0])} keeps no block in row {int(empty[0, 1])}; every row needs one")
    text = pack_bits(text_blocks(plan.grid, plan.block_q, plan.block_kv))
    if bool((~plan.mask_table & text).any()):
        raise PlanError("a mask skips a block that touches text tokens; those are always computed")
    if not bool(((plan.usage >= 0) & (plan.usage <= 1)).all()) or not bool(plan.usage.any()):
        raise PlanError("usage holds numbers outside [0, 1], or says that no layer is ever called")
