"""Closeness of videos: figures that can be worked out by hand."""

import math

import pytest
import torch
from paroattn_lab.quality.metrics import Closeness, compare, summary


def video(seed=0, frames=3, size=24):
    return torch.rand(frames, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_equal_videos_are_as_close_as_can_be():
    closeness = compare(video(), video())
    assert closeness.psnr == math.inf
    assert closeness.ssim == pytest.approx(1)
    assert closeness.cosine == pytest.approx(1)


def test_psnr_is_taken_over_the_whole_video():
    reference, frames = torch.full((4, 3, 16, 16), 0.5), torch.full((4, 3, 16, 16), 0.5)
    frames[0] = 0.7  # mean squared error 0.04 / 4 = 0.01; the mean of per-frame figures would be infinite
    assert compare(frames, reference).psnr == pytest.approx(20, abs=1e-3)


def test_cosine_is_that_of_all_pixels_as_one_vector():
    frames, reference = video(0), video(1)
    a, b = frames.flatten().double(), reference.flatten().double()
    assert compare(frames, reference).cosine == pytest.approx(float(a @ b / (a.norm() * b.norm())))


def test_more_noise_is_less_close():
    reference, noise = video(0) * 0.5 + 0.25, video(1) - 0.5
    little, much = compare(reference + 0.05 * noise, reference), compare(reference + 0.4 * noise, reference)
    assert little.psnr > much.psnr
    assert 1 > little.ssim > much.ssim
    assert 1 > little.cosine > much.cosine


def test_ssim_is_averaged_over_frames():
    frames, reference = video(0), video(0)
    frames[0] = video(5)[0]
    alone = compare(frames[:1], reference[:1]).ssim
    assert compare(frames, reference).ssim == pytest.approx((alone + 2) / 3, abs=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 24, 24), (3, 3, 24, 25)])
def test_different_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected equal \[F, 3, H, W\]"):
        compare(torch.zeros(shape), video())


def test_a_single_image_is_refused():
    with pytest.raises(ValueError, match="expected equal"):
        compare(video()[0], video()[0])


def test_ms_ssim_is_not_defined_for_small_frames():
    assert compare(video(size=175), video(size=175)).ms_ssim is None
    large, noise = video(size=176), video(1, size=176)
    assert compare(large, large).ms_ssim == pytest.approx(1)
    assert compare((large + 0.3 * noise).clamp(max=1), large).ms_ssim < 0.99


def test_relative_l2_is_the_difference_over_the_reference():
    found = compare(torch.full((2, 3, 16, 16), 0.6), torch.full((2, 3, 16, 16), 0.5))
    assert found.relative_l2 == pytest.approx(0.2)
    assert found.latent_relative_l2 is None


def test_latents_are_compared_where_there_are_any():
    reference = torch.tensor([[3.0, 4.0]])
    found = compare(video(), video(), torch.tensor([[3.0, 0.0]]), reference)
    assert found.latent_relative_l2 == pytest.approx(0.8)
    assert found.latent_cosine == pytest.approx(0.6)
    assert compare(video(), video(), None, reference).latent_cosine is None


def test_summaries_have_mean_standard_error_and_the_worst_case():
    assert summary("psnr", [20.0, 22.0, 27.0]) == {
        "psnr": 23.0,
        "psnr_error": pytest.approx(math.sqrt(13 / 3)),
        "psnr_spread": pytest.approx(math.sqrt(13)),
        "psnr_worst": 20.0,
    }
    assert summary("relative_l2", [0.1, 0.3])["relative_l2_worst"] == 0.3
    assert summary("ms_ssim", [None, 0.5]) == dict.fromkeys(
        ("ms_ssim", "ms_ssim_error", "ms_ssim_spread", "ms_ssim_worst")
    )
    assert summary("psnr", [math.inf, 20.0]) == {
        "psnr": None, "psnr_error": None, "psnr_spread": 0.0, "psnr_worst": 20.0,
    }  # fmt: skip
    assert summary("ssim", [0.5])["ssim_error"] is None


def test_values_survive_json():
    found = Closeness(math.inf, 1.0, 0.9, relative_l2=0.0, others={"lpips": 0.1})
    values = {**found.values(), "psnr": None}
    assert Closeness.from_values(values) == found
