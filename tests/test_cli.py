"""The command line, on the bundled model at a small size."""

import json

import pytest
from click.testing import CliRunner

from paroattn.cli import main
from paroattn.evaluation.ablation import PRECISIONS, precisions_of
from paroattn.plan import Plan

SMALL = ["--frames", "3", "--steps", "2", "--device", "cpu"]
PROMPT = "a slow red two over the cat"


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def plan_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("plans") / "small.safetensors"
    result = run("calibrate", "--prompt", PROMPT, "--density", "0.4", "--output", path, *SMALL)
    assert result.exit_code == 0, result.output
    assert "density 0.400" in result.output
    return path


def test_calibrate_writes_a_plan_that_inspect_shows(plan_path):
    shown = run("inspect", plan_path)
    assert shown.exit_code == 0
    assert "3x16x16 (768 visual tokens)" in shown.output
    facts = json.loads(run("inspect", plan_path, "--json").output)
    assert facts["density"] == pytest.approx(0.4, abs=0.001)
    assert facts["calibration"]["prompts"] == [PROMPT]
    assert len(facts["layers"]) == Plan.load(plan_path).model.layers


@pytest.mark.parametrize("suffix", [".mp4", ".webp", ".gif"])
def test_generate_writes_a_video_with_the_plan(plan_path, tmp_path, suffix):
    path = tmp_path / f"video{suffix}"
    result = run("generate", "--prompt", PROMPT, "--plan", plan_path, "--output", path, *SMALL)
    assert result.exit_code == 0, result.output
    assert "3 frames of 128 x 128 pixels" in result.output
    assert path.stat().st_size > 500


def test_evaluate_compares_given_plans(plan_path, tmp_path):
    report = tmp_path / "pages" / "mine.html"
    options = ("--output-dir", tmp_path / "out", "--report", report, "--json", *SMALL)
    result = run("evaluate", "--plan", plan_path, "--pairs", "1", *options)
    assert result.exit_code == 0, result.output
    (record,) = json.loads(result.stdout)
    assert record["variant"] == "small"
    assert 5 < record["psnr"] < 100
    assert record["attention"]["full_seconds"] > 0
    assert len(record["heads"]["errors"][0]) == Plan.load(plan_path).model.layers
    assert 'id="head-browser"' in report.read_text()
    assert not (tmp_path / "out" / "report.html").exists()


def test_demo_prints_the_table_and_writes_the_report(tmp_path):
    result = run("demo", "--output-dir", tmp_path / "demo", *SMALL)
    assert result.exit_code == 0, result.output
    for variant in ("paroattn 0.5", "paroattn 0.3", "paroattn 0.2", "paper 0.3", "INT8"):
        assert variant in result.output
    written = sorted(path.name for path in (tmp_path / "demo").iterdir())
    assert written == ["plans", "records.jsonl", "report.html"]
    html = (tmp_path / "demo" / "report.html").read_text()
    assert "data:video/mp4" in html
    assert "paroattn 0.3 + INT8 computed 30.0% of the attention blocks" in html
    assert len(list((tmp_path / "demo" / "plans").iterdir())) == 5


