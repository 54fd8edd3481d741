"""Evaluations that are interrupted go on where they were, and their records are the same."""

import json

import pytest
import tiny
import torch
from click.testing import CliRunner
from frames_model import FramesModel
from paroattn_lab.quality.evaluation_records import evaluation_records
from paroattn_lab.quality.pair_store import PairStore
from paroattn_lab.quality.pairs import FULL, Variant, evaluate_pairs, evaluate_variants

from paroattn.cli.group import command_line
from paroattn.cli.models import GenerativeModel

PAIRS = [("first", 1), ("second", 2), ("third", 3)]
SMALL = ("--frames", 4, "--height", 64, "--width", 64, "--steps", 2, "--device", "cpu")
TIMES = ("speed_up", "transformer_seconds", "full_attention_seconds", "launch_share", "full_attention_launch_share")


class Interrupted(FramesModel):
    """Counts generations; the one of number `stop_at` is interrupted."""

    count = 0
    stop_at = None

    def generate(self, prompt, seed):
        self.count += 1
        if self.count == self.stop_at:
            raise KeyboardInterrupt
        return super().generate(prompt, seed)


@pytest.fixture
def model():
    return Interrupted()


@pytest.fixture
def variants(model):
    return [
        Variant("all blocks", plan=tiny.make_plan(model.pipe)),
        Variant("INT4", plan=tiny.make_plan(model.pipe, precision="int4")),
    ]


def records(model, evaluation):
    found = evaluation_records(model, evaluation, {"first": ["color"], "third": ["color", "motion"]})
    return [{key: value for key, value in record.items() if key not in TIMES} for record in found]


@pytest.mark.parametrize("stop_at", range(1, 10))
@pytest.mark.parametrize("keep_videos", [0, 2])
def test_an_interrupted_evaluation_goes_on_where_it_was(model, variants, tmp_path, stop_at, keep_videos):
    how = {"keep_videos": keep_videos, "progress": False}
    expected = evaluate_variants(model, variants, PAIRS, **how)
    model.count, model.stop_at = 0, stop_at
    with pytest.raises(KeyboardInterrupt):
        evaluate_variants(model, variants, PAIRS, store=PairStore(tmp_path), **how)
    assert not list(tmp_path.rglob(".*"))
    model.count, model.stop_at = 0, None
    found = evaluate_variants(model, variants, PAIRS, store=PairStore(tmp_path), **how)
    assert model.count == 9 - (stop_at - 1)
    assert records(model, found) == records(model, expected)
    for name in (FULL, "all blocks", "INT4"):
        assert len(found.videos[name]) == keep_videos
        for own, other in zip(found.videos[name], expected.videos[name], strict=True):
            assert torch.allclose(own, other, atol=0.5 / 255 + 1e-6)
    model.count = 0
    evaluate_variants(model, variants, PAIRS, store=PairStore(tmp_path), **how)
    assert model.count == 0
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3 * keep_videos


def test_results_so_far_come_after_each_pair(model, variants):
    found = [len(item.pairs) for item in evaluate_pairs(model, variants, PAIRS, progress=False)]
    assert found == [1, 2, 3]


def test_records_have_the_worst_case_latents_and_dimensions(model, variants):
    evaluation = evaluate_variants(model, variants, PAIRS, progress=False)
    record = evaluation_records(model, evaluation, {"first": ["color"], "third": ["color", "motion"]})[1]
    psnr = [pair["psnr"] for pair in record["pairs"]]
    assert record["psnr_worst"] == min(psnr)
    assert record["relative_l2_worst"] == max(pair["relative_l2"] for pair in record["pairs"])
    assert record["latent_relative_l2"] > 0
    assert record["ms_ssim"] is None
    assert record["by_dimension"]["color"]["pairs"] == 2
    assert record["by_dimension"]["color"]["psnr"] == pytest.approx((psnr[0] + psnr[2]) / 2)
    assert record["by_dimension"]["motion"]["psnr"] == psnr[2]
    assert "step" not in vars(model.pipe.scheduler)  # nothing watches it any more


def test_a_folder_of_another_evaluation_is_refused(tmp_path):
    PairStore(tmp_path).configure({"densities": (0.5, 0.3), "model": "a"})
    PairStore(tmp_path).configure({"densities": [0.5, 0.3], "model": "a"})
    with pytest.raises(ValueError, match=r"densities was \[0.5, 0.3\], now \[0.5\]; give another folder"):
        PairStore(tmp_path).configure({"densities": [0.5], "model": "a"})


