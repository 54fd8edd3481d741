"""`paroattn bench attention`: its masks, its check and its records."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from paroattn_lab.speed import bench
from paroattn_lab.speed.bench import Contender, Shape, bench_attention
from paroattn_lab.speed.peers import Peer, sdpa
from paroattn_lab.speed.roofline import gpu_rooflines

import paroattn
from paroattn.cli.group import command_line
from paroattn.quantize import Precision


def test_masks_have_exactly_the_wanted_density_and_keep_the_diagonal():
    inputs = bench._Inputs(Shape(tokens=64 * 20, heads=3, head_dim=4), 0, torch.device("cpu"))
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
        work = 4e-12 * 2 * 130**2 * 16 * record["density"]
        assert record["tflops"] == pytest.approx(work / record["median_ms"] * 1000)
        assert record["matrix_roofline_ms"] is None


def test_compensation_is_timed_beside_the_same_without():
    records = bench_attention(
        Shape(200, 2, 16), [1.0, 0.6], ["exact"], rounds=1, flex=False, compensate=True, progress=False
    )
    whole = [(record["density"], record["compensate"]) for record in records if record["prologue"]]
    assert whole == [(1.0, False), (0.6, False), (0.6, True)]
    assert all(record["error"] < 1e-6 for record in records if record["prologue"])


def test_the_check_knows_what_compensation_computes():
    inputs = bench._Inputs(Shape(200, 2, 16), 0, torch.device("cpu"))
    mask = inputs.mask(0.5, unequal=False)
    tensors = inputs.tensors[torch.float32]
    arguments = {"permutation": inputs.order, "block_mask": mask}
    for compensate in (True, False):
        output = paroattn.attention(*tensors, **arguments, compensate=compensate)
        assert inputs._error(output, tensors, mask, inputs.blocks, inputs.order, compensate) < 1e-6
        assert inputs._error(output, tensors, mask, inputs.blocks, inputs.order, not compensate) > 0.1


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    monkeypatch.setattr(bench, "_ERROR_LIMITS", {"int8": 1e-9})
    with pytest.raises(ArithmeticError, match=r"int8 at density 1 is 0.0\d+ from float64"):
        bench_attention(Shape(130, 2, 16), [1.0], ["int8"], rounds=1, flex=False, progress=False)


def test_the_command_prints_one_json_line_per_record_and_writes_them(tmp_path):
    path = tmp_path / "records.jsonl"
    arguments = ["bench", "attention", "--tokens", "100", "--density", "0.5", "--precision", "exact"]
    arguments += ["--precision", "int8", "--rounds", "1", "--no-flex", "--json", "--output", str(path)]
    result = CliRunner().invoke(command_line, arguments)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert lines == [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["method"] for line in lines} == {"sdpa", "paroattn"}


def test_the_command_times_compensation_when_asked():
    arguments = ["bench", "attention", "--tokens", "200", "--density", "0.6", "--precision", "int8", "--rounds", "1"]
    result = CliRunner().invoke(command_line, [*arguments, "--no-flex", "--compensate"])
    assert result.exit_code == 0, result.output
    assert "paroattn int8, compensated" in result.stdout
    assert "compensated" not in CliRunner().invoke(command_line, [*arguments, "--no-flex"]).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--density", "x"], "'x' is not a valid float"),
        (["--density", "0"], "density is 0.0"),
        (["--precision", "int9"], "precision qk is 'int9'"),
        (["--backend", "magic"], "backend 'magic' is unknown"),
        pytest.param(
            ["--backend", "triton"],
            "backend 'triton' cannot do this: torch sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
    ],
)
def test_bad_arguments_end_with_one_line(arguments, message):
    result = CliRunner().invoke(command_line, ["bench", "attention", "--tokens", "100", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_masks_may_have_rows_of_128_queries():
    inputs = bench._Inputs(Shape(300, 2, 16), 0, torch.device("cpu"), blocks=(128, 64))
    mask = inputs.mask(0.6, unequal=False)
    assert mask.shape == (2, 3, 5)
    tensors = inputs.tensors[torch.float32]
    block_mask = paroattn.BlockMask.from_dense(mask, 300, 128)
    output = paroattn.attention(*tensors, permutation=inputs.order, block_mask=block_mask)
    assert inputs._error(output, tensors, mask, inputs.blocks, inputs.order) < 1e-6


def test_rooflines_are_those_of_the_gpu(monkeypatch):
    hopper = SimpleNamespace(major=9, minor=0, multi_processor_count=132, clock_rate=1_755_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: hopper)
    found = gpu_rooflines(Precision.parse("int8/exact"), 2 * 48 * 17_776**2, 64, torch.device("cuda"))
    assert found["exp2_roofline_ms"] == pytest.approx(8.18, abs=0.01)  # docs/gpu-design.md
    assert found["matrix_roofline_ms"] == pytest.approx(
        2 * 30.34e9 * 64 / (132 * 1.755e6) * (1 / 8192 + 1 / 4096), rel=1e-3
    )
    hopper.major = 7
    assert gpu_rooflines(Precision(), 1.0, 64, torch.device("cuda"))["matrix_roofline_ms"] is None


def test_peers_that_are_missing_or_refuse_are_left_out(caplog):
    def refuse(*_):
        raise RuntimeError("no kernel for this\nand a long story")

    tensors = [torch.zeros(1, 1, 4, 4)] * 3
    assert Peer("missing", "no_such_package.part", refuse).call(*tensors, None, (64, 64)) is None
    assert not caplog.records
    assert Peer("refusing", "torch", refuse).call(*tensors, None, (64, 64)) is None
    assert caplog.messages == ["refusing is left out: no kernel for this"]
    found = Peer("math", "torch", functools.partial(sdpa, "MATH")).call(*tensors, None, (64, 64))
    assert torch.equal(found(), tensors[0])


def test_peers_get_masks_in_blocks_of_their_own():
    mask = torch.tensor([[[True, False], [False, True]]])
    given = []
    tensors = [torch.zeros(1, 1, 200, 4)] * 3

    def prepare(*arguments):
        given.append(arguments[3:])
        return lambda: arguments[0]

    small = Peer("small", "torch", prepare, ((128, 64), (64, 64)))
    assert small.takes((128, 128))
    assert not small.takes((32, 32))
    small.call(*tensors, mask, (128, 128))
    ((own, blocks),) = given
    assert blocks == (128, 64)
    # 200 tokens have two blocks of 128 and four of 64.
    assert own.tolist() == [[[True, True, False, False], [False, False, True, True]]]
