"""Plans that were not calibrated, to measure speed without weights: any orders, and any blocks of a density."""

from __future__ import annotations

import torch

from paroattn.block_mask import BLOCK, pack_bits, text_blocks
from paroattn.grid import TokenGrid
from paroattn.keep import check_density, check_reachable, keep_best
from paroattn.order import candidate_orders
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
