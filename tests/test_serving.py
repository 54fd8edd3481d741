"""What plug-ins of serving engines share: heads of a rank, whether a plan fits, counts, and the state of an engine."""

import logging

import pytest
import torch
from plan_files import small_plan

from paroattn.errors import PlanError
from paroattn.grid import TokenGrid
from paroattn.runner import Dense, Runner
from paroattn.serving import ServedPlan, Tally, heads_of_rank

GRID = TokenGrid(2, 8, 8)


@pytest.fixture
def tally():
    return Tally(logging.getLogger("engine"))


def tensors(heads=2, tokens=GRID.tokens + 5):
    return torch.randn(3, 1, tokens, heads, 8, generator=torch.Generator().manual_seed(1)).unbind(0)


@pytest.mark.parametrize("tensor_ranks", [1, 2, 4])
@pytest.mark.parametrize("sequence_ranks", [1, 2, 3])
def test_ranks_part_the_heads_in_order(tensor_ranks, sequence_ranks):
    layer_heads = 24 // tensor_ranks
    found = []
    for tensor in range(tensor_ranks):
        for sequence in range(sequence_ranks):
            where = {"tensor_rank": tensor, "sequence_rank": sequence, "sequence_ranks": sequence_ranks}
            found += heads_of_rank(layer_heads, layer_heads // sequence_ranks, **where)
    assert found == list(range(24))


def test_heads_that_are_no_ranks_share_are_dense():
    assert heads_of_rank(4, 4, sequence_rank=1, sequence_ranks=2) == range(4)  # outside of what ranks share
    answer = heads_of_rank(5, 3, sequence_rank=1, sequence_ranks=2)
    assert isinstance(answer, Dense)
    assert "3 of a layer's 5 heads" in answer.reason


def test_a_rank_computes_its_heads_and_each_level_is_looked_up_once(tally, monkeypatch):
    plan, given, levels, original = small_plan(), tensors(), [], Runner.bucket
    served = ServedPlan(plan, tally)
    monkeypatch.setattr(Runner, "bucket", lambda self, level: levels.append(level) or original(self, level))
    whole = Runner(plan, "cpu")
    for level in (1.0, torch.tensor(0.5)):
        expected = whole.call(0, *given, bucket=original(whole, level))
        for head in range(2):
            one = [x[:, :, head : head + 1] for x in given]
            for _ in range(3):
                output = served.attend(0, *one, heads=range(head, head + 1), grid=GRID, level=level)
            torch.testing.assert_close(output, expected[:, :, head : head + 1])
    assert len(levels) == 4  # of each head's runner


def test_equal_tensors_are_not_compared_by_value(tally, monkeypatch):
    served, looked_up, original = ServedPlan(small_plan(), tally), [], Runner.bucket
    monkeypatch.setattr(Runner, "bucket", lambda self, level: looked_up.append(level) or original(self, level))
    for level in (1.0, 1.0, torch.tensor(1.0), torch.tensor(1.0), 1.0):
        served.attend(0, *tensors(), heads=range(2), grid=GRID, level=level)
    assert len(looked_up) == 4


def test_other_grids_and_other_heads_are_dense(tally):
    served = ServedPlan(small_plan(), tally)
    assert (
        "plan is for grid 2x8x8" in served.attend(0, *tensors(), heads=range(2), grid=TokenGrid(8, 8, 2), level=1.0)[0]
    )
    assert served.attend(0, *tensors(), heads=Dense("no heads"), grid=GRID, level=1.0) == Dense("no heads")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_name": "Other"}, "its class is Model, this model's is Other"),
        ({"layers": 2}, "its number of layers is 1, this model's is 2"),
        ({"heads": 3}, "its number of heads is 2, this model's is 3"),
        ({"head_dim": 16}, "its head_dim is 8, this model's is 16"),
        ({"text": "prefix"}, "has text tokens as suffix; this model has them as prefix"),
        ({"text": None}, "has text tokens as suffix; this model has no text tokens"),
    ],
)
def test_a_plan_for_another_model_is_one_line(tally, changes, message):
    served = ServedPlan(small_plan(), tally, "cat.safetensors")
    fitting = {"class_name": "Model", "layers": 1, "heads": 2, "head_dim": 8, "text": "suffix"}
    served.check(**fitting)
    served.check(heads=2, head_dim=8, text="suffix")
    with pytest.raises(PlanError, match=message) as raised:
        served.check(**{**fitting, **changes})
    assert str(raised.value).startswith("cat.safetensors ")
    assert "\n" not in str(raised.value)


def test_loading_and_running_do_not_depend_on_an_engines_defaults(tally, tmp_path):
    plan, path, given = small_plan(), tmp_path / "plan.safetensors", tensors()
    plan.save(path)
    expected = Runner(plan, "cpu").call(0, *given, bucket=torch.tensor(0))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            served = ServedPlan.load(path, tally)
            assert torch.get_default_dtype() is torch.bfloat16
            assert torch.empty(0).device.type == "meta"
        output = served.attend(0, *given, heads=range(2), grid=GRID, level=1.0)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(output, expected)


def test_calls_are_counted_and_each_reason_is_a_warning_once(tally, caplog):
    caplog.set_level(logging.INFO, "engine")
    for reason in (None, "a", "a", "b"):
        tally.count(reason)
    tally.log_summary()
    tally.log_summary()
    tally.count("a")
    tally.log_summary()
    assert (tally.planned, tally.dense) == (1, {"a": 3, "b": 1})
    assert tally.summary() == "1 of 5 attention calls ran as planned; 3 did not: a; 1 did not: b"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "paroattn: a: the engine's own attention runs instead"),
        ("WARNING", "paroattn: b: the engine's own attention runs instead"),
        ("INFO", "paroattn: 1 of 4 attention calls ran as planned; 2 did not: a; 1 did not: b"),
        ("INFO", "paroattn: 0 of 1 attention calls ran as planned; 1 did not: a"),
    ]
