"""The bundled models: loading them and generating from them."""

from dataclasses import replace

import pytest
import torch
from paroattn_lab.models import folder_of
from paroattn_lab.quality.metrics import compare

import paroattn
from paroattn import TokenGrid
from paroattn.block_mask import unpack_bits
from paroattn.cli.models import load_model
from paroattn.integrations.pipeline import Pipeline

pytestmark = pytest.mark.models


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


@pytest.mark.parametrize(
    ("name", "pipeline", "tokens", "layers", "heads"),
    [
        ("moving-digits", "WanPipeline", 4096, 4, 4),
        ("moving-digits-large", "WanPipeline", 16_384, 6, 6),
        ("painted-digits", "FluxPipeline", 4096, 6, 4),
        ("painted-digits-large", "FluxPipeline", 4096, 6, 6),
    ],
)
def test_bundled_models_are_what_they_are_said_to_be(name, pipeline, tokens, layers, heads):
    model = load_model(name, device="cpu")
    identity, settings = Pipeline(model.pipe).identity, model.settings
    assert type(model.pipe).__name__ == pipeline
    assert (identity.layers, identity.heads, identity.head_dim) == (layers, heads, 64)
    side = 4 if model.makes_images else 8
    assert (settings.num_frames or 1) * (settings.height // side) * (settings.width // side) == tokens
    calibrated = set(model.calibration_prompts)
    assert len(model.evaluation_pairs) >= 8
    assert not calibrated & {prompt for prompt, _ in model.evaluation_pairs}
    weights = folder_of(name) / "transformer" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size < 60e6
    card = (folder_of(name) / "README.md").read_text()
    assert f"{tokens:,} visual tokens" in " ".join(card.split())
    for picture in ("samples.jpg", "loss.png"):
        assert picture in card
        assert (folder_of(name) / picture).is_file()


@pytest.mark.parametrize("name", ["moving-digits-large", "painted-digits-large"])
def test_the_larger_models_generate_what_they_are_asked_for(name):
    """One picture or one frame: with more red, and less green, where a red digit is asked for."""
    size = {} if "painted" in name else {"num_frames": 1}
    model = load_model(name, device="cpu", height=128, width=128, num_inference_steps=4, **size)
    prompt = "a big {} eight over the rocket middle" if model.makes_images else "a slow {} eight over the rocket"
    red, green = (model.generate(prompt.format(colour), seed=3)[0].mean((1, 2)) for colour in ("red", "green"))
    assert red[0] - red[1] > green[0] - green[1] + 0.02


def test_prompts_are_encoded_where_the_transformer_runs(image_model, monkeypatch):
    """With offloading that is not where its weights lie between calls."""
    monkeypatch.setattr(type(image_model.pipe), "_execution_device", torch.device("meta"))
    arguments = image_model.call_arguments("a big red two")
    assert arguments["prompt_embeds"].device.type == arguments["pooled_prompt_embeds"].device.type == "meta"
    assert image_model.pipe.device.type == "cpu"


@pytest.mark.parametrize("name", ["moving-digits", "painted-digits"])
def test_bundled_models_run_in_bfloat16(name):
    """As they do on GPUs. FluxPipeline takes the latents' dtype from the prompt's vectors."""
    size = {} if "painted" in name else {"num_frames": 2}
    model = load_model(name, device="cpu", height=64, width=64, num_inference_steps=2, **size)
    model.pipe.to(torch.bfloat16)
    assert model.call_arguments("a red two")["prompt_embeds"].dtype == torch.bfloat16
    assert 0 < model.generate("a red two", seed=1).std() < 1


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


def test_a_plan_of_the_image_model_keeps_text_dense_and_stays_close(image_model):
    """16 x 24 visual tokens and 16 of text: 7 blocks, of which the last holds text."""
    prompts = image_model.calibration_prompts[:1]
    plan = paroattn.calibrate(
        image_model.pipe, [image_model.call_arguments(prompt) for prompt in prompts], density=0.6, progress=False
    )
    assert plan.grid == TokenGrid(1, 16, 24, 16, "prefix")
    masks = unpack_bits(plan.mask_table, 7)
    assert masks[:, 6].all()
    assert masks[:, :, 6].all()
    prompt, seed = image_model.evaluation_pairs[0]
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


def test_the_bundled_models_are_named_where_none_is_found():
    with pytest.raises(
        ValueError, match="expected moving-digits, painted-digits, moving-digits-large, painted-digits-large, "
    ):
        load_model("no-such-model")
