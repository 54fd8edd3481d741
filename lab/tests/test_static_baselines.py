"""Static baselines: each rule keeps what its paper says, at exactly the wanted density."""

import math
from dataclasses import replace

import pytest
import tiny
import torch
from paroattn_lab.baselines import STATIC_BASELINES, static_baseline

from paroattn import PlanError, TokenGrid
from paroattn.block_mask import block_count, text_blocks, unpack_bits
from paroattn.calibration.paper import CalibrationStatistics
from paroattn.calibration.statistics import block_sums
from paroattn.integrations.apply import apply
from paroattn.order import token_order
from paroattn.plan import ModelIdentity

EDGES = (0.0, 0.25)
GRIDS = [
    TokenGrid(6, 8, 16),
    TokenGrid(9, 7, 11),  # nothing divides anything
    TokenGrid(4, 12, 13, 20, "prefix"),
    TokenGrid(5, 13, 12, 100, "suffix"),
    TokenGrid(1, 24, 24, 7),  # an image
    TokenGrid(2, 3, 90),  # no tile fits
]


def statistics(grid, order="FHW", sums=None, layers=2, heads=3):
    blocks = block_count(grid.tokens, 64)
    if sums is None:
        sums = torch.rand(len(EDGES), layers, heads, blocks, blocks, generator=torch.Generator().manual_seed(0))
    return CalibrationStatistics(
        model=ModelIdentity("Model", "abc", *sums.shape[1:3], 8),
        grid=grid,
        order_names=(order,),
        order_index=torch.zeros(sums.shape[1:3], dtype=torch.uint8),
        schedule=tuple(1 - step / 100 for step in range(100)),
        bucket_edges=EDGES,
        block_sums=sums,
        usage=torch.ones(sums.shape[:2]),
        provenance={"prompts": ["a cat"]},
    )


def static_masks(name, grid, density, **options):
    """Bool [buckets, layers, heads, blocks, blocks] and the plan."""
    plan = static_baseline(name, statistics(grid), density, temporal=statistics(grid, "HWF"), **options)
    return unpack_bits(plan.mask_table, block_count(grid.tokens, 64))[plan.mask_index.long()], plan


def one_mask(name, grid, density):
    """The mask of a rule that has the same one everywhere."""
    masks, plan = static_masks(name, grid, density)
    assert plan.mask_table.shape[0] == 1
    return masks[0, 0, 0]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", STATIC_BASELINES)
def test_every_head_has_the_wanted_density_and_all_text(name, grid):
    blocks = block_count(grid.tokens, 64)
    for density in (0.55, 0.8, 1.0):
        masks, plan = static_masks(name, grid, density)
        assert (masks.sum((-2, -1)) == round(density * blocks**2)).all()
        assert masks[..., text_blocks(grid)].all()
        assert masks.any(-1).all()
        assert plan.grid == grid
        assert plan.bucket_edges == EDGES
        assert plan.provenance["method"] == name
        assert plan.provenance["prompts"] == ["a cat"]


def test_sliding_window_is_a_band():
    block = torch.arange(12)
    band = (block.unsqueeze(1) - block).abs() <= 2
    assert torch.equal(one_mask("sliding window", TokenGrid(6, 8, 16), float(band.double().mean())), band)


def test_a_density_between_two_bands_is_spread_over_the_rows():
    block = torch.arange(32)
    distance = (block.unsqueeze(1) - block).abs()
    kept = one_mask("sliding window", TokenGrid(16, 8, 16), float(((distance <= 2).sum() + 29) / 32**2))
    assert kept[distance <= 2].all()
    rows = kept[distance == 3].nonzero()  # 29 of these 58
    assert len(rows) == 29
    assert (kept & (distance == 3))[:16].sum() == pytest.approx(14.5, abs=2.5)


