"""Accumulation of statistics over attention calls, against brute force over the same calls."""

from dataclasses import replace

import oracles
import pytest
import torch

from paroattn import TokenGrid
from paroattn.calibration import statistics
from paroattn.calibration.capture import BlockCosts, BlockSums, OrderScores, StepChange
from paroattn.calibration.statistics import OrderCriterion, block_areas, block_sums, order_metrics
from paroattn.integrations.observe import ObservedCall
from paroattn.order import AXIS_ORDERS, token_order

GRID, NAMES, SCALE = TokenGrid(3, 5, 7, 4, "prefix"), ("FHW", "WHF"), 0.4


def call(seed, layer=0, grid=GRID, heads=2, key_mask=None):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(2, grid.tokens, heads, 8, generator=generator) for _ in range(3))
    return ObservedCall(layer, 0, 1, 1.0, grid, query, key, value, key_mask, SCALE, dense=lambda: value)


def brute_metrics(q, k, order, epsilon, sigma, rows=None):
    p = (q.double() @ k.double().T * SCALE).softmax(-1)[order][:, order]
    rows_of_blocks = p.split(64, 0)
    blocks = [
        b for row in (range(len(rows_of_blocks)) if rows is None else rows) for b in rows_of_blocks[row].split(64, 1)
    ]
    sparse = [float((block < epsilon).double().mean()) >= sigma for block in blocks]
    incoherence = [float(block.max() / block.mean()) for block in blocks]
    return sum(sparse) / len(blocks), sum(incoherence) / len(blocks)


def test_order_scores_are_means_over_calls_and_batch():
    scores = OrderScores(2, 2, GRID, NAMES, OrderCriterion(sigma=0.71), row_share=1.0, seed=0)
    expected = torch.zeros(2, 2, 2, 2, dtype=torch.float64)
    for layer, seed in ((0, 0), (0, 1), (1, 2)):
        taken = call(seed, layer)
        scores.add(taken)
        samples = 4 if layer == 0 else 2
        for sample, head, number in torch.cartesian_prod(*[torch.arange(2)] * 3).tolist():
            q, k = taken.query[sample, :, head], taken.key[sample, :, head]
            metrics = brute_metrics(q, k, token_order(NAMES[number], GRID), 1 / GRID.tokens, 0.71, rows=[0])
            expected[:, layer, head, number] += torch.tensor(metrics) / samples
    sparse, incoherence = scores.means()
    assert 0 < sparse.mean() < 1
    torch.testing.assert_close(sparse, expected[0])
    torch.testing.assert_close(incoherence, expected[1], rtol=1e-5, atol=0)


