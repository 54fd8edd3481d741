"""Rules whose masks are fixed before generation, as plans.

Where a paper gives the size of a window, we give the density: a rule scores blocks such that the best ones form its
shape at every density.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paroattn.block_mask import BLOCK, block_count
from paroattn.calibration.mask_table import MaskTable, plan_from_masks
from paroattn.calibration.paper import CalibrationStatistics
from paroattn.errors import InputError
from paroattn.grid import TokenGrid
from paroattn.keep import check_density
from paroattn.order import token_order
from paroattn.plan import Plan, bucket_lengths
from paroattn_lab.baselines.masks import baseline_mask

STATIC_BASELINES = ("sliding window", "spatial/temporal", "radial", "sliding tile", "random")
_DIAGONAL = 2.0  # above every random score


def static_baseline(
    name: str,
    statistics: CalibrationStatistics,
    density: float,
    *,
    temporal: CalibrationStatistics | None = None,
    seed: int = 0,
) -> Plan:
    """A plan whose masks follow the rule of another paper; each head has exactly the wanted density.

    Args:
        name: one of `STATIC_BASELINES`:

            - "sliding window" (DiTFastAttn): blocks near the diagonal, in the model's order.
            - "spatial/temporal" (SparseVideoGen): a head sees its own frame, the first one and those nearby, or, with
              frames fastest, a band around the diagonal; whichever holds more of P on the calibration prompts. In the
              second order the first frame is in every block, so only the first kind keeps it.
            - "radial" (Radial Attention): a window within frames that halves when the distance in time doubles; where
              it is narrower than a block, fewer and fewer frames are seen instead.
            - "sliding tile" (STA): the tiles in a box around the query's, with the grid's proportions.
            - "random": the diagonal and random blocks, others for each step bucket and head.
        statistics: block sums in the model's own order ("FHW"); model, grid and step buckets are taken from them.
        density: kept blocks over all blocks, text blocks counted, in (0, 1].
        temporal: block sums of the same model in the order "HWF"; "spatial/temporal" needs them.
        seed: of "random".

    Raises:
        InputError: an unknown name, density outside (0, 1], or `temporal` missing or in another order.
        PlanError: a density below what text blocks and one block per row need.

    Example:
        >>> original, temporal = collect_block_sums(  # doctest: +SKIP
        ...     pipe, ["a cat"], order_names=("FHW",), fixed_orders=("HWF",)
        ... )
        >>> plan = static_baseline("spatial/temporal", original, 0.3, temporal=temporal)  # doctest: +SKIP
    """
    check_density(density)
    grid, shape = statistics.grid, statistics.block_sums.shape[:3]  # step buckets, layers, heads
    provenance = {**statistics.provenance, "method": name, "density": density}
    order_names: tuple[str, ...] = ("FHW",)
    order_index = torch.zeros(shape[1:], dtype=torch.uint8)
    if name == "random":
        scores = _random(shape, grid, seed)
        masks = torch.stack([baseline_mask(score, density, grid) for score in scores])
        provenance["mask_seed"] = seed
    elif name == "spatial/temporal":
        order_names = ("FHW", "HWF")
        kinds = torch.stack([baseline_mask(score, density, grid) for score in (_spatial(grid), _band(grid))])
        order_index = _kind_of_heads(kinds, statistics, temporal)
        masks = kinds[order_index.long()].expand(*shape, -1, -1)
    elif name == "sliding tile":
        order_names = (_tile(grid),)
        masks = baseline_mask(_tile_window(grid), density, grid).expand(*shape, -1, -1)
    elif name in ("sliding window", "radial"):
        score = _band(grid) if name == "sliding window" else _radial(grid)
        masks = baseline_mask(score, density, grid).expand(*shape, -1, -1)
    else:
        raise InputError(f"baseline {name!r} is unknown; expected one of {', '.join(map(repr, STATIC_BASELINES))}")
    return plan_from_masks(
        MaskTable.of(masks.reshape(*shape, *masks.shape[-2:])),
        model=statistics.model,
        grid=grid,
        order_names=order_names,
        order_index=order_index,
        schedule=statistics.schedule,
        bucket_edges=statistics.bucket_edges,
        usage=statistics.usage,
        provenance=provenance,
    )


def _kind_of_heads(kinds: Tensor, original: CalibrationStatistics, temporal: CalibrationStatistics | None) -> Tensor:
    """0 for spatial heads, 1 for temporal ones, uint8 [layers, heads]: the kind whose mask holds more of P.

    Args:
        kinds: masks of the two kinds, bool [2, q blocks, kv blocks].
        original, temporal: block sums in the two orders; each step bucket counts by its length.
    """
    if temporal is None:
        raise InputError("'spatial/temporal' needs `temporal`: block sums of all heads in the order 'HWF'")
    for argument, given, order in (("statistics", original, "FHW"), ("temporal", temporal, "HWF")):
        if tuple(given.order_names) != (order,):
            raise InputError(f"{argument} has block sums in the orders {list(given.order_names)}; expected {order!r}")
    if (original.model, original.grid) != (temporal.model, temporal.grid):
        raise InputError(f"statistics and temporal are of different models or grids: {original.grid}, {temporal.grid}")
    held = []
    for mask, given in zip(kinds, (original, temporal), strict=True):
        lengths = bucket_lengths(given.bucket_edges).view(-1, 1, 1)
        held.append(((given.block_sums * mask).sum((-2, -1)) * lengths).sum(0))
    return (held[1] > held[0]).to(torch.uint8)


def _random(shape: torch.Size, grid: TokenGrid, seed: int) -> Tensor:
    """Scores [step buckets * layers * heads, q blocks, kv blocks]."""
    blocks = block_count(grid.tokens, BLOCK)
    scores = torch.rand(shape.numel(), blocks, blocks, generator=torch.Generator().manual_seed(seed))
    scores.diagonal(dim1=-2, dim2=-1).fill_(_DIAGONAL)
    return scores


def _band(grid: TokenGrid) -> Tensor:
    return _nearest_first(_distance(torch.arange(block_count(grid.tokens, BLOCK))))


def _spatial(grid: TokenGrid) -> Tensor:
    """A frame's own blocks, those of the first frame, those of frames nearby; nearer places first."""
    frame, place = _middle_tokens(grid)
    distance = _distance(frame).double()
    distance[:, : block_count(grid.height * grid.width, BLOCK)].clamp_(max=0.5)  # after the own frame, before the next
    return _nearest_first(distance, _distance(place))


