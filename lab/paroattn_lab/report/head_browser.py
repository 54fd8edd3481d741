"""What the page's head browser shows, as JSON values: masks, orders, densities, and attention maps where measured.

All heads of a layer share one picture (a sprite) with a tile per step bucket and head; the page cuts out the tile that
is chosen and colours it.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from tqdm.auto import tqdm

from paroattn.block_mask import block_count, unpack_bits
from paroattn.plan import Plan
from paroattn_lab.quality.head_study import MAP_SIDE, AttentionMaps, PlanStudy, rounded
from paroattn_lab.report.embedding import MAP_BYTES, MASK_BYTES, data_uri

_TRIES: tuple[tuple[int, int | None], ...] = ((64, None), (64, 70), (48, 60), (32, 60), (24, 50), (16, 40))
"""Most rows and columns of a tile, and WebP quality (None: lossless), from the best to what the largest plans need."""

_LOWEST = 1e-3  # of uniform attention: where the colours of maps begin


def browser_data(
    plan: Plan,
    study: PlanStudy | None = None,
    maps: AttentionMaps | None = None,
    *,
    mask_bytes: int = MASK_BYTES,
    map_bytes: int = MAP_BYTES,
) -> dict[str, Any]:
    """Everything the head browser needs of a plan.

    Args:
        plan: its masks, orders, precisions and compensation are shown.
        study: the heads' errors, if they were measured.
        maps: attention maps, if they were measured.
        mask_bytes, map_bytes: most bytes of sprites; tiles are averaged down until they fit.
    """
    return {
        "layers": plan.model.layers,
        "heads": plan.model.heads,
        "buckets": bucket_names(plan.bucket_edges),
        "orders": [{"name": name, "meaning": order_meaning(name)} for name in plan.order_names],
        "order": plan.order_index.tolist(),
        "precisions": [str(precision) for precision in plan.precisions],
        "precision": plan.precision_index.tolist(),
        "densities": rounded(plan.densities()),
        "compensate": plan.compensate.int().tolist(),
        "errors": rounded(study.errors) if study else None,
        "blocks": [block_count(plan.grid.tokens, size) for size in (plan.block_q, plan.block_kv)],
        "block": f"{plan.block_q} x {plan.block_kv}",
        "masks": _mask_sprites(plan, mask_bytes),
        "maps": _map_sprites(maps, map_bytes) if maps else None,
    }


def bucket_names(edges: Sequence[float]) -> list[str]:
    """Step buckets in words, as shares of the schedule."""
    ends = [*edges[1:], 1.0]
    return [f"{start:.0%} to {end:.0%} of the steps" for start, end in zip(edges, ends, strict=True)]


def order_meaning(name: str) -> str:
    """A token order in words."""
    if name == "FHW":
        return "the model's own order"
    if re.fullmatch("[FHW]{3}", name):
        slow, middle, fast = ({"F": "frames", "H": "rows", "W": "columns"}[axis] for axis in name)
        return f"{fast} vary fastest, then {middle}, then {slow}"
    frames, rows, columns = name.split("x")
    return f"each block of 64 tokens is a box: {frames} frames x {rows} rows x {columns} columns"


def _mask_sprites(plan: Plan, limit: int) -> dict[str, Any]:
    """Shares of kept blocks as grey levels."""
    rows, columns = (min(block_count(plan.grid.tokens, size), MAP_SIDE) for size in (plan.block_q, plan.block_kv))
    length = block_count(plan.grid.tokens, plan.block_kv)
    tiles = torch.empty(len(plan.mask_table), rows, columns, dtype=torch.uint8)
    for number, mask in enumerate(tqdm(plan.mask_table, desc="masks", delay=2, leave=False)):
        share = adaptive_avg_pool2d(unpack_bits(mask, length).float()[None], (rows, columns))[0]
        tiles[number] = (share * 255).round().byte()

    def tiles_of(layer: int) -> Tensor:
        return tiles[plan.mask_index[:, layer].long()]

    size, (sprites,) = _fitting([tiles_of], plan.model.layers, limit)
    return {"size": size, "sprites": sprites}


def _map_sprites(maps: AttentionMaps, limit: int) -> dict[str, Any]:
    """Logarithms of attention as grey levels, on one scale for all heads."""
    highest = float(max(part.nan_to_num(0).max() for part in (maps.original, maps.chosen)))
    highest = 10 ** math.ceil(math.log10(max(highest, 10.0)))
    low, high = math.log10(_LOWEST), math.log10(highest)

    def tiles_of(part: Tensor) -> Any:
        def of_layer(layer: int) -> Tensor:
            level = (part[:, layer].nan_to_num(0).clamp(min=_LOWEST).log10() - low) / (high - low)
            return (level * 255).round().byte()

        return of_layer

    layers = maps.original.shape[1]
    size, (original, chosen) = _fitting([tiles_of(maps.original), tiles_of(maps.chosen)], layers, limit)
    called = (~maps.original.isnan()).any(-1).any(-1).any(-1)  # [buckets, layers]
    return {
        "size": size,
        "blocks": maps.blocks,
        "lowest": _LOWEST,
        "highest": highest,
        "called": called.int().tolist(),
        "original": original,
        "chosen": chosen,
    }


def _fitting(kinds: Sequence[Any], layers: int, limit: int) -> tuple[list[int], list[list[str]]]:
    """Sprites of all layers, for each kind of tiles, at the best size and quality that fit; and the tiles' size.

    Args:
        kinds: functions from a layer to its tiles uint8 [buckets, heads, rows, columns].
        layers: how many.
        limit: most bytes.
    """
    for side, quality in _TRIES:
        sprites: list[list[str]] = [[] for _ in kinds]
        used = 0
        for layer in tqdm(range(layers), desc=f"pictures of heads, {side} pixels", delay=2, leave=False):
            for own, tiles_of in zip(sprites, kinds, strict=True):
                tiles = _shrunk(tiles_of(layer), side)
                own.append(_sprite(tiles, quality))
                used += len(own[-1])
            if used > limit:
                break
        else:
            return list(tiles.shape[2:]), sprites
    return list(tiles.shape[2:]), [[] for _ in kinds]


def _shrunk(tiles: Tensor, side: int) -> Tensor:
    size = (min(tiles.shape[2], side), min(tiles.shape[3], side))
    if size == tiles.shape[2:]:
        return tiles
    return adaptive_avg_pool2d(tiles.float(), size).round().byte()


def _sprite(tiles: Tensor, quality: int | None) -> str:
    """One picture of tiles [buckets, heads, rows, columns]: a row of tiles per bucket, a column per head."""
    buckets, heads, rows, columns = tiles.shape
    picture = tiles.permute(0, 2, 1, 3).reshape(buckets * rows, heads * columns).numpy()
    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(picture))
    settings = {"lossless": True, "quality": 40, "method": 2} if quality is None else {"quality": quality, "method": 4}
    image.convert("RGB").save(buffer, "webp", **settings)
    return data_uri(buffer.getvalue(), "image/webp")
