"""Pixels become latents of the bundled models and come back as they were."""

import pytest
import torch
from paroattn_lab.models.pixels import fold_pixels, frames_to_latents, latents_to_frames, unfold_pixels


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (3, 3, 8, 12), (5, 3, 20, 4)])
def test_latents_turn_back_into_the_same_frames(shape):
    frames = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    latents = frames_to_latents(frames)
    assert latents.shape == (1, 48, shape[0], shape[2] // 4, shape[3] // 4)
    assert latents.min() >= -1
    assert latents.max() <= 1
    torch.testing.assert_close(latents_to_frames(latents), frames, rtol=0, atol=1e-6)


def test_each_latent_square_holds_its_own_four_by_four_pixels():
    frames = torch.full((2, 3, 8, 8), 0.5)
    frames[1, 2, 4:, :4] = 1.0
    latents = frames_to_latents(frames)
    assert latents[0, 32:, 1, 1, 0].tolist() == [1.0] * 16
    assert latents.count_nonzero() == 16


def test_frames_are_clamped():
    frames = latents_to_frames(torch.full((1, 48, 1, 1, 1), 3.0))
    assert torch.equal(frames, torch.ones(1, 3, 4, 4))


def test_pixels_of_pictures_fold_and_unfold():
    pictures = torch.rand(2, 3, 8, 12)
    tokens = fold_pixels(pictures)
    assert tokens.shape == (2, 6, 48)
    torch.testing.assert_close(unfold_pixels(tokens, 8), pictures, rtol=0, atol=1e-6)
