"""Loading models and generating from them."""

import pytest
import tiny
import torch
from click.testing import CliRunner

from paroattn.cli import main
from paroattn.integrations.video_model import GenerationSettings, load_video_model
from paroattn.plan import Plan


@pytest.fixture(scope="module")
def bundled():
    return load_video_model("moving-digits", device="cpu", num_frames=2, num_inference_steps=2)


def test_the_bundled_model_generates_from_prompt_and_seed(bundled):
    frames = bundled.generate("a slow red two over the flower", seed=1)
    assert frames.shape == (2, 3, 128, 128)
    assert 0 <= frames.min() < frames.max() <= 1
    assert torch.equal(frames, bundled.generate("a slow red two over the flower", seed=1))
    assert not torch.equal(frames, bundled.generate("a slow red two over the flower", seed=2))
    assert not torch.equal(frames, bundled.generate("a slow green two over the cat", seed=1))


def test_the_bundled_model_is_what_it_is_said_to_be():
    model = load_video_model("moving-digits", device="cpu")
    config = model.pipe.transformer.config
    assert type(model.pipe).__name__ == "WanPipeline"
    assert config.attention_head_dim == 64
    assert config.num_layers >= 4
    assert config.num_attention_heads >= 4
    tokens = model.settings.num_frames * (model.settings.height // 8) * (model.settings.width // 8)
    assert tokens >= 4096
    calibrated = set(model.examples["calibration_prompts"])
    assert len(model.examples["evaluation_pairs"]) >= 8
    assert not calibrated & {prompt for prompt, _ in model.examples["evaluation_pairs"]}


def test_guidance_uses_the_empty_prompt(bundled):
    bundled.settings = bundled.settings.changed({"guidance_scale": 2.0})
    assert "negative_prompt_embeds" in bundled.call_arguments("a red two")
    assert bundled.generate("a red two", seed=1).isfinite().all()
    bundled.settings = bundled.settings.changed({"guidance_scale": 1.0})


def test_unknown_words_are_named_with_those_that_are_known(bundled):
    with pytest.raises(ValueError, match=r"unknown words: purple, zebra. This model knows: a, slow"):
        bundled.generate("a purple zebra", seed=0)


@pytest.fixture(scope="module")
def whole_wan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "wan"
    tiny.save_whole_wan(folder)
    return folder


def test_a_wan_folder_with_text_encoder_and_vae_generates_calibrates_and_applies(whole_wan, tmp_path):
    size = [
        "--height",
        "64",
        "--width",
        "80",
        "--frames",
        "9",
        "--steps",
        "2",
        "--model",
        str(whole_wan),
        "--device",
        "cpu",
    ]
    model = load_video_model(str(whole_wan), device="cpu", height=64, width=80, num_frames=9, num_inference_steps=2)
    frames = model.generate("a cat", seed=1)
    assert frames.shape == (9, 3, 64, 80)
    assert not torch.equal(frames, model.generate("a dog", seed=1))
    plan, video = str(tmp_path / "plan"), str(tmp_path / "video.webp")
    for arguments in (
        ["calibrate", "--prompt", "a cat", "--density", "0.9", "--output", plan, *size],
        ["generate", "--prompt", "a dog", "--plan", plan, "--output", video, *size],
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
    assert Plan.load(plan).provenance["prompts"] == ["a cat"]
    demo = CliRunner().invoke(main, ["demo", "--output-dir", str(tmp_path / "demo"), *size])
    assert demo.exit_code == 2
    assert "this model brings no prompts" in demo.stderr


def test_a_folder_of_an_incomplete_pipeline_is_refused(tmp_path):
    tiny.tiny_wan().save_pretrained(tmp_path / "without-vae")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_video_model(str(tmp_path / "without-vae"), device="cpu")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no-such-model", "does not exist; expected moving-digits, a diffusers pipeline folder, or a Hub name"),
        ("./missing/folder", "does not exist"),
        ("{tmp}", "is a folder without model_index.json"),
        ("{tmp}/file", "does not exist"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path, source, message):
    with pytest.raises(ValueError, match=message):
        load_video_model(source.format(tmp=tmp_path))


@pytest.mark.parametrize("changes", [{"height": 0}, {"num_inference_steps": -1}, {"guidance_scale": True}])
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        GenerationSettings(**changes)
