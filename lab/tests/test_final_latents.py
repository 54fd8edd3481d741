"""The latents that a pipeline ends with, seen at its scheduler."""

import diffusers
import pytest
import tiny
import torch
from paroattn_lab.quality.final_latents import FinalLatents
from tiny_models import COGVIDEOX, FLUX

import paroattn


def test_they_are_what_the_pipeline_returns_with_a_plan_and_without():
    pipe = tiny.tiny_wan()
    with FinalLatents(pipe.scheduler) as final:
        assert final.latents is None
        expected = tiny.latents(pipe)
    assert torch.equal(final.latents, expected.float())
    with paroattn.apply(pipe, precision="int4"), FinalLatents(pipe.scheduler) as planned:
        expected = tiny.latents(pipe)
    assert torch.equal(planned.latents, expected.float())
    assert not torch.equal(planned.latents, final.latents)
    assert "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize("model", [COGVIDEOX, FLUX], ids=lambda model: model.name)
def test_schedulers_of_other_pipelines_are_watched_too(model):
    pipe = model.pipe()
    with FinalLatents(pipe.scheduler) as final:
        expected = model.latents(pipe)
    assert final.latents.shape[-1] == expected.shape[-1]
    assert torch.equal(final.latents.flatten(), expected.float().flatten())


def test_a_scheduler_that_answers_with_an_object_is_understood():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(2)
    with FinalLatents(scheduler) as final:
        result = scheduler.step(torch.ones(2), scheduler.timesteps[0], torch.zeros(2))
    assert torch.equal(final.latents, result.prev_sample)