def test_ablate_compares_methods_and_writes_a_record_each(tmp_path):
    chosen = ("paper", "ours", "sliding window", "vertical-slash", "compensation everywhere")
    options = [word for name in chosen for word in ("--method", name)]
    result = run("ablate", "--density", "0.4", "--pairs", "2", "--output-dir", tmp_path, *options, *SMALL)
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert {record["method"] for record in records} == set(chosen)
    by_place = {(record["method"], record["asked_density"], record["precision"]): record for record in records}
    ours, paper = by_place["ours", 0.4, "exact"], by_place["paper", 0.4, "exact"]
    assert ours["density"] == pytest.approx(0.4, abs=0.01)
    gains = [a - b for a, b in zip(ours["psnr_pairs"], paper["psnr_pairs"], strict=True)]
    assert ours["over_paper"] == pytest.approx(sum(gains) / 2)
    assert ours["over_paper_error"] == pytest.approx(abs(gains[0] - gains[1]) / 2)
    assert paper["over_paper"] == 0
    assert by_place["ours", 0.5, "int4"]["psnr"] < by_place["ours", 1.0, "int8"]["psnr"]
    assert "over the paper" in result.output
    page = (tmp_path / "report.html").read_text()
    assert all(name in page for name in chosen)
    assert "Heads of ours 0.3 + int8" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ablate", "--density", "0"], "density is 0"),
        (["ablate", "--density", "0.4", "--method", "bogus", *SMALL], "method 'bogus' is unknown"),
        (["calibrate", "--method", "bogus"], "'bogus' is not one of"),
        (["calibrate", "--block-q", "32"], "'32' is not one of"),
        (["calibrate", "--density", "1.5"], "density is 1.5"),
        (["calibrate", "--precision", "int3"], "int3"),
        (["calibrate", "--model", "no-such-model"], "model 'no-such-model' does not exist"),
        (["calibrate", "--prompt", "a purple zebra", *SMALL], "unknown words: purple, zebra"),
        (["calibrate", "--density", "0.001", *SMALL], "density 0.001 cannot be reached"),
        (["calibrate", "--bogus"], "No such option"),
        (["generate"], "Missing option '--prompt'"),
        (["generate", "--prompt", PROMPT, "--output", "video.avi"], "no known suffix"),
        (["generate", "--prompt", PROMPT, "--plan", "missing.safetensors"], "does not exist"),
        (["generate", "--prompt", PROMPT, "--precision", "int3", *SMALL], "int3"),
        (["inspect", "missing.safetensors"], "does not exist"),
        (["evaluate", "--density", "0", *SMALL], "density is 0"),
        (["evaluate", "--prompt", "a purple zebra", *SMALL], "unknown words"),
        (["bogus"], "No such command"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    error = [line for line in result.stderr.splitlines() if line and "calibration" not in line]
    assert len(error) == 1
    assert error[0].startswith("Error: ")
    assert message in error[0]
    assert "Traceback" not in result.output
    assert list(tmp_path.rglob("*")) == []


def test_a_plan_for_another_size_is_refused(plan_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("generate", "--prompt", PROMPT, "--plan", plan_path, "--frames", "2", "--steps", "2")
    assert result.exit_code == 2
    assert "plan is for grid 3x16x16 (768 visual tokens); this request has grid 2x16x16" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_or_edited_plan_is_refused(plan_path, tmp_path):
    content = plan_path.read_bytes()
    (tmp_path / "short").write_bytes(content[: len(content) // 2])
    (tmp_path / "edited").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for name, message in (("short", "truncated"), ("edited", "changed after it was written")):
        result = run("inspect", tmp_path / name)
        assert result.exit_code == 2
        assert message in result.stderr


@pytest.mark.parametrize("command", ["demo", "calibrate", "generate", "evaluate", "ablate"])
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
    needed = {"calibrate": ["--output", "x.safetensors"], "generate": ["--prompt", PROMPT, "--output", "x.mp4"]}
    result = run(command, "--device", device, *needed.get(command, []))
    assert result.exit_code == 2
    assert f"--device is {device!r}" in result.stderr
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_gpu_beyond_the_last_gets_one_line(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    result = run("demo", "--device", "cuda:2")
    assert result.exit_code == 2
    assert result.stderr == "Error: --device is 'cuda:2'; torch sees 2 GPUs, counted from 0\n"


@pytest.mark.parametrize(
    ("options", "cuda", "name"),
    [
        ([], False, "moving-digits"),
        ([], True, "moving-digits-large"),
        (["--image"], False, "painted-digits"),
        (["--image"], True, "painted-digits-large"),
        (["--model", "tiny"], True, "moving-digits"),
        (["--image", "--model", "large"], False, "painted-digits-large"),
        (["--model", "some/model"], True, "some/model"),
    ],
)
def test_demo_takes_the_bundled_model_that_suits_the_device(options, cuda, name, monkeypatch):
    def load_model(source, **_):
        raise ValueError(f"asked for {source}")

    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("paroattn.integrations.generation.load_model", load_model)
    assert run("demo", *options).stderr == f"Error: asked for {name}\n"


def test_demo_says_that_image_and_another_model_exclude_each_other():
    result = run("demo", "--image", "--model", "moving-digits")
    assert result.exit_code == 2
    assert "--model is 'moving-digits' with --image; expected tiny, large" in result.stderr


def test_ablation_leaves_out_precisions_that_the_backend_lacks(tmp_path, monkeypatch):
    from paroattn.ops import reference

    monkeypatch.setattr(reference, "FORMATS", frozenset(("exact", "int8")))
    options = ("--density", "0.4", "--pairs", "1", "--backend", "reference", "--output-dir", tmp_path, *SMALL)
    result = run("ablate", "--method", "paper", "--frames", "1", *options)
    assert result.exit_code == 0, result.output
    assert "left out: int4 at density 0.5, which backend 'reference' lacks" in result.stderr
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert {record["precision"] for record in records} == {"exact", "int8", "int8/exact"}
    nothing = run("ablate", "--method", "ours, INT4 in all heads", *options[:-1], "cpu", "--output-dir", tmp_path / "2")
    assert nothing.exit_code == 2
    assert "nothing to compare: backend 'reference' lacks the precisions of ours, INT4 in all heads" in nothing.stderr


def test_precisions_of_backends():
    assert {precision for _, precision in precisions_of("triton")} == {"int8", "int8/exact"}
    assert precisions_of("auto") == precisions_of("cpu") == PRECISIONS


@pytest.mark.parametrize("command", ["demo", "calibrate", "generate", "inspect", "evaluate", "ablate"])
def test_every_command_shows_examples(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"paroattn {command}" in result.output.split("Examples:")[1]
