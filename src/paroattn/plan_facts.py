"""What a plan holds, and in what two plans differ, as JSON values."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from paroattn.block_mask import block_count, count_bits
from paroattn.plan import Plan, bucket_lengths


def plan_facts(plan: Plan) -> dict[str, Any]:
    """Facts of a plan; "layers" has an entry per layer, "calibration" the provenance."""
    return {
        "model": f"{plan.model.class_name}, {plan.model.layers} layers of {plan.model.heads} heads, "
        f"head_dim {plan.model.head_dim}",
        "grid": str(plan.grid),
        "density": round(plan.density(), 6),
        "visual density": round(plan.density(visual_only=True), 6),
        "token orders": len(plan.order_names),
        "precisions": [str(precision) for precision in plan.precisions],
        "step buckets start at": [round(edge, 6) for edge in plan.bucket_edges],
        "density of step buckets": [round(value, 6) for value in _bucket_densities(plan)],
        "masks": len(plan.mask_table),
        "blocks": f"{plan.block_q} x {plan.block_kv}",
        "calibration": dict(plan.provenance),
        "layers": [_layer_facts(plan, layer, row) for layer, row in enumerate(plan.head_densities().tolist())],
    }


def _bucket_densities(plan: Plan) -> list[float]:
    calls = plan.usage.double().unsqueeze(-1).expand(plan.mask_index.shape)
    return ((plan.densities() * calls).sum((1, 2)) / calls.sum((1, 2)).clamp(min=1e-30)).tolist()


def _layer_facts(plan: Plan, layer: int, densities: list[float]) -> dict[str, Any]:
    names = [plan.order_names[index] for index in plan.order_index[layer].tolist()]
    return {
        "density": round(sum(densities) / len(densities), 6),
        "heads": [round(value, 6) for value in densities],
        "orders": names,
        "order counts": dict(Counter(names).most_common()),
        "compensated": round(float(plan.compensate[:, layer].double().mean()), 6),
    }


def plan_difference(first: Plan, second: Plan) -> dict[str, Any]:
    """In what two plans differ.

    Returns:
        "fields": by name of field, both values, of those that differ. "layers": density of each layer in both.
        "other orders": share of heads whose token order differs. "other masks": share of blocks that one plan computes
        and the other does not, over the heads with equal orders ("compared heads": their share), each step weighted by
        its share of the schedule. All but the first are None where sizes differ and there is nothing to compare.
    """
    ones, twos = _fields(first), _fields(second)
    fields = {name: [ones.get(name), twos.get(name)] for name in {**ones, **twos} if ones.get(name) != twos.get(name)}
    nothing = {"layers": None, "other orders": None, "compared heads": None, "other masks": None}
    if first.order_index.shape != second.order_index.shape:
        return {"fields": fields, **nothing}
    same = _same_orders(first, second)
    layers = [
        [round(sum(row) / len(row), 6) for row in rows]
        for rows in zip(first.head_densities().tolist(), second.head_densities().tolist(), strict=True)
    ]
    return {
        "fields": fields,
        "layers": layers,
        "other orders": round(float((~same).double().mean()), 6),
        "compared heads": round(float(same.double().mean()), 6),
        "other masks": _other_blocks(first, second, same),
    }


def _fields(plan: Plan) -> dict[str, Any]:
    model = {f"model {name}": value for name, value in asdict(plan.model).items()}
    calibration = {f"calibration {name}": value for name, value in plan.provenance.items()}
    return {
        **model,
        "grid": str(plan.grid),
        "blocks": f"{plan.block_q} x {plan.block_kv}",
        "density": round(plan.density(), 6),
        "step buckets start at": [round(edge, 6) for edge in plan.bucket_edges],
        "token orders": list(plan.order_names),
        "precisions": [str(precision) for precision in plan.precisions],
        "masks": len(plan.mask_table),
        "compensated heads": round(float(plan.compensate.double().mean()), 6),
        **calibration,
    }


def _same_orders(first: Plan, second: Plan) -> Tensor:
    """Where heads have orders of the same name, bool [layers, heads]."""
    names = [
        [[plan.order_names[index] for index in layer] for layer in plan.order_index.tolist()]
        for plan in (first, second)
    ]
    return torch.tensor(
        [[a == b for a, b in zip(*layers, strict=True)] for layers in zip(*names, strict=True)], dtype=torch.bool
    )


def _other_blocks(first: Plan, second: Plan, compared: Tensor) -> float | None:
    """Share of blocks that differ over the compared heads; None where masks have other sizes or no head is left."""
    if (
        first.mask_table.shape[1:] != second.mask_table.shape[1:]
        or first.grid != second.grid
        or not bool(compared.any())
    ):
        return None
    edges = tuple(sorted({*first.bucket_edges, *second.bucket_edges}))
    total = 0.0
    for edge, length in zip(edges, bucket_lengths(edges).tolist(), strict=True):
        ones, twos = (
            plan.mask_index[bisect_right(plan.bucket_edges, edge) - 1][compared].tolist() for plan in (first, second)
        )
        for one, two in zip(ones, twos, strict=True):
            total += length * count_bits(first.mask_table[one] ^ second.mask_table[two])
    blocks = first.mask_table.shape[1] * block_count(first.grid.tokens, first.block_kv)
    return round(total / int(compared.sum()) / blocks, 6)
