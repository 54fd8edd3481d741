"""Plans that were not calibrated, to measure speed without weights: any orders, and any blocks of some densities."""

from __future__ import annotations

import torch
from torch import Tensor

from paroattn.block_mask import BLOCK, pack_bits, text_blocks, usual_block_q
from paroattn.grid import TokenGrid
from paroattn.keep import check_density, check_reachable, keep_best
from paroattn.order import candidate_orders, fitting_order
from paroattn.plan import ModelIdentity, Plan
from paroattn.quantize import Precision


def random_plan(
    identity: ModelIdentity,
    grid: TokenGrid,
    density: float,
    precision: str | Precision = "exact",
    *,
    block_q: int = BLOCK,
    seed: int = 0,
) -> Plan:
    """A plan with a random order for each head and random masks.

    Every mask has exactly the density, to the nearest block, with text blocks and one block per row among them. As many
    masks as a layer has heads are shared by all layers, each head in another place.

    Args:
        identity: of the model, see `paroattn.integrations.pipeline.Pipeline`.
        grid: its token grid.
        density: kept blocks over all blocks, in (0, 1].
        precision: number format of all heads.
        block_q: queries per block, 64 or 128.
        seed: of orders and masks.

    Raises:
        ValueError: density outside (0, 1], or an unknown precision.
        PlanError: a density too low for text blocks and one block per row.

    Example:
        >>> random_plan(ModelIdentity("Any", "", 2, 3, 64), TokenGrid(1, 16, 40), 0.5).density()
        0.5
    """
    check_density(density)
    check_reachable(density, grid, block_q)
    generator = torch.Generator().manual_seed(seed)
    names = candidate_orders(grid)
    layers, heads = identity.layers, identity.heads
    required = text_blocks(grid, block_q)
    rows, columns = required.shape
    masks = torch.stack(
        [pack_bits(keep_best(torch.rand(rows, columns, generator=generator), density, required)) for _ in range(heads)]
    )
    places = torch.arange(heads) + torch.arange(layers).unsqueeze(1)
    return Plan(
        model=identity,
        grid=grid,
        order_names=names,
        order_index=torch.randint(len(names), (layers, heads), generator=generator, dtype=torch.uint8),
        precisions=(Precision.parse(precision),),
        precision_index=torch.zeros(layers, heads, dtype=torch.uint8),
        schedule=(1.0,),
        bucket_edges=(0.0,),
        mask_table=masks,
        mask_index=(places % heads).int().unsqueeze(0),
        compensate=torch.zeros(1, layers, heads, dtype=torch.bool),
        usage=torch.ones(1, layers),
        provenance={"method": "random", "density": density, "seed": seed},
        block_q=block_q,
    )


_LEAST, _MOST, _KINDS = 0.05, 0.6, 24  # densities of `unequal_plan`, and how many


def unequal_plan(
    model: ModelIdentity, grid: TokenGrid, density: float, precision: str | Precision, seed: int = 0
) -> Plan:
    """Random masks of densities between 0.05 and 0.6, logarithmically even, their mean as asked for."""
    generator = torch.Generator().manual_seed(seed)
    block_q = usual_block_q(grid.tokens)
    required = text_blocks(grid, block_q)
    low, high = -10.0, 10.0  # of the exponent that gives the mean
    for _ in range(60):
        middle = (low + high) / 2
        shares = _LEAST * (_MOST / _LEAST) ** (torch.linspace(0, 1, _KINDS) ** (2.0**middle))
        low, high = (middle, high) if float(shares.mean()) > density else (low, middle)
    masks = [keep_best(torch.rand(required.shape, generator=generator), float(share), required) for share in shares]
    names = ("HWF", fitting_order("4x4x4", grid))
    heads = (model.layers, model.heads)
    return Plan(
        model=model,
        grid=grid,
        order_names=names,
        order_index=torch.randint(len(names), heads, generator=generator, dtype=torch.uint8),
        precisions=(Precision.parse(precision),),
        precision_index=torch.zeros(heads, dtype=torch.uint8),
        schedule=(1.0,),
        bucket_edges=(0.0,),
        mask_table=torch.stack([pack_bits(mask) for mask in masks]),
        mask_index=torch.stack([_of_a_layer(model.heads, generator) for _ in range(model.layers)]).unsqueeze(0),
        compensate=torch.ones(1, *heads, dtype=torch.bool),
        usage=torch.ones(1, model.layers),
        block_q=block_q,
    )


def _of_a_layer(heads: int, generator: torch.Generator) -> Tensor:
    """Densities of a layer's heads, spread over the range and in any order."""
    spread = (torch.arange(heads) * _KINDS + torch.randint(_KINDS, (1,), generator=generator)) // heads % _KINDS
    return spread[torch.randperm(heads, generator=generator)].int()
