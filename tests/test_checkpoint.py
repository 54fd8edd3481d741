"""Calibrations that are interrupted go on where they were, and end with the same plan."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors import SafetensorError

import paroattn
from paroattn.calibration.calibrate import collect_costs
from paroattn.calibration.checkpoint import Checkpoint, fingerprint, remove_work, weights_fingerprint
from paroattn.calibration.run import QUICK, CalibrationRun
from paroattn.cli.group import command_line
from paroattn.errors import InputError

PROMPTS = [tiny.call_arguments(), {**tiny.call_arguments(), "prompt_embeds": tiny.NEGATIVE}]
RECORDED = len(PROMPTS) + 1  # the number of the generation that is recorded: later ones begin in the middle of it
GENERATIONS = {"paroattn": 2 * len(PROMPTS) + QUICK.propagation_runs, "paper": 2 * len(PROMPTS)}
ORIGINAL = CalibrationRun.generate_one


@pytest.fixture(scope="module")
def pipe():
    return tiny.tiny_wan()


@pytest.fixture
def generations(monkeypatch):
    """Counts generations; `stop_at` interrupts the one of that number, within a denoising step."""

    class Generations:
        count = 0
        stop_at = None

    def generate_one(run, number, **arguments):
        Generations.count += 1
        if Generations.count != Generations.stop_at:
            return ORIGINAL(run, number, **arguments)
        scheduler = run.pipeline.scheduler

        def interrupt(*_, **__):
            raise KeyboardInterrupt

        own = vars(scheduler).get("step")
        scheduler.step = interrupt
        try:
            return ORIGINAL(run, number, **arguments)
        finally:
            if own is None:
                del scheduler.step
            else:
                scheduler.step = own

    monkeypatch.setattr(CalibrationRun, "generate_one", generate_one)
    return Generations


def calibrate(pipe, folder, method="paroattn", **changes):
    arguments = {"density": 0.75, "seed": 3, "progress": False, "work_dir": folder, **changes}
    run = {"paroattn": paroattn.calibrate, "paper": paroattn.calibrate_paper}[method]
    return run(pipe, PROMPTS, **arguments)


@pytest.fixture(scope="module")
def expected(pipe, tmp_path_factory):
    found = {}
    for method in GENERATIONS:
        path = tmp_path_factory.mktemp("expected") / method
        calibrate(pipe, None, method=method).save(path)
        found[method] = path.read_bytes()
    return found


@pytest.mark.parametrize(
    ("method", "stop_at"),
    [("paroattn", number) for number in range(1, 8)] + [("paper", number) for number in (1, 2, 4)],
)
def test_an_interrupted_calibration_goes_on_where_it_was(pipe, generations, expected, tmp_path, method, stop_at):
    generations.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt):
        calibrate(pipe, tmp_path / "work", method=method)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".calibration"]
    generations.stop_at, generations.count = None, 0
    calibrate(pipe, tmp_path / "work", method=method).save(tmp_path / "plan")
    again = method == "paroattn" and stop_at > RECORDED
    assert generations.count == GENERATIONS[method] - (stop_at - 1) + again
    assert (tmp_path / "plan").read_bytes() == expected[method]
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_the_effects_of_heads_are_resumed_bucket_by_bucket(pipe, tmp_path, monkeypatch):
    from paroattn.calibration.sensitivity import _HeadProbe

    arguments = {"densities": (0.75,), "seed": 3, "progress": False, "thorough": True}
    expected = collect_costs(pipe, PROMPTS, **arguments)
    buckets, original = [], _HeadProbe.__init__

    def counted(probe, pipe, draft, bucket, int4, cotangents):
        buckets.append(bucket)
        if len(buckets) == 3:
            raise KeyboardInterrupt
        original(probe, pipe, draft, bucket, int4, cotangents)

    monkeypatch.setattr(_HeadProbe, "__init__", counted)
    with pytest.raises(KeyboardInterrupt):
        collect_costs(pipe, PROMPTS, work_dir=tmp_path, **arguments)
    found = collect_costs(pipe, PROMPTS, work_dir=tmp_path, **arguments)
    assert buckets == [0, 1, 2, 2, 3]
    assert torch.equal(found.weights, expected.weights)  # also the random cotangents go on where they were


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"density": 0.8}, {"step_buckets": 2}, {"height": 80}, {"order_names": ("FHW",)}]
)
def test_work_of_other_arguments_is_not_taken(pipe, generations, tmp_path, change):
    generations.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        calibrate(pipe, tmp_path)
    generations.stop_at, generations.count = 2, 0
    with pytest.raises(KeyboardInterrupt):
        paroattn.calibrate(
            pipe,
            [{key: value for key, value in prompt.items() if key not in change} for prompt in PROMPTS],
            **{"density": 0.75, "seed": 3, "progress": False, "work_dir": tmp_path, **change},
        )
    assert generations.count == 2
    assert len({path.name[:16] for path in tmp_path.iterdir()}) == 2


def test_work_of_other_weights_is_not_taken(pipe):
    other = tiny.tiny_wan()
    assert weights_fingerprint([other.transformer]) == weights_fingerprint([pipe.transformer])
    with torch.no_grad():
        other.transformer.blocks[1].ffn.net[2].weight[0, 0] += 1e-3
    assert weights_fingerprint([other.transformer]) != weights_fingerprint([pipe.transformer])


def test_finished_statistics_are_read_at_once(pipe, generations, tmp_path):
    first = collect_costs(pipe, PROMPTS, progress=False, densities=(0.75,), work_dir=tmp_path)
    generations.count = 0
    second = collect_costs(pipe, PROMPTS, progress=False, densities=(0.75,), work_dir=tmp_path)
    assert generations.count == 0
    for name in ("costs", "errors", "norms", "weights", "usage", "order_index"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert first.provenance == second.provenance
    remove_work(tmp_path)
    assert not tmp_path.exists()


def test_a_broken_file_is_named(pipe, generations, tmp_path):
    generations.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        calibrate(pipe, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"orders.calibration' cannot be read .*; delete it to begin anew"):
        calibrate(pipe, tmp_path)


def test_fingerprints_tell_values_apart():
    tensor = torch.arange(4.0)
    values = [1, 1.0, "1", [1], [[1]], {"a": 1}, tensor, tensor.int(), tensor.view(2, 2), tensor + 1, None]
    assert len({fingerprint(value=value) for value in values}) == len(values)


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = Checkpoint()
    checkpoint.save("part", {"a": torch.zeros(1)}, {})
    assert checkpoint.load("part") is None
    assert list(tmp_path.iterdir()) == []


def test_the_command_ends_with_one_line_and_goes_on(generations, tmp_path):
    model, output = tmp_path / "wan", tmp_path / "plans"
    tiny.save_whole_wan(model)
    output.mkdir()
    arguments = ["calibrate", "--model", str(model), "--calibration-prompt", "a cat", "--density", "0.75"]
    arguments += ["--height", "64", "--width", "80", "--frames", "21", "--steps", "2", "--device", "cpu"]
    arguments += ["--output", str(output / "plan.safetensors")]
    generations.stop_at = 2
    result = CliRunner().invoke(command_line, arguments)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "Interrupted."
    assert "Traceback" not in result.output
    assert [path.name for path in output.iterdir()] == ["plan.safetensors.work"]
    generations.stop_at, generations.count = None, 0
    result = CliRunner().invoke(command_line, arguments)
    assert result.exit_code == 0, result.output
    assert generations.count == 3  # costs, and one for each of two steps
    assert [path.name for path in output.iterdir()] == ["plan.safetensors"]


def test_costs_beyond_the_memory_lie_in_a_file(pipe, tmp_path, expected, monkeypatch):
    made, from_file = [], torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *args, **kwargs: made.append(args) or from_file(*args, **kwargs))
    calibrate(pipe, tmp_path / "work", memory_gb=1e-9).save(tmp_path / "plan")
    ((name,),) = made
    assert str(tmp_path / "work") in name
    assert (tmp_path / "plan").read_bytes() == expected["paroattn"]
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_costs_that_fit_nowhere_are_refused_before_anything_was_generated(pipe, generations, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(InputError, match=r"costs takes .* more than memory_gb is, and than the .* free in '.*work'"):
        calibrate(pipe, tmp_path / "work", memory_gb=1e-9)
    assert generations.count == 1
    with pytest.raises(InputError, match="memory_gb is 0; expected a number above 0"):
        calibrate(pipe, None, memory_gb=0)


def test_quick_calibration_looks_at_one_step_of_each_bucket(pipe):
    """Layers that begin to be called within a bucket are looked at in a step of their own."""
    run = CalibrationRun(pipe, PROMPTS, (), 0, {}, False)
    run.schedule = (1.0, 0.8, 0.6, 0.4, 0.2)
    assert run.steps_of((0.0, 0.4), 1) == {(step, layer) for step in (1, 3) for layer in (0, 1)}
    run._called = {(0, 0), (1, 0), (2, 0), (3, 1), (4, 1)}
    assert run.steps_of((0.0, 0.4), 1) == {(1, 0), (2, 0), (4, 1)}
    assert run.steps_of((0.0, 0.4), None) == run._called


def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch):
    def fill_the_disk(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fill_the_disk)
    with pytest.raises(OSError, match=r"orders.calibration' cannot be written: No space left on device"):
        calibrate(tiny.tiny_wan(), tmp_path / "work")