def _radial(grid: TokenGrid) -> Tensor:
    """Blocks by the window, in blocks at the distances 0 and 1 in time, that is just wide enough for them.

    At the distance d >= 1 the window is 2^floor(log2 d) times narrower. A window of 1/m of a block (m a power
    of two) is the whole block in every m-th frame, so that the share of blocks still halves: with 2^v the largest
    power of two that divides d, a block at the same place needs 2^v times less.
    """
    frame, place = _middle_tokens(grid)
    time = _distance(frame).clamp(min=1)
    halvings = time.double().log2().floor()
    width = (_distance(place).double() / BLOCK).round() + 1
    skipped = torch.where(width == 1, time & -time, 1)  # x & -x is the largest power of two that divides x
    return _nearest_first(width * 2**halvings / skipped, _distance(frame), _distance(place))


def _tile(grid: TokenGrid) -> str:
    """The order of the sliding tiles; a grid that no tile fits in keeps the model's order."""
    if min(grid.frames, grid.height, grid.width) >= 4:
        return "4x4x4"
    return "1x8x8" if min(grid.height, grid.width) >= 8 else "FHW"


def _tile_window(grid: TokenGrid) -> Tensor:
    """Boxes around each tile's centre; of equally large boxes' tiles those at the faces come before the corners."""
    blocks = block_count(grid.tokens, BLOCK)
    extents = torch.tensor([grid.frames, grid.height, grid.width])
    box = torch.cartesian_prod(*(torch.arange(size) for size in extents.tolist())).double()  # [visual tokens, 3]
    visual = token_order(_tile(grid), grid)[: grid.visual_tokens] - grid.visual_start
    block_of = torch.arange(grid.visual_tokens) // BLOCK
    sums = torch.zeros(blocks, 3, dtype=torch.float64).index_add_(0, block_of, box[visual])
    centres = sums / torch.bincount(block_of, minlength=blocks).clamp(min=1).unsqueeze(1)
    distance = torch.stack([_distance(centre) / extent for centre, extent in zip(centres.mT, extents, strict=True)])
    return _nearest_first(distance.amax(0), distance.sum(0))


def _middle_tokens(grid: TokenGrid) -> tuple[Tensor, Tensor]:
    """Frame of each block's middle token and its place in that frame, in the model's order; int64 [blocks]."""
    middle = torch.arange(block_count(grid.tokens, BLOCK)) * BLOCK + BLOCK // 2
    middle = middle.clamp(max=grid.visual_tokens - 1)
    return middle // (grid.height * grid.width), middle % (grid.height * grid.width)


def _distance(values: Tensor) -> Tensor:
    return (values.unsqueeze(1) - values.unsqueeze(0)).abs()


def _nearest_first(*distances: Tensor) -> Tensor:
    """Scores by the first distance, where it is equal by the next one, each [q blocks, kv blocks].

    What is still equal, such as the two outermost diagonals of a band, is spread over the rows: a density that ends
    among them would otherwise go to the first rows only.
    """
    row, column = torch.meshgrid(*(torch.arange(size) for size in distances[0].shape), indexing="ij")
    spread = (0.7548776662 * row.double() + 0.5698402910 * column.double()) % 1  # the R2 low-discrepancy sequence
    keys = torch.stack([key.double().flatten() for key in (*distances, spread)], 1)
    _, rank = torch.unique(keys, dim=0, return_inverse=True)  # sorted lexicographically
    return -rank.view_as(distances[0]).double()
