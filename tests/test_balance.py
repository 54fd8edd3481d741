"""Heads shared by ranks: each has as many, all are busy alike, and the places of a rank keep their precision."""

import pytest
import tiny
import torch
from click.testing import CliRunner

from paroattn import LayerPlan, Plan, Precision, TokenGrid, prepare
from paroattn.balance import balanced_heads, head_costs, heads_in_order, load_of
from paroattn.block_mask import block_count, pack_bits
from paroattn.cli.group import command_line
from paroattn.errors import InputError
from paroattn.plan import ModelIdentity

GRID, LARGE = TokenGrid(8, 8, 10), TokenGrid(16, 16, 60)


def plan_of(heads, buckets=3, layers=2, precisions=("int8",), seed=0, grid=GRID):
    """Densities log-normal about 0.2, within 0.05 and 0.6."""
    generator = torch.Generator().manual_seed(seed)
    blocks = block_count(grid.tokens, 64)
    densities = 0.2 * (0.7 * torch.randn(buckets, layers, heads, 1, 1, generator=generator)).exp()
    masks = torch.rand(buckets, layers, heads, blocks, blocks, generator=generator) < densities.clamp(0.05, 0.6)
    masks |= torch.eye(blocks, dtype=torch.bool)
    return Plan(
        model=ModelIdentity("Any", "", layers, heads, 16),
        grid=grid,
        order_names=("FHW", "HWF", "WFH"),
        order_index=torch.randint(3, (layers, heads), generator=generator, dtype=torch.uint8),
        precisions=tuple(map(Precision.parse, precisions)),
        precision_index=torch.randint(len(precisions), (layers, heads), generator=generator, dtype=torch.uint8),
        schedule=tuple(1 - i / 10 for i in range(10)),
        bucket_edges=tuple(i / buckets for i in range(buckets)),
        mask_table=pack_bits(masks).flatten(0, 2),
        mask_index=torch.arange(buckets * layers * heads, dtype=torch.int32).view(buckets, layers, heads),
        compensate=torch.rand(buckets, layers, heads, generator=generator) < 0.5,
        usage=torch.ones(buckets, layers),
    )


@pytest.mark.parametrize(("heads", "ranks"), [(12, 2), (24, 4), (40, 4), (40, 8), (48, 8)])
def test_from_five_heads_on_the_slowest_rank_is_within_two_percent_of_the_mean(heads, ranks):
    plan = plan_of(heads, grid=LARGE)
    balanced = balanced_heads(plan, ranks)
    assert all(sorted(order) == list(range(heads)) for order in balanced.flatten(0, 1).tolist())
    assert load_of(plan, balanced, ranks).slowest < 1.02
    assert load_of(plan, heads_in_order(plan), ranks).slowest > 1.04
    assert sum(load_of(plan, balanced, ranks).shares) == pytest.approx(1)


@pytest.mark.parametrize(("heads", "ranks"), [(12, 4), (24, 8)])
def test_with_three_heads_it_is_within_seven(heads, ranks):
    plan = plan_of(heads, buckets=8, grid=LARGE)
    assert load_of(plan, balanced_heads(plan, ranks), ranks).slowest < 1.07
    assert load_of(plan, heads_in_order(plan), ranks).slowest > 1.15


def test_no_other_sharing_of_few_heads_is_much_better():
    """Against all of them."""
    from itertools import combinations

    plan = plan_of(8, buckets=4)
    costs, found = head_costs(plan), balanced_heads(plan, 2)
    for bucket, layer in ((b, n) for b in range(4) for n in range(2)):
        own = costs[bucket, layer]
        best = min(max(own[list(some)].sum(), own.sum() - own[list(some)].sum()) for some in combinations(range(8), 4))
        slowest = own[found[bucket, layer]].view(2, 4).sum(1).max()
        assert slowest <= 1.01 * best


def test_places_keep_their_precision_in_all_step_buckets():
    plan = plan_of(24, precisions=("int4", "int8", "exact"), grid=LARGE)
    balanced = balanced_heads(plan, 4)
    kinds = plan.precision_index.long().expand(3, -1, -1).gather(-1, balanced)
    assert torch.equal(kinds, kinds[:1].expand_as(kinds))
    assert not torch.equal(balanced[0], balanced[1])
    assert load_of(plan, balanced, 4).slowest < 1.1


def test_costs_count_kept_and_approximated_blocks_and_precisions():
    plan = plan_of(8, precisions=("int8", "exact"))
    costs, kept = head_costs(plan), plan.densities() * 10
    in_8_bits = (plan.precision_index == 0).expand(3, -1, -1)
    assert torch.allclose((costs - 16)[in_8_bits], (kept + plan.compensate * 10 / 64)[in_8_bits])
    assert bool(((costs - 16)[~in_8_bits] > 1.5 * kept[~in_8_bits]).all())


@pytest.mark.parametrize("ranks", [0, 3])
def test_heads_that_cannot_be_shared_evenly(ranks):
    with pytest.raises(InputError, match=f"ranks is {ranks}; expected a number that divides the 8 heads"):
        balanced_heads(plan_of(8), ranks)


def test_a_part_for_heads_that_differ_by_step_bucket_attends_as_the_whole_layer():
    plan = plan_of(8, precisions=("exact", "int8"))
    layer, heads = plan.layer(1), balanced_heads(plan, 2)[:, 1]
    arguments = {"device": "cpu", "dtype": torch.float32}
    query, key, value = torch.randn(3, 1, 8, GRID.tokens, 16).unbind()
    whole = prepare(layer, **arguments)
    assert not torch.equal(heads[0], heads[1])
    for rank in range(2):
        mine = heads[:, 4 * rank : 4 * rank + 4]
        part = layer.of_heads(mine)
        assert part.order_index.ndim == 2
        op = prepare(part, **arguments)
        for number in range(3):
            bucket, own = torch.tensor(number), mine[number]
            expected = whole(query, key, value, bucket=bucket)[:, own]
            assert torch.equal(op(query[:, own], key[:, own], value[:, own], bucket=bucket), expected)


def test_heads_in_one_order_for_all_buckets_need_no_looking_up():
    part = plan_of(8).layer(0).of_heads(torch.tensor([3, 1]))
    assert isinstance(part, LayerPlan)
    assert part.order_index.ndim == 1
    assert part.mask_index.tolist() == [[3, 1], [19, 17], [35, 33]]


def test_the_command_shows_both_orders_of_heads(tmp_path):
    path = tmp_path / "plan.safetensors"
    plan_of(8).save(path)
    result = CliRunner().invoke(command_line, ["plan", "balance", str(path), "--ranks", "2,4"])
    assert result.exit_code == 0
    assert result.stdout.count("balanced") == 2
    for ranks, message in (
        ("3", "expected a number that divides the 8 heads"),
        ("2,,4", "expected numbers with commas"),
    ):
        result = CliRunner().invoke(command_line, ["plan", "balance", str(path), "--ranks", ranks])
        assert result.exit_code != 0
        assert message in result.output


def test_digests_differ_with_what_attention_depends_on():
    plan = plan_of(8)
    assert plan.digest == plan_of(8).digest
    assert plan.digest != plan_of(8, seed=1).digest
    assert plan.digest != tiny.make_plan(tiny.tiny_wan()).digest
