"""Results, records and the report."""

import json
import math

import pytest
import tiny
import torch
from frames_model import FramesModel
from paroattn_lab.quality.evaluation_records import evaluation_records
from paroattn_lab.quality.metrics import Closeness
from paroattn_lab.quality.pairs import FULL, Variant, VariantResult, evaluate_variants
from paroattn_lab.records import write_records

from paroattn.integrations.clock import TransformerClock


@pytest.fixture(scope="module")
def model():
    return FramesModel()


@pytest.fixture(scope="module")
def evaluation(model):
    variants = [
        Variant("all blocks", plan=tiny.make_plan(model.pipe)),
        Variant.of(tiny.make_plan(model.pipe, precision="int4"), "paroattn", 1.0, label="INT4"),
    ]
    return evaluate_variants(model, variants, [("first", 1), ("second", 2)], progress=False)


def test_variants_are_compared_pair_by_pair_with_full_attention(evaluation):
    exact, int4 = evaluation.results
    assert exact.mean("psnr") > int4.mean("psnr") + 20
    assert set(evaluation.videos) == {FULL, "all blocks", "INT4"}
    assert not torch.equal(*evaluation.videos[FULL])  # the two pairs differ
    difference = (evaluation.videos["INT4"][1] - evaluation.videos[FULL][1]).square().mean()
    assert int4.closeness[1].psnr == pytest.approx(-10 * math.log10(difference), rel=1e-4)


def test_mean_spread_and_paired_gain():
    def result(*psnr):
        return VariantResult(Variant("x"), tuple(Closeness(value, 1, 1) for value in psnr), (2.0, 3.0, 7.0))

    assert result(20, 24).mean("psnr") == 22
    assert result(20, 24).spread("psnr") == pytest.approx(math.sqrt(8))
    assert result(21).spread("psnr") == 0
    assert result(21).speed_up == 3
    gain, error = result(20, 24, 28).gain_over(result(19, 22, 25))
    assert gain == 2
    assert error == pytest.approx(1 / math.sqrt(3))


def test_the_clock_counts_the_transformer_alone(model, monkeypatch):
    times = iter(range(100))
    monkeypatch.setattr("paroattn.integrations.clock.time.perf_counter", lambda: next(times))
    calls = []
    hook = model.pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    with TransformerClock(model.pipe.transformer) as clock:
        model.generate("first", 1)
    model.generate("first", 1)  # outside the block nothing counts
    hook.remove()
    # Three looks at the clock per call: before it, when it returned, and when the device had finished.
    assert clock.seconds == 2 * clock.launch_seconds == len(calls)
    assert calls


def test_speed_ups_are_ratios_of_seconds_pair_by_pair(evaluation):
    for result in evaluation.results:
        own, full = evaluation.seconds[result.variant.name], evaluation.seconds[FULL]
        assert min(own + full) > 0
        assert result.speed_ups == tuple(a / b for a, b in zip(full, own, strict=True))


def test_records_are_json_lines_with_every_pair(model, evaluation, tmp_path):
    write_records(evaluation_records(model, evaluation), tmp_path / "records.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [line["variant"] for line in lines] == ["all blocks", "INT4"]
    assert [pair["seed"] for pair in lines[1]["pairs"]] == [1, 2]
    assert lines[1]["psnr"] == pytest.approx(sum(pair["psnr"] for pair in lines[1]["pairs"]) / 2)
    assert lines[0]["density"] == 1
    fields = [(line["method"], line["asked_density"], line["precision"]) for line in lines]
    assert fields == [("all blocks", None, "exact"), ("paroattn", 1.0, "int4")]
    assert {"machine", "threads", "versions", "commit"} <= set(lines[0])


def test_names_are_made_of_the_fields(model):
    plan = tiny.make_plan(model.pipe, precision="int8")
    assert Variant.of(plan, "paper", 0.3).name == "paper 0.3 + int8"
    assert Variant("vertical-slash", 0.5).name == "vertical-slash 0.5"
    assert Variant.of(plan, "paper", 0.3, label="mine").name == "mine"
    assert Variant.of(plan, "paper", 0.3).asked == Variant.of(plan, "paroattn", 0.3).asked
