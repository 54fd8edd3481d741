"""Selection: which order a head gets, and plans from block sums."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paroattn import Plan, PlanError, TokenGrid
from paroattn.block_mask import text_blocks, unpack_bits
from paroattn.calibration.paper import (
    CalibrationStatistics,
    choose_orders,
    select_plan,
    step_bucket_edges,
)
from paroattn.calibration.statistics import OrderCriterion, order_metrics
from paroattn.keep import keep_best
from paroattn.order import AXIS_ORDERS, token_order
from paroattn.plan import ModelIdentity, bucket_of


def test_choice_worked_out_by_hand():
    sparse = torch.tensor([[[0.2, 0.6, 0.4]]])  # dense share 0.8, 0.4, 0.6 of 1.8
    incoherence = torch.tensor([[[10.0, 60.0, 30.0]]])  # share 0.1, 0.6, 0.3
    assert choose_orders(sparse, incoherence, alpha=1.0).item() == 1
    assert choose_orders(sparse, incoherence, alpha=0.0).item() == 0
    # alpha 0.5: 0.222 + 0.05, 0.111 + 0.3, 0.167 + 0.15
    assert choose_orders(sparse, incoherence, alpha=0.5).item() == 0
    # alpha 0.8: 0.356 + 0.02, 0.178 + 0.12, 0.267 + 0.06
    assert choose_orders(sparse, incoherence, alpha=0.8).item() == 1


def test_a_metric_that_sums_to_zero_counts_as_equal():
    sparse = torch.ones(1, 1, 2)  # everything is sparse: no dense share to divide
    assert choose_orders(sparse, torch.tensor([[[3.0, 2.0]]]), alpha=0.9).item() == 1


def test_equal_orders_give_the_first():
    assert choose_orders(torch.full((2, 3, 6), 0.5), torch.ones(2, 3, 6), 0.5).tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_head_local_along_one_axis_gets_an_order_with_that_axis_slowest(axis):
    grid = TokenGrid(8, 8, 8)
    coordinates = torch.cartesian_prod(*(torch.arange(8),) * 3)[:, axis]
    q = torch.eye(8)[coordinates] * 12
    sparse, incoherence = zip(
        *(order_metrics(q, q, token_order(name, grid), 1.0, OrderCriterion()) for name in AXIS_ORDERS), strict=True
    )
    chosen = choose_orders(torch.tensor(sparse), torch.tensor(incoherence), 0.5)
    assert AXIS_ORDERS[int(chosen)][0] == "FHW"[axis]


def statistics(grid, buckets=(0.0, 0.5), layers=2, heads=2):
    blocks = -(-grid.tokens // 64)
    generator = torch.Generator().manual_seed(0)
    return CalibrationStatistics(
        model=ModelIdentity("Model", "abc", layers, heads, 8),
        grid=grid,
        order_names=("FHW", "WHF"),
        order_index=torch.tensor([[0, 1], [1, 0]], dtype=torch.uint8),
        schedule=tuple(1 - step / 100 for step in range(100)),
        bucket_edges=buckets,
        block_sums=torch.rand(len(buckets), layers, heads, blocks, blocks, generator=generator),
        usage=torch.ones(len(buckets), layers),
        provenance={"seed": 3},
    )


def test_plan_keeps_the_best_blocks_for_every_bucket_and_layer():
    measured = statistics(TokenGrid(5, 8, 8, 30))
    plan = select_plan(measured, density=0.6, precision="int8")
    assert isinstance(plan, Plan)
    masks = unpack_bits(plan.mask_table, 6)
    for bucket in range(2):
        for layer in range(2):
            expected = keep_best(measured.block_sums[bucket, layer], 0.6, text_blocks(measured.grid))
            assert torch.equal(masks[plan.mask_index[bucket, layer].long()], expected)
    assert plan.density() == pytest.approx(0.6, abs=1 / 72)
    assert torch.equal(plan.order_index, measured.order_index)
    assert str(plan.layer(1).precisions[0]) == "int8"
    assert plan.provenance == {"seed": 3, "density": 0.6}


def test_equal_masks_are_stored_once():
    plan = select_plan(statistics(TokenGrid(5, 8, 8)), density=1.0)
    assert plan.mask_table.shape[0] == 1
    assert plan.density() == 1.0


def test_text_alone_can_exceed_the_density():
    with pytest.raises(PlanError, match="text blocks and one block per row already need 1"):
        select_plan(statistics(TokenGrid(1, 4, 4, 200)), density=0.5)


@pytest.mark.parametrize("density", [0, -0.1, 1.01, True, "0.5", None, float("nan")])
def test_density_must_be_a_share(density):
    with pytest.raises(ValueError, match="density is"):
        select_plan(statistics(TokenGrid(2, 8, 8)), density=density)


@pytest.mark.parametrize(
    ("num_steps", "most", "expected"),
    [
        (8, 10, (0.0, 0.125, 0.25, 0.375, 0.5)),
        (8, 3, (0.0, 0.25, 0.5)),
        (8, 2, (0.0, 0.5)),
        (8, 1, (0.0,)),
        (1, 10, (0.0,)),
        (2, 10, (0.0, 0.5)),
        (3, 10, (0.0, 0.25, 0.5)),
    ],
)
def test_bucket_edges_of_schedules(num_steps, most, expected):
    assert step_bucket_edges(num_steps, most) == pytest.approx(expected)


@given(st.integers(1, 60), st.integers(1, 60))
def test_every_bucket_has_a_step_and_there_are_at_most_as_many_as_asked(num_steps, most):
    edges = step_bucket_edges(num_steps, most)
    assert len(edges) <= most
    assert {bucket_of(edges, step, num_steps) for step in range(num_steps)} == set(range(len(edges)))


def test_no_bucket_at_all_is_refused():
    with pytest.raises(ValueError, match="step_buckets is 0"):
        step_bucket_edges(8, 0)
