"""The training script of the bundled model: its data and its resuming."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))
import painted_digits
import train_moving_digits as training
import train_painted_digits as image_training
from moving_digits import PAN_SPEED, SIZE, WORDS, MovingDigits
from painted_digits import PaintedDigits


@pytest.fixture(scope="module")
def data():
    return MovingDigits(blur=3.0)


def test_clips_are_drawn_from_the_generator_alone_and_prompts_use_known_words(data):
    def draw(seed):
        return data.sample(4, torch.Generator().manual_seed(seed))

    (clip, prompt), (again, _), (other, _) = draw(1), draw(1), draw(2)
    assert clip.shape == (4, 3, SIZE, SIZE)
    assert torch.equal(clip, again)
    assert not torch.equal(clip, other)
    assert 0 <= clip.min() < clip.max() <= 1
    assert set(prompt.split()) <= set(WORDS)


def test_the_camera_pans_where_the_prompt_says(data):
    photograph = data.photographs["cat"]
    left = data._pan(photograph, (0, -1), 4, torch.Generator().manual_seed(0))
    shift = round(PAN_SPEED)
    assert torch.allclose(left[1:, :, :, shift:], left[:-1, :, :, :-shift], atol=1e-4)


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(data, tmp_path, monkeypatch):
    class SmallData:
        def __init__(self, blur):
            pass

        def sample(self, frames, generator):
            clip, prompt = data.sample(frames, generator)
            return clip[:, :, :32, :32], prompt

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


def test_image_training_runs_and_writes_what_the_export_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(image_training, "STAGES", (image_training.Stage(32, 1, 1.0),))
    image_training.train(tmp_path, 2.0, torch.device("cpu"))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    model = image_training.PromptedTransformer()
    model.load_state_dict(state["averaged"])
    assert state["step"] >= 1
    assert (tmp_path / "loss.csv").read_text().startswith("step,size,loss,gradient_norm,seconds\n0,32,")


def test_position_ids_are_those_of_the_pipeline():
    from diffusers import FluxPipeline

    expected = FluxPipeline._prepare_latent_image_ids(1, 3, 5, torch.device("cpu"), torch.float32)
    assert torch.equal(image_training.position_ids(3, 5), expected)
