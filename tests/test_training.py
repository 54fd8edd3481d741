"""The training script of the bundled model: its data and its resuming."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))
import train_moving_digits as training
from moving_digits import PAN_SPEED, SIZE, WORDS, MovingDigits


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