def test_metrics_of_chosen_rows_look_at_those_rows_only():
    q, k = torch.randn(2, 333, 16, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(333, generator=torch.Generator().manual_seed(1))
    metrics = order_metrics(q, k, order, SCALE, OrderCriterion(), torch.tensor([1, 5]))
    assert metrics == pytest.approx(brute_metrics(q, k, order, 1 / 333, 0.9, rows=[1, 5]), rel=1e-5)


def test_row_share_draws_the_same_rows_for_the_same_seed_and_at_least_one():
    grid = TokenGrid(8, 16, 8)

    def drawn(share, seed):
        scores = OrderScores(1, 1, grid, AXIS_ORDERS, OrderCriterion(), share, seed)
        scores.add(call(0, grid=grid, heads=1))
        return scores.means()[1]

    assert torch.equal(drawn(0.25, 3), drawn(0.25, 3))
    assert not torch.equal(drawn(0.25, 3), drawn(0.25, 4))
    assert drawn(1e-9, 0).isfinite().all()


def test_block_sums_use_each_choices_orders_and_average_per_bucket():
    indices = [torch.tensor([[0, 1], [1, 0]], dtype=torch.uint8), torch.tensor([[1, 1], [0, 0]], dtype=torch.uint8)]
    sums = BlockSums(2, [(NAMES, index) for index in indices], GRID)
    expected = torch.zeros(2, 2, 2, 2, 2, 2)
    for bucket, layer, seed in ((0, 0, 1), (0, 0, 2), (1, 0, 3), (0, 1, 4), (1, 1, 5)):
        taken = call(seed, layer)
        sums.add(bucket, taken)
        samples = 4 if (bucket, layer) == (0, 0) else 2
        for choice, sample, head in torch.cartesian_prod(*[torch.arange(2)] * 3).tolist():
            order = token_order(NAMES[indices[choice][layer, head]], GRID)
            found = oracles.block_sums(taken.query[sample, :, head], taken.key[sample, :, head], order, SCALE)
            expected[choice, bucket, layer, head, 0, 0] += found[0, 0].float() / samples  # the others touch text
    torch.testing.assert_close(sums.means(), expected)


def test_block_sums_never_captured_are_zero():
    sums = BlockSums(2, [(("FHW",), torch.zeros(1, 1, dtype=torch.uint8))], GRID)
    sums.add(0, call(0, heads=1))
    assert sums.means()[0, 0].sum() > 0
    assert (sums.means()[0, 1] == 0).all()


def test_hidden_text_tokens_are_as_if_they_were_not_there():
    """Statistics of a padded call are those of the same call without its padding."""
    hidden = torch.ones(2, GRID.tokens, dtype=torch.bool)
    hidden[:, 1:3] = False  # of the four text tokens, which stand first
    padded = call(0, key_mask=hidden)
    short = replace(
        padded,
        grid=replace(GRID, text_tokens=2),
        key_mask=None,
        **{name: getattr(padded, name)[:, hidden[0]] for name in ("query", "key", "value")},
    )
    index = torch.zeros(1, 2, dtype=torch.uint8)
    found = []
    for taken in (padded, short):
        costs, sums = BlockCosts(1, ("WHF",), index, GRID, block_sums=True), BlockSums(1, [(("WHF",), index)], GRID)
        costs.add(0, taken)
        sums.add(0, taken)
        found.append([*costs.means().values(), sums.means()])
    for with_padding, without in zip(*found, strict=True):
        torch.testing.assert_close(with_padding, without)
    costs = BlockCosts(1, ("WHF",), index, GRID, block_sums=True)
    costs.add(0, replace(padded, key_mask=None))
    assert not torch.allclose(costs.means()["block_sums"], found[0][0])


def test_costs_in_a_byte_are_those_in_two_to_a_part_of_an_octave():
    grid, index = TokenGrid(6, 8, 12, 4, "prefix"), torch.zeros(1, 2, dtype=torch.uint8)
    in_bytes, in_two = (BlockCosts(1, ("WHF",), index, grid, in_bytes=choice) for choice in (True, False))
    for costs in (in_bytes, in_two):
        costs.add(0, replace(call(0, grid=grid), value=call(0, grid=grid).value / 30))  # the next ones are far larger
        costs.add(0, call(1, grid=grid))
    codes, expected = (found.means()["costs"].float() for found in (in_bytes, in_two))
    assert torch.equal(codes == 0, expected == 0)  # text
    assert (codes > 0).sum() > 50
    for head in range(2):
        own, of_head = codes[:, :, :, head], expected[:, :, :, head]
        octaves = of_head[own > 0].log2() - own[own > 0] / 8
        assert octaves.amax() - octaves.amin() < 0.2  # half a code twice, and bfloat16


def test_step_change_is_infinite_where_other_layers_are_called():
    change = StepChange(2, 2, GRID, 1.0, seed=0)
    for step, layer in enumerate((0, 0, 1, 1)):
        change.add(replace(call(step, layer), step=step))
    first, takeover, last = change.changes()
    assert takeover == float("inf")
    assert 0 < first < 10
    assert 0 < last < 10


def test_the_size_of_chunks_changes_nothing(monkeypatch):
    q, k = torch.randn(2, 333, 16, generator=torch.Generator().manual_seed(0))
    order = torch.arange(333).flip(0)
    metrics, sums = order_metrics(q, k, order, SCALE, OrderCriterion()), block_sums(q, k, [order], SCALE)
    monkeypatch.setattr(statistics, "_CHUNK_ENTRIES", 1)
    assert order_metrics(q, k, order, SCALE, OrderCriterion()) == pytest.approx(metrics, rel=1e-5)
    torch.testing.assert_close(block_sums(q, k, [order], SCALE), sums)


def test_block_areas_know_the_partial_blocks():
    assert block_areas(100).tolist() == [[4096, 64 * 36], [36 * 64, 36 * 36]]


@pytest.mark.parametrize(
    "wrong", [{"alpha": -0.1}, {"alpha": 1.1}, {"sigma": 0}, {"sigma": 1.1}, {"epsilon": 0.0}, {"relative_epsilon": 0}]
)
def test_criterion_names_what_is_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OrderCriterion(**wrong)
