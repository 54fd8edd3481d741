"""Sharing a density among steps, layers and heads, and the plans made of it."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paroattn import InputError, PlanError, Precision, TokenGrid
from paroattn.block_mask import block_count, text_blocks, unpack_bits
from paroattn.calibration.budget import (
    Selection,
    allocate,
    interpolate,
    mixed_precision,
    select_by_cost,
)
from paroattn.calibration.calibrate import bucket_edges_by_change
from paroattn.calibration.cost_statistics import CostStatistics
from paroattn.calibration.costs import LEVELS
from paroattn.keep import least_density
from paroattn.plan import ModelIdentity

GRID = TokenGrid(16, 8, 16)


def statistics(seed=0, grid=GRID, edges=(0.0, 0.25), layers=2, heads=3, block_q=64):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = block_count(grid.tokens, block_q), block_count(grid.tokens, 64)
    shape = (len(edges), layers, heads)
    steps = torch.rand(2, *shape, len(LEVELS), generator=generator, dtype=torch.float64)
    return CostStatistics(
        model=ModelIdentity("Model", "abc", layers, heads, 8),
        grid=grid,
        order_names=("FHW", "4x4x4"),
        order_index=torch.randint(2, (layers, heads), generator=generator).to(torch.uint8),
        schedule=tuple(1 - step / 100 for step in range(100)),
        bucket_edges=edges,
        block_q=block_q,
        block_sums=torch.rand(*shape, rows, columns, generator=generator),
        costs=torch.rand(2, *shape, rows, columns, generator=generator),
        tops=None,
        errors=steps.flip(-1).cumsum(-1).flip(-1),
        norms=torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5,
        weights=torch.rand(shape, generator=generator, dtype=torch.float64) ** 4,
        int4_effects=torch.rand(layers, heads, generator=generator, dtype=torch.float64),
        usage=torch.ones(len(edges), layers),
        samples=torch.ones(len(edges), layers),
        provenance={"seed": seed},
    )


def total(measured, densities):
    """What the budget minimises."""
    errors = interpolate(measured.errors.amin(0), densities) * measured.weights
    return float((errors * measured.shares).sum())


@given(st.integers(0, 99), st.sampled_from([0.08, 0.2, 0.37, 0.5, 0.9, 1.0]))
def test_the_budget_is_met_and_no_exchange_between_two_heads_gains(seed, density):
    measured = statistics(seed)
    found = allocate(measured, density)
    average = float((found * measured.shares).sum())
    assert average == pytest.approx(density, abs=1e-9)
    assert found.min() >= least_density(GRID) - 1e-12
    assert found.max() <= 1 + 1e-12
    assert total(measured, found) <= total(measured, torch.full_like(found, density)) + 1e-9
    convex = replace(measured, errors=(1 - torch.tensor(LEVELS).double()).square() * measured.errors[..., :1])
    found, least = allocate(convex, density), least_density(GRID)
    best = total(convex, found)
    share = convex.shares.flatten()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(30):
        a, b = torch.randperm(found.numel(), generator=generator)[:2].tolist()
        moved = found.flatten().clone()
        moved[a] += 0.02 / share[a]
        moved[b] -= 0.02 / share[b]
        if moved[a] <= 1 and moved[b] >= least:
            assert total(convex, moved.view(found.shape)) >= best - 1e-9


def test_weights_move_blocks_to_the_steps_and_heads_that_count():
    measured = statistics()
    weights = torch.full_like(measured.weights, 1e-6)
    weights[0, 1, 2] = 1.0
    found = allocate(replace(measured, weights=weights), 0.3)
    assert found[0, 1, 2] == pytest.approx(1.0)
    assert float(allocate(measured, 0.3, Selection(budget="uniform")).std()) == 0


def test_a_grid_of_one_block_is_computed_whole():
    plan = select_by_cost(replace(statistics(grid=TokenGrid(2, 4, 4)), order_names=("FHW", "HWF")), density=1.0)
    assert plan.density() == 1
    assert not plan.compensate.any()


def test_errors_are_read_between_levels():
    errors = torch.arange(len(LEVELS), 0, -1.0, dtype=torch.float64)
    densities = torch.tensor([0.01, LEVELS[0], (LEVELS[3] + LEVELS[4]) / 2, 0.9, 1.0], dtype=torch.float64)
    found = interpolate(errors.expand(5, -1), densities)
    assert found.tolist() == pytest.approx([11, 11, 7.5, 0.5, 0])


@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("grid", [GRID, TokenGrid(16, 8, 16, 30, "prefix"), TokenGrid(5, 9, 13)])
def test_plans_keep_the_costliest_blocks_at_the_density(grid, block_q):
    measured = statistics(grid=grid, block_q=block_q)
    measured = replace(measured, order_names=("FHW", "HWF"))
    density = max(0.5, least_density(grid, block_q) + 0.1)
    plan = select_by_cost(measured, density=density)
    rows = block_count(grid.tokens, block_q)
    assert plan.density() == pytest.approx(density, abs=1 / rows)
    assert plan.block_q == block_q
    masks = unpack_bits(plan.mask_table, block_count(grid.tokens, 64))[plan.mask_index.long()]
    wanted = allocate(measured, density)
    dropped, approximated = (interpolate(errors, wanted) for errors in measured.errors)
    skipping = ~masks.all(-1).all(-1)
    assert torch.equal(plan.compensate, (approximated < dropped) & skipping)
    required = text_blocks(grid, block_q)
    for bucket, layer, head in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(3)).tolist():
        mask = masks[bucket, layer, head]
        cost = measured.costs[
            int(approximated[bucket, layer, head] < dropped[bucket, layer, head]), bucket, layer, head
        ]
        free = ~required & (cost < cost.amax(1, keepdim=True))
        if (mask & free).any() and (~mask).any():
            assert cost[mask & free].min() >= cost[~mask].max()


def test_comparisons_change_what_they_say():
    measured = statistics()
    never = select_by_cost(measured, density=0.4, selection=Selection(compensate="never"))
    always = select_by_cost(measured, density=0.4, selection=Selection(compensate="always", budget="uniform"))
    sums = select_by_cost(measured, density=0.4, selection=Selection("block sum", "never", "uniform"))
    assert not never.compensate.any()
    assert always.compensate.all()
    masks = unpack_bits(sums.mask_table, 32)[sums.mask_index.long()]
    assert (masks.sum((-1, -2)) - 0.4 * 32 * 32).abs().max() <= 1
    assert measured.block_sums[masks].mean() > measured.block_sums[~masks].mean() + 0.3


def test_int4_leaves_the_heads_that_it_hurts_to_int8():
    effects = torch.tensor([[0.1, 5.0, 0.2], [7.0, 0.3, 0.1]])
    precisions, index = mixed_precision(Precision.parse("int4"), effects, 1 / 3)
    assert [str(precisions[i]) for i in index.flatten().tolist()] == ["int4", "int8", "int4", "int8", "int4", "int4"]
    assert mixed_precision(Precision.parse("int8"), effects, 0.5)[0] == (Precision.parse("int8"),)
    assert str(mixed_precision(Precision.parse("int8/int4"), effects, 0.5)[0][1]) == "int8"
    plan = select_by_cost(statistics(), density=0.5, precision="int4")
    assert [str(item) for item in plan.precisions] == ["int4", "int8"]
    with pytest.raises(ValueError, match="int8_share is 1.5"):
        select_by_cost(statistics(), density=0.5, precision="int4", int8_share=1.5)


def test_what_cannot_be_is_refused():
    with pytest.raises(PlanError, match="density 0.01 cannot be reached"):
        select_by_cost(statistics(), density=0.01)
    with pytest.raises(ValueError, match="density is 0"):
        select_by_cost(statistics(), density=0)


@given(st.lists(st.floats(0, 5), max_size=60), st.integers(1, 12))
def test_buckets_share_the_change_of_attention(changes, most):
    edges = bucket_edges_by_change(changes, most)
    steps = len(changes) + 1
    assert edges[0] == 0
    assert len(edges) <= max(most, 1)
    assert all(a < b for a, b in pairwise(edges))
    assert all(abs(edge * steps - round(edge * steps)) < 1e-9 for edge in edges)
    if steps <= most:
        assert len(edges) == steps


def test_steps_that_change_more_get_more_buckets():
    edges = bucket_edges_by_change([8.0] * 4 + [0.5] * 16, 6)
    assert sum(edge < 5 / 21 for edge in edges) >= 4
    with pytest.raises(ValueError, match="step_buckets is 0"):
        bucket_edges_by_change([1.0], 0)


@pytest.mark.parametrize("in_bytes", [False, True])
@pytest.mark.parametrize("steady", [0.25, 3.0])
def test_steady_masks_change_less_and_keep_their_share_of_the_cost(in_bytes, steady):
    measured = statistics(seed=5, edges=(0.0, 0.3, 0.6))
    noise = torch.rand(measured.costs.shape, generator=torch.Generator().manual_seed(6))
    costs = measured.costs[:, :1] * (0.5 + noise)  # alike in all buckets
    codes = (160 + 8 * costs.log2()).round().clamp(0, 254).to(torch.uint8)
    measured = replace(measured, costs=codes if in_bytes else costs)
    plans = [
        select_by_cost(measured, density=0.4, selection=Selection(budget="uniform", steady=each))
        for each in (0.0, steady)
    ]
    assert torch.equal(plans[0].densities(), plans[1].densities())
    free, held = (unpack_bits(plan.mask_table[plan.mask_index.long()], GRID.tokens // 64) for plan in plans)
    assert torch.equal(free[0], held[0])
    changed = [float((kept[1:] ^ kept[:-1]).double().mean()) for kept in (free, held)]
    assert changed[1] < 0.9 * changed[0]
    assert torch.equal(plans[0].compensate, plans[1].compensate)
    way = plans[0].compensate.long()
    own = torch.where(way[..., None, None] == 1, costs[1], costs[0])
    shares = (own * held).sum((-1, -2)) / (own * free).sum((-1, -2))
    assert shares.min() >= 1 / (1 + steady) - 0.1 * in_bytes
    assert shares[1:].min() < 1


@pytest.mark.parametrize("steady", [-1.0, float("nan"), float("inf")])
def test_steady_is_a_number_from_0(steady):
    with pytest.raises(InputError, match="steady is"):
        Selection(steady=steady)