def test_a_broken_result_is_named(model, variants, tmp_path):
    evaluate_variants(model, variants, PAIRS[:1], store=PairStore(tmp_path), progress=False)
    (tmp_path / "pairs" / "0001-01.json").write_text('{"seconds')
    with pytest.raises(ValueError, match=r"0001-01.json' cannot be read .*; delete it"):
        evaluate_variants(model, variants, PAIRS[:1], store=PairStore(tmp_path), progress=False)


def run(*arguments):
    return CliRunner().invoke(command_line, [str(argument) for argument in arguments])


@pytest.fixture
def bundled(monkeypatch):
    """Interrupts the bundled model's generation of some number."""

    class Generations:
        count = 0
        stop_at = None

    original = GenerativeModel.generate

    def generate(model, prompt, seed):
        Generations.count += 1
        if Generations.count == Generations.stop_at:
            raise KeyboardInterrupt
        return original(model, prompt, seed)

    monkeypatch.setattr(GenerativeModel, "generate", generate)
    return Generations


@pytest.mark.models
def test_methods_and_densities_on_a_file_of_prompts_can_be_interrupted(tmp_path, bundled):
    prompts, output = tmp_path / "prompts.json", tmp_path / "out"
    texts = ["a slow red two over the cat", "a fast white six over the flower"]
    prompts.write_text(json.dumps([{"prompt_en": text, "dimension": ["color"]} for text in texts]))
    command = [
        "evaluate",
        "--prompt-file",
        prompts,
        "--method",
        "paper",
        "--method",
        "sliding window",
        "--density",
        "0.5",
    ]
    command += ["--precision", "int8", *SMALL, "--output-dir", output]
    bundled.stop_at = 6
    result = run(*command)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "Interrupted."
    bundled.count, bundled.stop_at = 0, None
    result = run(*command, "--json")
    assert result.exit_code == 0, result.output
    assert bundled.count == 2 * 4 - 5 + 1  # one more for the report's study of heads
    found = json.loads(result.stdout)
    assert [record["variant"] for record in found] == ["paper 0.5", "paper 0.5 + int8", "sliding window 0.5"]
    assert all(record["by_dimension"]["color"]["pairs"] == 2 for record in found)
    videos = sorted(path.name for path in (output / "videos").iterdir())
    assert videos[:2] == ["0001-full-attention.mp4", "0001-paper-0.5-+-int8.mp4"]
    assert len(videos) == 8
    changed = run(*command, "--density", "0.3")
    assert changed.exit_code == 2
    assert changed.stderr.splitlines() == [
        f"Error: folder '{output}' holds results of another evaluation: densities was [0.5], now [0.5, 0.3]; give "
        "another folder or delete this one"
    ]
    bundled.count = 0
    shown = run(*command)
    assert bundled.count == 1  # the study of heads alone
    assert "clip_score is missing: it needs" in " ".join(shown.stdout.split())
    assert "ms_ssim is not defined for frames with a side below 176 pixels" in shown.stdout


@pytest.mark.models
def test_ablations_can_be_interrupted(tmp_path, bundled):
    command = ["ablate", "--method", "sliding window", "--density", "0.5", "--pairs", 2, *SMALL]
    command += ["--output-dir", tmp_path]
    bundled.stop_at = 4
    assert run(*command).exit_code == 130
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["pairs"]) for line in lines] == [1]
    bundled.count, bundled.stop_at = 0, None
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert bundled.count == 1
    (record,) = map(json.loads, (tmp_path / "records.jsonl").read_text().splitlines())
    assert len(record["psnr_pairs"]) == 2
    assert record["psnr_worst"] == min(record["psnr_pairs"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-file", "none.txt"], "prompts 'none.txt' is no file"),
        (["--prompt-file", "none.txt", "--prompt", "x"], "both --prompt and --prompt-file"),
        (["--method", "bogus"], "method 'bogus' is unknown"),
        (["--method", "paper", "--precision", "int3"], "int3"),
        (["--precision", "int8"], "--precision is int8, which needs --method"),
        (["--clip-model", "none"], "clip-model 'none' holds no CLIP model"),
        (["--fvd-model", "none"], "fvd-model 'none' is no TorchScript file"),
    ],
)
def test_bad_arguments_end_with_one_line_and_leave_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run("evaluate", *arguments, "--frames", 2, "--steps", 2, "--device", "cpu")
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
