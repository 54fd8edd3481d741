"""Plans for other grids, and plans from positions alone."""

from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import paroattn
from paroattn import InputError, Plan, PlanError, TokenGrid
from paroattn.block_mask import block_count, pack_bits, text_blocks, unpack_bits
from paroattn.keep import keep_best
from paroattn.order import AXIS_ORDERS, fitting_order, same_blocks, token_order, token_places
from paroattn.plan import ModelIdentity
from paroattn.transfer import block_distances, resample_masks

MODEL = ModelIdentity("WanTransformer3DModel", "0" * 64, 2, 2, 24)
GRIDS = st.builds(
    TokenGrid, st.integers(1, 6), st.integers(4, 14), st.integers(5, 14), st.sampled_from([0, 0, 1, 70]),
    st.sampled_from(["prefix", "suffix"]),
)  # fmt: skip


def random_masks(grid, block_q, count=3, density=0.4, seed=0):
    required = text_blocks(grid, block_q)
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([
        keep_best(torch.rand(required.shape, generator=generator), density, required) for _ in range(count)
    ])  # fmt: skip


def brute_shares(mask, name, block_q, old, new_name, new):
    """Share of 8 pairs of tokens of two new blocks whose counterparts lie in kept blocks of the old grid."""

    def token_at(place, block):
        place = [min(max(int(value // 1), 0), size - 1) for value, size in zip(place, old.size, strict=True)]
        token = (place[0] * old.height + place[1]) * old.width + place[2] + old.visual_start
        return order_before.index(token) // block

    def places(block):
        order = token_order(new_name, new).tolist()
        found = []
        for first in range(0, new.tokens, block):
            chosen = [min(first + block // 16 + number * block // 8, new.visual_tokens - 1) for number in range(8)]
            tokens = [order[position] - new.visual_start for position in chosen]
            rows = [(t // (new.height * new.width), t // new.width % new.height, t % new.width) for t in tokens]
            found.append([[value + 0.5 for value in place] for place in rows])
        return found

    order_before = token_order(name, old).tolist()
    shares = torch.zeros(block_count(new.tokens, block_q), block_count(new.tokens, 64), dtype=torch.float64)
    for row, queries in enumerate(places(block_q)):
        for column, keys in enumerate(places(64)):
            for query, key in zip(queries, keys, strict=True):
                there = [q * a / b for q, a, b in zip(query, old.size, new.size, strict=True)]
                other = [t + (k - q) for t, k, q in zip(there, key, query, strict=True)]
                shares[row, column] += bool(mask[token_at(there, block_q), token_at(other, 64)]) / 8
    return shares


@settings(max_examples=25, deadline=None)
@given(GRIDS, GRIDS, st.sampled_from([64, 128]), st.sampled_from([*AXIS_ORDERS, "4x4x4", "1x8x8", "2x2x16"]))
def test_blocks_keep_what_is_as_far_from_them_as_in_the_old_grid(old, new, block_q, name):
    old_name = fitting_order(name, old)
    new_name = same_blocks(old_name, old, new)
    masks = random_masks(old, block_q, count=2)
    bits = resample_masks(pack_bits(masks), old_name, block_q, old, new_name, new)
    found = unpack_bits(bits, block_count(new.tokens, 64))
    required = text_blocks(new, block_q)
    assert found[:, required].all()
    assert found.any(-1).all()
    for mask, before in zip(found, masks, strict=True):
        alone = int((~required.any(1)).sum())  # rows that need a block of their own
        count = max(round(float(before.double().mean()) * required.numel()), int(required.sum()) + alone)
        assert int(mask.sum()) == count
        shares = brute_shares(before, old_name, block_q, old, new_name, new)
        forced = (shares >= shares.amax(1, keepdim=True) - 2e-3) & (not required.any())  # for the row's sake
        left, taken = ~required & ~mask, ~required & mask & ~forced
        if left.any() and taken.any():
            assert shares[taken].min() >= shares[left].max() - 2e-3  # equal ones by nearness


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        ("FHW", (16, 8, 8), (16, 16, 16), "1x8x8"),
        ("WHF", (16, 8, 8), (16, 16, 16), "WHF"),
        ("WHF", (4, 8, 8), (8, 8, 8), "4x8x2"),
        ("FHW", (4, 16, 16), (8, 16, 16), "FHW"),
        ("FHW", (4, 7, 9), (4, 9, 7), "FHW"),  # no boxes
        ("8x4x2", (8, 16, 16), (4, 16, 16), "4x4x4"),
    ],
)
def test_orders_keep_the_shape_of_their_blocks(name, old, new, expected):
    assert same_blocks(name, TokenGrid(*old), TokenGrid(*new)) == expected


@settings(max_examples=20, deadline=None)
@given(
    GRIDS,
    st.sampled_from([(), ((1, 9, 8),), ((2, 6, 7), (1, 3, 30))]),
    st.sampled_from([64, 128]),
    st.sampled_from([*AXIS_ORDERS, "4x4x4", "2x4x8"]),
)
def test_the_own_grid_gives_the_same_masks(grid, references, block_q, name):
    grid = replace(grid, references=references, references_position="before" if block_q == 128 else "after")
    name, masks = fitting_order(name, grid), random_masks(grid, block_q)
    assert torch.equal(resample_masks(pack_bits(masks), name, block_q, grid, name, grid), pack_bits(masks))


def test_places_of_another_box_are_scaled_with_it():
    """Four tiles attend to themselves, and each to the tile at its place in the reference of half the size."""
    old, new = TokenGrid(1, 16, 16, references=((1, 16, 16),)), TokenGrid(1, 16, 16, references=((1, 32, 32),))
    mask = torch.eye(8, dtype=torch.bool)
    mask[:4, 4:] = torch.eye(4, dtype=torch.bool)
    found = unpack_bits(resample_masks(pack_bits(mask[None]), "1x8x8", 64, old, "1x8x8", new), 20)[0]
    corners = [
        [token_places("1x8x8", new)[64 * block].tolist() for block in blocks] for blocks in (range(4), range(4, 20))
    ]
    scaled = torch.tensor([[[2 * place for place in own] == other for other in corners[1]] for own in corners[0]])
    assert (found[:4, 4:] & scaled).sum() == 4
    assert torch.equal(found[:4, :4], mask[:4, :4])
    with pytest.raises(ValueError, match="can be adapted to as many boxes only"):
        wide_plan().adapt(TokenGrid(4, 16, 16, references=((1, 8, 8),)))


def wide_plan(orders=("FHW", "4x4x4"), grid=TokenGrid(4, 16, 16)):
    mask = random_masks(grid, 64, count=5)
    heads = (2, 2)
    return Plan(
        model=MODEL, grid=grid, order_names=orders, order_index=torch.tensor([[0, 1], [1, 0]], dtype=torch.uint8),
        precisions=(paroattn.Precision.parse("int8"),), precision_index=torch.zeros(heads, dtype=torch.uint8),
        schedule=(1.0, 0.5), bucket_edges=(0.0, 0.5), mask_table=pack_bits(mask),
        mask_index=torch.tensor([[[0, 1], [2, 3]], [[4, 4], [1, 0]]], dtype=torch.int32),
        compensate=torch.ones(2, *heads, dtype=torch.bool), usage=torch.ones(2, 2), provenance={"seed": 1},
    )  # fmt: skip


def test_every_head_is_adapted_in_its_own_order():
    plan, grid = wide_plan(), TokenGrid(2, 16, 24)
    found = plan.adapt(grid)
    assert found.order_names == ("1x4x16", "2x8x4")
    for bucket in range(2):
        for layer in range(2):
            for head in range(2):
                order = int(plan.order_index[layer, head])
                bits = plan.mask_table[int(plan.mask_index[bucket, layer, head])].unsqueeze(0)
                names = plan.order_names[order], found.order_names[order]
                expected = resample_masks(bits, names[0], 64, plan.grid, names[1], grid)
                assert torch.equal(found.mask_table[int(found.mask_index[bucket, layer, head])], expected[0])
    assert found.density() == pytest.approx(plan.density(), abs=0.01)
    assert found.provenance == {"seed": 1, "adapted_from": [str(plan.grid)]}
    assert torch.equal(found.compensate, plan.compensate)


def test_a_plan_for_its_own_grid_is_the_plan(tmp_path):
    plan = replace(wide_plan(), quality={"psnr": 30.0})
    assert plan.adapt(TokenGrid(4, 16, 16)) is plan
    there = plan.adapt(TokenGrid(8, 16, 16))
    assert not there.quality
    there.save(tmp_path / "plan.safetensors")
    back = Plan.load(tmp_path / "plan.safetensors").adapt(plan.grid)
    assert back.provenance["adapted_from"] == [str(plan.grid), str(there.grid)]


def test_there_and_back_most_blocks_stay():
    grid = TokenGrid(4, 32, 32)
    near = Plan.default(MODEL, grid, 0.3)
    for other in (TokenGrid(8, 32, 32), TokenGrid(4, 48, 48), TokenGrid(4, 24, 40)):
        back = near.adapt(other).adapt(grid)
        kept = [unpack_bits(plan.mask_table[0], 64) for plan in (near, back)]
        assert (kept[0] & kept[1]).sum() > 0.85 * kept[0].sum()


def test_text_may_be_of_another_number():
    old = wide_plan(("FHW", "4x4x4"), TokenGrid(4, 16, 16, 70, "prefix"))
    plan = old.adapt(TokenGrid(4, 16, 24, 10, "prefix"))
    assert plan.grid.text_tokens == 10
    before, after = (own.densities() for own in (old, plan))
    assert before.min() > 0.1
    assert torch.allclose(after, before, atol=0.03)


@pytest.mark.parametrize(("grid", "tile"), [((8, 16, 16), "4x4x4"), ((1, 16, 16), "1x8x8"), ((1, 3, 5), "FHW")])
def test_a_plan_from_positions_keeps_what_is_near(grid, tile):
    grid = TokenGrid(*grid)
    plan = Plan.default(MODEL, grid, 0.3 if grid.tokens > 64 else 1.0, "int8")
    assert plan.order_names == (tile,)
    assert plan.density() == pytest.approx(0.3 if grid.tokens > 64 else 1.0, abs=0.02)
    assert bool(plan.compensate.all()) == (grid.tokens > 64)
    mask, distances = unpack_bits(plan.mask_table[0], block_count(grid.tokens, 64)), block_distances(tile, grid)
    if not mask.all():
        assert distances[mask].max() <= distances[~mask].min() + 1e-6
    place = token_order(tile, grid)[:64]
    centre = torch.stack(torch.unravel_index(place, grid.size), 1).float().add(0.5) / torch.tensor(grid.size)
    other = torch.stack(torch.unravel_index(token_order(tile, grid)[-64:], grid.size), 1) + 0.5
    apart = ((centre.mean(0) - (other / torch.tensor(grid.size)).mean(0)) * torch.tensor([0.2, 1, 1])).norm()
    assert float(distances[0, -1]) == pytest.approx(float(apart) if grid.tokens > 64 else 0, abs=1e-5)


def test_plans_from_positions_refuse_what_cannot_be():
    with pytest.raises(PlanError, match="density 0.001 cannot be reached"):
        Plan.default(MODEL, TokenGrid(4, 16, 16), 0.001)
    with pytest.raises(InputError, match="density is 0"):
        Plan.default(MODEL, TokenGrid(4, 16, 16), 0)


def test_requests_of_other_sizes_run_with_an_adapted_plan_if_asked():
    pipe = tiny.tiny_wan()
    plan = Plan.default(paroattn.identify(pipe), tiny.GRID, 0.75, "int8")
    own = tiny.latents(pipe, height=96)
    with paroattn.apply(pipe, plan, other_sizes="adapt", strict=True) as handle:
        found = tiny.latents(pipe, height=96)
        assert not torch.equal(found, own)
        assert handle.report().planned == 2 * tiny.STEPS
        assert torch.equal(tiny.latents(pipe, height=96), found)
        tiny.latents(pipe)
        assert handle.plan is plan
    with paroattn.apply(pipe, plan.adapt(TokenGrid(6, 6, 5)), strict=True):
        assert torch.equal(tiny.latents(pipe, height=96), found)
    with paroattn.apply(pipe, plan, other_sizes="error"):
        tiny.latents(pipe)
        with pytest.raises(PlanError, match="this request has grid 6x6x5.*other_sizes='adapt'"):
            tiny.latents(pipe, height=96)
    with paroattn.apply(pipe, plan), pytest.warns(UserWarning, match="this request has grid 6x6x5"):
        assert torch.equal(tiny.latents(pipe, height=96), own)
    with pytest.raises(InputError, match="other_sizes is 'resize'; expected one of dense, adapt, error"):
        paroattn.apply(pipe, plan, other_sizes="resize")
