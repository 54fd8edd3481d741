"""The lab's commands, on the bundled model at a small size."""

import importlib.util
import json

import pytest
import tiny
from click.testing import CliRunner
from paroattn_lab.quality.ablation import PRECISIONS, precisions_of

from paroattn.cli.group import command_line
from paroattn.errors import InputError
from paroattn.plan import Plan

pytestmark = pytest.mark.models
SMALL = ["--frames", "2", "--steps", "2", "--device", "cpu"]
PROMPT = "a slow red two over the cat"


def run(*arguments):
    return CliRunner().invoke(command_line, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def plan_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("plans") / "small.safetensors"
    choice = ("--calibration-prompt", PROMPT, "--density", "0.5", "--order", "FHW")
    result = run("calibrate", *choice, "--output", path, *SMALL)
    assert result.exit_code == 0, result.output
    assert "density 0.500" in result.output
    return path


def test_evaluate_compares_given_plans(plan_path, tmp_path):
    report = tmp_path / "pages" / "mine.html"
    options = ("--output-dir", tmp_path / "out", "--report", report, "--json", *SMALL)
    result = run("evaluate", "--plan", plan_path, "--pairs", "1", *options)
    assert result.exit_code == 0, result.output
    (record,) = json.loads(result.stdout)
    assert [record[name] for name in ("variant", "method", "asked_density", "precision")] == [
        "small",
        "paroattn",
        0.5,
        "exact",
    ]
    assert 5 < record["psnr"] < 100
    assert record["attention"]["full_seconds"] > 0
    assert len(record["heads"]["errors"][0]) == Plan.load(plan_path).model.layers
    assert 'id="head-browser"' in report.read_text()
    assert not (tmp_path / "out" / "report.html").exists()


def test_demo_prints_the_table_and_writes_the_report(tmp_path):
    result = run("demo", "--output-dir", tmp_path / "demo", *SMALL)
    assert result.exit_code == 0, result.output
    for variant in ("paroattn 0.5", "paroattn 0.3", "paroattn 0.2", "paper 0.3", "int8"):
        assert variant in result.output
    written = sorted(path.name for path in (tmp_path / "demo").iterdir())
    assert written == ["plans", "records.jsonl", "report.html"]
    html = (tmp_path / "demo" / "report.html").read_text()
    assert "data:video/mp4" in html
    assert "paroattn 0.3 over paper 0.3: +" in result.output
    assert "paroattn 0.3 + int8 computed 30.0% of the attention blocks" in html
    assert len(list((tmp_path / "demo" / "plans").iterdir())) == 5


def test_ablate_compares_methods_and_writes_a_record_each(tmp_path):
    chosen = ("paper", "paroattn", "sliding window", "vertical-slash", "compensation everywhere")
    options = [word for name in chosen for word in ("--method", name)]
    result = run("ablate", "--density", "0.4", "--pairs", "2", "--output-dir", tmp_path, *options, *SMALL)
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert {record["method"] for record in records} == set(chosen)
    by_place = {(record["method"], record["asked_density"], record["precision"]): record for record in records}
    own, paper = by_place["paroattn", 0.4, "exact"], by_place["paper", 0.4, "exact"]
    assert own["density"] == pytest.approx(0.4, abs=0.01)
    gains = [a - b for a, b in zip(own["psnr_pairs"], paper["psnr_pairs"], strict=True)]
    assert own["over_paper"] == pytest.approx(sum(gains) / 2)
    assert own["over_paper_error"] == pytest.approx(abs(gains[0] - gains[1]) / 2)
    assert paper["over_paper"] == 0
    assert by_place["paroattn", 0.5, "int4"]["psnr"] < by_place["paroattn", 1.0, "int8"]["psnr"]
    assert "over the paper" in result.output
    page = (tmp_path / "report.html").read_text()
    assert all(name in page for name in chosen)
    assert "Heads of paroattn 0.3 + int8" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ablate", "--density", "0"], "density is 0"),
        (["ablate", "--density", "0.4", "--method", "bogus", *SMALL], "method 'bogus' is unknown"),
        (["calibrate", "--calibration-prompt", "a purple zebra", *SMALL], "unknown words: purple, zebra"),
        (["evaluate", "--density", "0", *SMALL], "density is 0"),
        (["evaluate", "--prompt", "a purple zebra", *SMALL], "unknown words"),
        (["page", "missing.safetensors"], "does not exist"),
        (["demo", "--report", __file__ + "/page.html"], "test_lab_cli.py' is no directory"),
        (["evaluate", "--prompt-file", "p.txt", "--report", "p.txt"], "output 'p.txt' is also an input"),
        (["ablate", "--output-dir", __file__ + "/runs"], "records.jsonl' cannot be written"),
        (["bench", "attention", "--output", __file__ + "/a.jsonl"], "test_lab_cli.py' is no directory"),
        (["bench", "model", "--plan", "p", "--output", "p"], "output 'p' is also an input"),
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


@pytest.mark.parametrize("command", ["demo", "evaluate", "ablate"])
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
    result = run(command, "--device", device)
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
        raise InputError(f"asked for {source}")

    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("paroattn.cli.options.load_model", load_model)
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
    nothing = run(
        "ablate", "--method", "paroattn, INT4 in all heads", *options[:-1], "cpu", "--output-dir", tmp_path / "2"
    )
    assert nothing.exit_code == 2
    assert (
        "nothing to compare: backend 'reference' lacks the precisions of paroattn, INT4 in all heads" in nothing.stderr
    )


def test_precisions_of_backends():
    assert {precision for _, precision in precisions_of("triton")} == {"int8", "int8/exact"}
    assert precisions_of("auto") == precisions_of("cpu") == PRECISIONS


@pytest.mark.parametrize("command", ["demo", "evaluate", "ablate", "page"])
def test_every_command_shows_examples(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"paroattn {command}" in result.output.split("Examples:")[1]


@pytest.mark.parametrize(
    ("command", "missing", "package"),
    [
        (command, missing, package)
        for missing, package, commands in (
            ("imageio_ffmpeg", "paroattn[cli]", ("demo", "evaluate", "ablate")),
            ("imageio", "paroattn[cli]", ("demo", "evaluate")),
            ("jinja2", "paroattn-lab", ("demo", "evaluate", "ablate", "page")),
            ("matplotlib", "paroattn-lab", ("demo", "evaluate", "ablate", "page")),
            ("torchmetrics", "paroattn-lab", ("demo", "evaluate", "ablate", "page", "bench attention", "bench model")),
            ("paroattn_models", "paroattn-lab[models]", ("demo", "evaluate", "ablate", "bench model")),
        )
        for command in commands
    ],
)
def test_a_missing_part_is_found_before_work_begins(tmp_path, monkeypatch, command, missing, package):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == missing else find_spec(name, *_))
    monkeypatch.chdir(tmp_path)
    result = run(
        *command.split(),
        *(["plan.safetensors"] if command == "page" else ["--device", "cpu"] * ("attention" not in command)),
    )
    assert result.exit_code == 2, result.output
    assert result.stderr == f"Error: {missing} is not installed; run: pip install '{package}'\n"
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_prompts_has_to_be_given_some(tmp_path):
    tiny.save_whole_wan(tmp_path / "wan")
    result = run("demo", "--model", tmp_path / "wan", "--output-dir", tmp_path / "demo", *SMALL)
    assert result.exit_code == 2
    assert "this model brings no prompts" in result.stderr
    assert not (tmp_path / "demo").exists()


@pytest.fixture
def tiny_plan(tmp_path):
    path = tmp_path / "one [red].safetensors"
    tiny.make_plan(tiny.tiny_wan()).save(path)
    return path


def test_page_shows_a_plan_without_its_model(tiny_plan, tmp_path):
    result = run("page", tiny_plan, "--output", tmp_path / "plan.html")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "plan.html").read_text()
    assert "needs the model" in page  # of errors
    assert 'name="original"' not in page  # of attention maps
    assert run("page", tiny_plan).stdout == f"wrote {tiny_plan.with_suffix('.html')}\n"


def test_a_page_never_takes_the_plans_place(tiny_plan):
    before = tiny_plan.read_bytes()
    result = run("page", tiny_plan, "--output", tiny_plan.parent / "." / tiny_plan.name)
    assert result.exit_code == 2
    assert "is also an input; choose another file name" in result.stderr
    assert tiny_plan.read_bytes() == before


@pytest.mark.parametrize(("output", "message"), [(".", "is a directory"), ("plan.txt/plan.html", "plan.txt")])
def test_a_page_that_cannot_be_written_is_one_line(tiny_plan, tmp_path, monkeypatch, output, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.txt").write_text("not a folder")
    result = run("page", tiny_plan, "--output", output)
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: ")
    assert message in line
