"""Loading models and generating from them."""

from dataclasses import replace

import pytest
import tiny
import torch
from click.testing import CliRunner

import paroattn
from paroattn import TokenGrid
from paroattn.block_mask import unpack_bits
from paroattn.cli import main
from paroattn.evaluation.metrics import compare
from paroattn.integrations.generation import GenerationSettings, load_model
from paroattn.plan import Plan


@pytest.fixture(scope="module")
def bundled():
    return load_model("moving-digits", device="cpu", num_frames=2, num_inference_steps=2)


def test_the_bundled_model_generates_from_prompt_and_seed(bundled):
    frames = bundled.generate("a slow red two over the flower", seed=1)
    assert frames.shape == (2, 3, 128, 128)
    assert 0 <= frames.min() < frames.max() <= 1
    assert torch.equal(frames, bundled.generate("a slow red two over the flower", seed=1))
    assert not torch.equal(frames, bundled.generate("a slow red two over the flower", seed=2))
    assert not torch.equal(frames, bundled.generate("a slow green two over the cat", seed=1))


def test_the_bundled_model_is_what_it_is_said_to_be():
    model = load_model("moving-digits", device="cpu")
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


@pytest.fixture(scope="module")
def image_model():
    return load_model("painted-digits", device="cpu", height=64, width=96, num_inference_steps=2)


def test_the_bundled_image_model_generates_from_prompt_and_seed(image_model):
    assert image_model.makes_images
    picture = image_model.generate("a big red two over the flower left", seed=1)
    assert picture.shape == (1, 3, 64, 96)
    assert 0 <= picture.min() < picture.max() <= 1
    assert torch.equal(picture, image_model.generate("a big red two over the flower left", seed=1))
    assert not torch.equal(picture, image_model.generate("a big green two over the cat left", seed=1))


def test_the_bundled_image_model_is_what_it_is_said_to_be():
    model = load_model("painted-digits", device="cpu")
    assert type(model.pipe).__name__ == "FluxPipeline"
    assert (model.settings.height // 4) * (model.settings.width // 4) == 4096
    calibrated = set(model.examples["calibration_prompts"])
    assert len(model.examples["evaluation_pairs"]) >= 8
    assert not calibrated & {prompt for prompt, _ in model.examples["evaluation_pairs"]}


def test_a_plan_of_the_image_model_keeps_text_dense_and_stays_close(image_model):
    """16 x 24 visual tokens and 16 of text: 7 blocks, of which the last holds text."""
    prompts = image_model.examples["calibration_prompts"]
    plan = paroattn.calibrate(
        image_model.pipe, [image_model.call_arguments(prompt) for prompt in prompts], density=0.6, progress=False
    )
    assert plan.grid == TokenGrid(1, 16, 24, 16, "prefix")
    masks = unpack_bits(plan.mask_table, 7)
    assert masks[:, 6].all()
    assert masks[:, :, 6].all()
    prompt, seed = image_model.examples["evaluation_pairs"][0]
    full = image_model.generate(prompt, seed)
    with paroattn.apply(image_model.pipe, plan, strict=True):
        applied = image_model.generate(prompt, seed)
    assert 25 < compare(applied, full).psnr < 100


def test_image_guidance_uses_the_empty_prompt(image_model):
    guided = replace(image_model, settings=image_model.settings.changed({"guidance_scale": 2.0}))
    assert guided.call_arguments("a red two")["true_cfg_scale"] == 2.0
    assert not torch.equal(guided.generate("a red two", 1), image_model.generate("a red two", 1))


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
    model = load_model(str(whole_wan), device="cpu", height=64, width=80, num_frames=9, num_inference_steps=2)
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
        load_model(str(tmp_path / "without-vae"), device="cpu")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no-such-model", "does not exist; expected moving-digits, painted-digits, a diffusers pipeline folder"),
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
