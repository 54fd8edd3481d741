"""The training scripts of the bundled models: their data, resuming, and what the exports read."""

import export_moving_digits
import painted_digits
import pytest
import torch
import train_moving_digits as training
import train_moving_digits_large as large_training
import train_painted_digits as image_training
from moving_digits import COLOURS, PAN_SPEED, PLACES, WORDS, MovingDigits
from painted_digits import PaintedDigits
from rectified_flow import some_without_prompt
from timed_training import Stage, train


@pytest.fixture(scope="module")
def data():
    return MovingDigits(blur=3.0)


def test_clips_are_drawn_from_the_generator_alone_and_prompts_use_known_words(data):
    def draw(seed):
        return data.batch(3, 4, torch.Generator().manual_seed(seed))

    (clips, prompts), (again, _), (other, _) = draw(1), draw(1), draw(2)
    assert clips.shape == (3, 4, 3, 128, 128)
    assert torch.equal(clips, again)
    assert not torch.equal(clips, other)
    assert 0 <= clips.min() < clips.max() <= 1
    assert set(" ".join(prompts).split()) <= set(WORDS)


def test_clips_show_what_their_prompts_say():
    """Green ink where it is asked for, and nowhere else."""
    clips, prompts = MovingDigits(blur=3.0).batch(16, 2, torch.Generator().manual_seed(0))
    green = torch.tensor(COLOURS["green"]).view(1, 3, 1, 1)
    for clip, prompt in zip(clips, prompts, strict=True):
        ink = ((clip - green).abs().amax(1) < 0.02).sum()
        assert (ink > 100) == ("green" in prompt), prompt


@pytest.mark.parametrize("size", [128, 256])
def test_the_camera_pans_where_the_prompt_says(size):
    larger = MovingDigits(size, blur=3.0)
    place = PLACES.index("cat")
    left, still = larger._pan([place, place], [(0, -1), (0, 0)], 4, torch.Generator().manual_seed(0))
    shift = round(PAN_SPEED * size / 128)
    assert torch.allclose(left[1:, :, :, shift:], left[:-1, :, :, :-shift], atol=1e-4)
    assert torch.equal(still[1:], still[:-1])


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(data, tmp_path, monkeypatch):
    class SmallData:
        def __init__(self, blur):
            pass

        def batch(self, count, frames, generator):
            clips, prompts = data.batch(count, frames, generator)
            return clips[..., :32, :32], prompts

    monkeypatch.setattr(training, "MovingDigits", SmallData)

    def run(folder, steps):
        folder.mkdir(exist_ok=True)
        monkeypatch.setattr(training, "STAGES", (training.Stage(2, 1, steps),))
        monkeypatch.setattr(training, "learning_rate", lambda step: 1e-3)
        training.train(folder)
        return torch.load(folder / "checkpoint.pt", weights_only=True)

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "resumed", 2)
    resumed = run(tmp_path / "resumed", 4)
    assert resumed["step"] == 4
    assert all(torch.equal(resumed["averaged"][name], value) for name, value in whole["averaged"].items())
    rows = (tmp_path / "resumed" / "loss.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "0", "1", "2", "3"]
    model, steps = export_moving_digits.load_checkpoint("moving-digits", tmp_path / "resumed" / "checkpoint.pt")
    assert steps == 4
    weight = resumed["averaged"]["module.words.weight"]
    assert torch.equal(model.words.weight, weight)


def test_pictures_are_drawn_from_the_generator_alone_as_their_prompts_say():
    painted = PaintedDigits(torch.device("cpu"))
    pictures, prompts = painted.batch(12, 256, torch.Generator().manual_seed(0))
    again, _ = painted.batch(12, 256, torch.Generator().manual_seed(0))
    small, _ = painted.batch(12, 64, torch.Generator().manual_seed(0))
    assert torch.equal(pictures, again)
    assert pictures.shape == (12, 3, 256, 256)
    assert 0 <= pictures.min() < pictures.max() <= 1
    torch.testing.assert_close(small, torch.nn.functional.avg_pool2d(pictures, 4))
    assert painted.indices(prompts).shape == (12, painted_digits.PROMPT_LENGTH)
    green = torch.tensor(painted_digits.COLOURS["green"]).view(3, 1, 1)
    for picture, prompt in zip(pictures, prompts, strict=True):
        ink = ((picture - green).abs().amax(0) < 0.02).nonzero().float()
        assert (len(ink) > 300) == ("green" in prompt)
        if "green" in prompt and ("left" in prompt or "right" in prompt):
            assert (ink[:, 1].mean() < 128) == ("left" in prompt)


def test_some_prompts_are_left_out_for_guidance():
    prompts = some_without_prompt(["a cat"] * 1000, torch.Generator().manual_seed(0))
    assert 60 < prompts.count("") < 140
    assert prompts.count("a cat") == 1000 - prompts.count("")


@pytest.mark.parametrize("kind", ["video", "image"])
def test_timed_training_runs_and_writes_what_the_export_reads(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.nn.Module.compile", lambda self, **_: None)  # minutes, for two steps
    if kind == "video":
        model = training.PromptedTransformer(1, 1)
        drawn, stages = (large_training.loss_of, MovingDigits(32)), (Stage(32, 1, 2, 0.5), Stage(32, 2, 1, 1.0))
    else:
        monkeypatch.setitem(image_training.SHAPES, "small", {"num_layers": 1, "num_attention_heads": 1})
        monkeypatch.setitem(image_training.SHAPES["small"], "num_single_layers", 1)
        model = image_training.PromptedTransformer("small")
        drawn, stages = (image_training.loss_of, PaintedDigits(torch.device("cpu"))), (Stage(32, 1, 2, 1.0),)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss_of, data = drawn
    given = {"folder": tmp_path, "seconds": 2.0, "rate": 1e-3, "seed": 0}
    train(model, lambda stage, generator: loss_of(model, data, stage, generator), stages, **given)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] >= 1
    assert state["averaged"].keys() == before.keys()
    assert any(not torch.equal(state["averaged"][name].float(), value.half().float()) for name, value in before.items())
    rows = (tmp_path / "loss.csv").read_text().splitlines()
    assert rows[0] == "step,size,frames,loss,gradient_norm,seconds"
    assert rows[1].startswith("0,32,1,")


def test_position_ids_are_those_of_the_pipeline():
    from diffusers import FluxPipeline

    expected = FluxPipeline._prepare_latent_image_ids(1, 3, 5, torch.device("cpu"), torch.float32)
    assert torch.equal(image_training.position_ids(3, 5), expected)
