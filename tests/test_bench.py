"""`paroattn bench attention`: its masks, its check and its records."""

import json

import pytest
import torch
from click.testing import CliRunner

import paroattn
from paroattn.cli import main
from paroattn.evaluation import bench
from paroattn.evaluation.bench import Contender, Shape, bench_attention


def test_masks_have_exactly_the_wanted_density_and_keep_the_diagonal():
    inputs = bench._Inputs(Shape(tokens=64 * 20, heads=3, head_dim=4), seed=0)
    mask = inputs.mask(0.3, unequal=False)
    assert mask.sum((1, 2)).tolist() == [120] * 3
    assert mask.diagonal(dim1=1, dim2=2).all()
    assert not torch.equal(mask[0], mask[1])
    assert inputs.mask(0.3, unequal=True).sum((1, 2)).tolist() == [60, 120, 180]
    assert sorted(inputs.order[1].tolist()) == list(range(64 * 20))


def test_ratios_are_medians_over_rounds_to_the_faster_dense_attention():
    contender = Contender("paroattn", "int8", 0.5, True, lambda: 0.0)
    record = bench._record(contender, times=[1.0, 2.0, 1.0], dense=[4.0, 4.0, 6.0])
    assert record["times_sdpa"] == 4.0
    assert record["median_ms"] == 1000.0


def test_records_say_what_was_measured_where():
    records = bench_attention(Shape(130, 2, 16), [1.0, 0.6], ["int8"], rounds=2, flex=False, progress=False)
    kinds = [(record["method"], record["precision"], record["density"]) for record in records]
    assert kinds[:3] == [("sdpa", "fp32", 1.0), ("sdpa", "bf16", 1.0), ("paroattn", "int8", 1.0)]
    assert kinds[-1] == ("paroattn", "int8", 0.6)
    for record in records:
        assert record["tokens"] == 130
        assert record["rounds"] == 2
        assert record["median_ms"] > 0
        assert {"machine", "threads", "versions", "commit"} <= record.keys()
        assert (record["error"] is None) == (record["method"] == "sdpa")
        assert record["compensate"] is False


def test_compensation_is_timed_beside_the_same_without():
    records = bench_attention(
        Shape(200, 2, 16), [1.0, 0.6], ["exact"], rounds=1, flex=False, compensate=True, progress=False
    )
    whole = [(record["density"], record["compensate"]) for record in records if record["prologue"]]
    assert whole == [(1.0, False), (0.6, False), (0.6, True)]
    assert all(record["error"] < 1e-6 for record in records if record["prologue"])


def test_the_check_knows_what_compensation_computes():
    inputs = bench._Inputs(Shape(200, 2, 16), seed=0)
    mask = inputs.mask(0.5, unequal=False)
    tensors = inputs.tensors[torch.float32]
    arguments = {"permutation": inputs.order, "block_mask": mask}
    for compensate in (True, False):
        output = paroattn.attention(*tensors, **arguments, compensate=compensate)
        assert inputs._error(output, tensors, mask, compensate) < 1e-6
        assert inputs._error(output, tensors, mask, not compensate) > 0.1


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    monkeypatch.setattr(bench, "_ERROR_LIMITS", {"int8": 1e-9})
    with pytest.raises(ArithmeticError, match=r"int8 at density 1 is 0.0\d+ from float64"):
        bench_attention(Shape(130, 2, 16), [1.0], ["int8"], rounds=1, flex=False, progress=False)


def test_the_command_prints_one_json_line_per_record_and_writes_them(tmp_path):
    path = tmp_path / "records.jsonl"
    arguments = ["bench", "attention", "--tokens", "100", "--densities", "0.5", "--precisions", "exact,int8"]
    arguments += ["--rounds", "1", "--no-flex", "--json", "--output", str(path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert lines == [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["method"] for line in lines} == {"sdpa", "paroattn"}


def test_the_command_times_compensation_when_asked():
    arguments = ["bench", "attention", "--tokens", "200", "--densities", "0.6", "--precisions", "int8", "--rounds", "1"]
    result = CliRunner().invoke(main, [*arguments, "--no-flex", "--compensate"])
    assert result.exit_code == 0, result.output
    assert "paroattn int8, compensated" in result.stdout
    assert "compensated" not in CliRunner().invoke(main, [*arguments, "--no-flex"]).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--densities", "1,x"], "expected numbers separated by commas"),
        (["--densities", "0"], "density is 0.0"),
        (["--precisions", "int9"], "precision qk is 'int9'"),
        (["--backend", "magic"], "backend 'magic' is unknown"),
    ],
)
def test_bad_arguments_end_with_one_line(arguments, message):
    result = CliRunner().invoke(main, ["bench", "attention", "--tokens", "100", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
