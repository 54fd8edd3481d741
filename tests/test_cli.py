"""The library's commands, on a whole tiny pipeline with random weights."""

import importlib.util
import json

import pytest
import tiny
import torch
from click.testing import CliRunner

from paroattn.cli import main
from paroattn.cli.group import command_line
from paroattn.cli.models import GenerationSettings, load_model
from paroattn.plan import Plan

SIZE = ["--height", "64", "--width", "80", "--frames", "21", "--steps", "2", "--device", "cpu"]


def run(*arguments):
    return CliRunner().invoke(command_line, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "wan"
    tiny.save_whole_wan(folder)
    return folder


@pytest.fixture(scope="module")
def plan_path(wan, tmp_path_factory):
    path = tmp_path_factory.mktemp("plans") / "small.safetensors"
    prompts = ("--calibration-prompt", "a cat", "--calibration-prompt", "a dog")
    result = run("calibrate", "--model", wan, *prompts, "--density", "0.75", "--output", path, *SIZE)
    assert result.exit_code == 0, result.output
    assert "density 0.750" in result.output
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    return path


def test_calibrate_writes_a_plan_that_show_shows(plan_path):
    shown = run("plan", "show", plan_path)
    assert shown.exit_code == 0
    assert "6x4x5 (120 visual tokens)" in shown.output
    facts = json.loads(run("plan", "show", plan_path, "--json").output)
    assert facts["density"] == 0.75
    assert facts["calibration"]["prompts"] == ["a cat", "a dog"]
    assert facts["calibration"]["method"] == "paroattn"
    assert len(facts["layers"]) == Plan.load(plan_path).model.layers


def test_calibrate_takes_what_the_function_takes(wan, tmp_path):
    path = tmp_path / "plan.safetensors"
    options = (
        "--precision int4 --int8-share 0.5 --dense-steps 0.5 --dense-layers 1 --order FHW --order HWF --block-q 128"
    )
    given = ("--model", wan, "--calibration-prompt", "a cat", "--step-buckets", 2, "--density", "0.9", "--output", path)
    result = run("calibrate", *given, *options.split(), *SIZE)
    assert result.exit_code == 0, result.output
    plan = Plan.load(path)
    assert plan.block_q == 128
    assert set(plan.order_names) <= {"FHW", "HWF"}
    assert [str(precision) for precision in plan.precisions] != ["exact"]
    assert plan.densities()[0].min() == 1  # the first half of the steps
    assert plan.densities()[:, 0].min() == 1  # the first layer


def test_the_papers_method_has_a_plan_of_its_own(wan, tmp_path):
    path = tmp_path / "paper.safetensors"
    given = ("--method", "paper", "--model", wan, "--calibration-prompt", "a cat", "--density", "0.75")
    result = run("calibrate", *given, "--output", path, *SIZE)
    assert result.exit_code == 0, result.output
    assert Plan.load(path).provenance["method"] == "paper"


@pytest.mark.parametrize("suffix", [".mp4", ".webp", ".gif"])
def test_generate_writes_a_video_with_the_plan(wan, plan_path, tmp_path, suffix):
    path = tmp_path / f"video{suffix}"
    result = run("generate", "--model", wan, "--prompt", "a dog", "--plan", plan_path, "--output", path, *SIZE)
    assert result.exit_code == 0, result.output
    assert "21 frames of 80 x 64 pixels" in result.output
    assert path.stat().st_size > 500


def test_sizes_that_the_model_rounds_are_told(wan, tmp_path):
    path = tmp_path / "video.gif"
    result = run("generate", "--model", wan, "--prompt", "a dog", "--output", path, *SIZE, "--frames", "20")
    assert result.exit_code == 0, result.output
    assert "21 frames of 80 x 64 pixels; the model rounds sizes" in result.output


def test_guidance_may_be_zero(wan):
    model = load_model(str(wan), device="cpu", height=64, width=80, num_frames=9, num_inference_steps=2)
    frames = {}
    for scale in (0.0, 1.0, 5.0):
        model.settings = model.settings.changed({"guidance_scale": scale})
        frames[scale] = model.generate("a cat", seed=1)
    assert torch.equal(frames[0.0], frames[1.0])
    assert not torch.equal(frames[0.0], frames[5.0])


def test_an_interruption_while_imports_run_is_no_traceback(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("paroattn.cli.require", interrupted)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130


def test_a_pipeline_generates_from_prompt_and_seed(wan):
    model = load_model(str(wan), device="cpu", height=64, width=80, num_frames=9, num_inference_steps=2)
    frames = model.generate("a cat", seed=1)
    assert frames.shape == (9, 3, 64, 80)
    assert not torch.equal(frames, model.generate("a dog", seed=1))


def test_a_plan_for_another_size_is_refused(wan, plan_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("generate", "--model", wan, "--prompt", "a cat", "--plan", plan_path, *SIZE, "--frames", "9")
    result = run(*arguments)
    assert result.exit_code == 2
    assert "plan is for grid 6x4x5 (120 visual tokens); this request has grid 3x4x5" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_or_edited_plan_is_refused(plan_path, tmp_path):
    content = plan_path.read_bytes()
    (tmp_path / "short").write_bytes(content[: len(content) // 2])
    (tmp_path / "edited").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for name, message in (("short", "truncated"), ("edited", "changed after it was written")):
        result = run("plan", "show", tmp_path / name)
        assert result.exit_code == 2
        assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["calibrate", "--method", "bogus"], "'bogus' is not one of"),
        (
            ["calibrate", "--method", "paper", "--block-q", "128"],
            "--block-q is 128, which method 'paper' does not have",
        ),
        (["calibrate", "--block-q", "32"], "'32' is not one of"),
        (["calibrate", "--density", "1.5"], "density is 1.5"),
        (["calibrate", "--density", "0.5", "--target-psnr", "30"], "density is 0.5 beside a target"),
        (["calibrate", "--precision", "int3"], "int3"),
        (["calibrate", "--model", "no-such-model"], "model 'no-such-model' does not exist"),
        (["calibrate", "--model", "WAN", *SIZE], "this model brings no prompts to calibrate on"),
        (
            ["calibrate", "--model", "WAN", "--calibration-prompt", "a cat", "--density", "0.001", *SIZE],
            "density 0.001 cannot be reached",
        ),
        (["calibrate", "--bogus"], "No such option"),
        (["calibrate", "--seed", str(2**63)], "9223372036854775808 is not in the range"),
        (["calibrate", "--output", __file__ + "/plan.safetensors"], "cannot be written"),
        (["generate", "--prompt", "a cat", "--output", __file__ + "/a.mp4"], "test_cli.py' is no directory"),
        (["generate"], "expected either --prompt or --prompts"),
        (["generate", "--prompts", __file__], "--prompts goes with --output-dir"),
        (["generate", "--model", "WAN", "--prompt", "a cat", *SIZE, "--height", "60"], "refuses its arguments: "),
        (["calibrate", "--model", "WAN", "--calibration-prompt", "a", *SIZE, "--width", "9"], "to be divisible by"),
        (["generate", "--prompt", "a cat", "--output", "video.avi"], "no known suffix"),
        (["generate", "--prompt", "a cat", "--plan", "missing.safetensors"], "does not exist"),
        (["generate", "--model", "WAN", "--prompt", "a cat", "--precision", "int3", *SIZE], "int3"),
        (["plan", "show", "missing.safetensors"], "does not exist"),
        (["bogus"], "No such command"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(wan, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run(*(wan if argument == "WAN" else argument for argument in arguments))
    assert result.exit_code == 2
    error = [line for line in result.stderr.splitlines() if line and "%|" not in line]
    assert len(error) == 1
    assert error[0].startswith("Error: ")
    assert message in error[0]
    assert "Traceback" not in result.output
    assert list(tmp_path.rglob("*")) == []


def test_a_bug_keeps_its_traceback(plan_path, monkeypatch):
    def broken(path):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Plan, "load", broken)
    assert repr(run("plan", "show", plan_path).exception) == "RuntimeError('a bug')"


def test_a_missing_part_is_found_before_work_begins(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name == "imageio_ffmpeg" else find_spec(name, *_)
    )
    result = run("generate", "--prompt", "a cat", "--output", tmp_path / "video.mp4")
    assert result.exit_code == 2
    assert result.stderr == "Error: imageio_ffmpeg is not installed; run: pip install 'paroattn[cli]'\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["calibrate", "generate"])
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "but torch sees no GPU; expected cpu"),
        ("tpu9", "expected cpu or cuda"),
        ("meta", "expected cpu or cuda"),
    ],
)
def test_a_device_that_is_not_there_gets_one_line(command, device, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    needed = {"calibrate": ["--output", "x.safetensors"], "generate": ["--prompt", "a cat", "--output", "x.mp4"]}
    result = run(command, "--device", device, *needed[command])
    assert result.exit_code == 2
    assert f"--device is {device!r}" in result.stderr
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["calibrate", "generate", "plan", "plans"])
def test_every_command_shows_examples(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"paroattn {command}" in result.output.split("Examples:")[1]


def test_a_folder_of_an_incomplete_pipeline_is_refused(tmp_path):
    tiny.tiny_wan().save_pretrained(tmp_path / "without-vae")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(str(tmp_path / "without-vae"), device="cpu")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no-such-model", "does not exist; expected .*a diffusers pipeline folder, or a Hub name"),
        ("./missing/folder", "does not exist"),
        ("{tmp}", "is a folder without model_index.json"),
        ("{tmp}/file", "does not exist"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path, source, message):
    with pytest.raises(ValueError, match=message):
        load_model(source.format(tmp=tmp_path))


@pytest.mark.parametrize("changes", [{"height": 0}, {"num_inference_steps": -1}, {"guidance_scale": True}])
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        GenerationSettings(**changes)