@pytest.mark.parametrize("window", [0.5, 1, 2, 3, 4])  # in blocks, of the 4 that a frame has
def test_radial_halves_the_window_when_the_distance_in_time_doubles(window):
    frames, per_frame = 17, 4
    grid = TokenGrid(frames, 16, 16)
    expected = torch.zeros(frames, per_frame, frames, per_frame, dtype=torch.bool)
    share = {}  # of the blocks at distances from 2^n to below 2^(n + 1)
    for i in range(frames):
        for j in range(frames):
            distance = abs(i - j)
            halvings = int(math.log2(max(distance, 1)))
            width = max(window, 1) / 2**halvings
            for a in range(per_frame):
                for b in range(per_frame):
                    if width >= 1:
                        expected[i, a, j, b] = abs(a - b) + 1 <= width
                    else:
                        expected[i, a, j, b] = a == b and distance % 2 ** math.ceil(-math.log2(width)) == 0
            if distance:
                share.setdefault(halvings, []).append(expected[i, :, j].double().mean())
    expected = expected.view(frames * per_frame, -1)
    assert torch.equal(one_mask("radial", grid, float(expected.double().mean())), expected)
    shares = [float(torch.stack(share[halvings]).mean()) for halvings in range(4)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 2 * shares[3]


def test_radial_with_one_block_per_frame_sees_fewer_frames_further_away():
    kept = one_mask("radial", TokenGrid(16, 8, 8), 168 / 256)
    assert kept[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 6, 8, 12]


def tile_mask(grid, density):
    """Kept blocks, and the coordinates of each block's first token [blocks, 3]."""
    masks, plan = static_masks("sliding tile", grid, density)
    order = token_order(plan.order_names[0], grid)[: grid.visual_tokens : 64] - grid.visual_start
    frame = grid.height * grid.width
    corner = torch.stack([order // frame, order % frame // grid.width, order % grid.width], 1)
    return masks[0, 0, 0], corner, plan


def test_sliding_tiles_of_an_inner_tile_form_a_box():
    grid = TokenGrid(20, 20, 20)
    tile = torch.cartesian_prod(*(torch.arange(5),) * 3)
    near = (tile.unsqueeze(1) - tile).abs().amax(-1) <= 1
    kept, corner, plan = tile_mask(grid, float(near.double().mean()))
    assert plan.order_names == ("4x4x4",)
    inner = int((corner == 8).all(1).nonzero())
    assert sorted(corner[kept[inner]].tolist()) == (4 * torch.cartesian_prod(*(torch.arange(1, 4),) * 3)).tolist()


def test_sliding_windows_have_the_proportions_of_the_grid():
    grid = TokenGrid(40, 12, 12)
    tile = torch.cartesian_prod(torch.arange(10), torch.arange(3), torch.arange(3))
    near = ((tile.unsqueeze(1) - tile).abs() <= torch.tensor([3, 1, 1])).all(-1)  # 3.3 times as long as it is high
    kept, corner, _ = tile_mask(grid, float(near.double().mean()))
    inner = int((corner == torch.tensor([16, 4, 4])).all(1).nonzero())
    box = corner[kept[inner]]
    assert box.amin(0).tolist() == [4, 0, 0]
    assert box.amax(0).tolist() == [28, 8, 8]
    assert len(box) == 7 * 3 * 3


def test_images_have_flat_tiles_and_remainders_are_near_their_neighbours():
    grid = TokenGrid(1, 20, 24)
    kept, _, plan = tile_mask(grid, 0.5)
    assert plan.order_names == ("1x8x8",)
    last = block_count(grid.tokens, 64) - 1  # of the remainder: rows 16 to 19
    order = token_order("1x8x8", grid)
    assert (order[64 * last :] // 24 >= 16).all()
    seen = order.split(64)
    lowest = [float((seen[block] // 24).double().mean()) for block in kept[last].nonzero().flatten()]
    skipped = [float((seen[block] // 24).double().mean()) for block in (~kept[last]).nonzero().flatten()]
    assert sum(lowest) / len(lowest) > sum(skipped) / len(skipped)


def synthetic_sums(grid, order):
    """Block sums [buckets, 1, 2, blocks, blocks] of a head that sees its own frame and of one that sees its place."""
    token = torch.arange(grid.visual_tokens)
    frame, place = token // (grid.height * grid.width), token % (grid.height * grid.width)
    heads = []
    for coordinate in (frame, place):
        q = torch.eye(int(coordinate.max()) + 1)[coordinate] * 4
        q = torch.cat((q, torch.zeros(grid.text_tokens, q.shape[1])))
        heads.append(block_sums(q, q, [token_order(order, grid)], 1.0)[0])
    return torch.stack(heads).expand(len(EDGES), 1, -1, -1, -1)


@pytest.mark.parametrize("grid", [TokenGrid(16, 8, 8), TokenGrid(9, 10, 10, 30)], ids=str)
def test_heads_are_spatial_or_temporal_as_they_attend(grid):
    original = statistics(grid, sums=synthetic_sums(grid, "FHW"))
    temporal = statistics(grid, "HWF", synthetic_sums(grid, "HWF"))
    plan = static_baseline("spatial/temporal", original, 0.35, temporal=temporal)
    assert plan.order_names == ("FHW", "HWF")
    assert plan.order_index.tolist() == [[0, 1]]
    masks = unpack_bits(plan.mask_table, block_count(grid.tokens, 64))[plan.mask_index[0, 0].long()]
    block = torch.arange(masks.shape[-1])
    distance = (block.unsqueeze(1) - block).abs()
    whole = grid.visual_tokens // 64
    assert masks[0, :, : -(-grid.height * grid.width // 64)].all()  # the first frame
    assert masks[0].diagonal().all()
    skipped = ~masks[1, :whole, :whole]
    assert distance[:whole, :whole][skipped].min() >= distance[:whole, :whole][~skipped].max()


def test_the_kind_that_holds_more_over_the_whole_schedule_is_taken():
    grid = TokenGrid(16, 8, 8)
    near = torch.eye(16) + 0.01
    original = statistics(grid, sums=torch.stack((2 * near, near)).view(2, 1, 1, 16, 16))  # the first quarter, the rest
    temporal = statistics(grid, "HWF", torch.stack((near, 1.5 * near)).view(2, 1, 1, 16, 16))
    assert static_baseline("spatial/temporal", original, 0.1, temporal=temporal).order_index.item() == 1


def test_spatial_temporal_needs_both_orders():
    grid = TokenGrid(4, 8, 8)
    with pytest.raises(ValueError, match="needs `temporal`"):
        static_baseline("spatial/temporal", statistics(grid), 0.5)
    with pytest.raises(ValueError, match=r"temporal has block sums in the orders \['FHW'\]; expected 'HWF'"):
        static_baseline("spatial/temporal", statistics(grid), 0.5, temporal=statistics(grid))
    with pytest.raises(ValueError, match="different models or grids"):
        static_baseline("spatial/temporal", statistics(grid), 0.5, temporal=statistics(TokenGrid(8, 8, 4), "HWF"))


def test_random_masks_differ_everywhere_and_are_the_same_again():
    grid = TokenGrid(16, 8, 8)
    masks, plan = static_masks("random", grid, 0.3)
    assert plan.mask_table.shape[0] == masks.shape[:3].numel()  # all different
    assert masks.diagonal(dim1=-2, dim2=-1).all()
    assert torch.equal(masks, static_masks("random", grid, 0.3)[0])
    assert not torch.equal(masks, static_masks("random", grid, 0.3, seed=1)[0])


@pytest.mark.parametrize(
    ("name", "density", "error", "message"),
    [
        ("radical", 0.5, ValueError, "baseline 'radical' is unknown; expected one of 'sliding window'"),
        ("radial", 0, ValueError, "density is 0"),
        ("radial", 0.1, PlanError, "density 0.1 cannot be reached"),
    ],
)
def test_impossible_static_baselines_are_refused(name, density, error, message):
    with pytest.raises(error, match=message):
        static_baseline(name, statistics(TokenGrid(4, 8, 8)), density)


@pytest.mark.parametrize("name", STATIC_BASELINES)
def test_static_plans_run_and_at_density_1_change_nothing(name):
    pipe, grid, latents = tiny.tiny_wan(), TokenGrid(6, 8, 5), {"height": 128, "steps": 2}
    full, model = tiny.latents(pipe, **latents), tiny.make_plan(pipe).model
    given = {
        order: replace(statistics(grid, order, heads=2), model=model, provenance={"order": order})
        for order in ("FHW", "HWF")
    }
    for density, low, high in ((1.0, 0, 1e-4), (0.5, 1e-3, 1)):
        plan = static_baseline(name, given["FHW"], density, temporal=given["HWF"])
        with apply(pipe, plan):
            applied = tiny.latents(pipe, **latents)
        assert low <= torch.linalg.norm(applied - full) / torch.linalg.norm(full) <= high
    assert torch.equal(tiny.latents(pipe, **latents), full)
