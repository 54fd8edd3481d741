"""The same weights, seed and plan give in ComfyUI what they give in diffusers with `paroattn.apply`."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import pytest
import torch
from fake_host import random, tiny_diffusers
from paroattn_nodes.adapter import apply_plan
from plans_for_tests import latent, plan_for

import paroattn

STEPS = 4


def _wan(noise):
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=tiny_diffusers("Wan"),
    )
    arguments = {
        "prompt_embeds": random(1, 1, 12, 32),
        "negative_prompt_embeds": random(2, 1, 12, 32),
        "height": 96,
        "width": 96,
        "num_frames": 21,
        "guidance_scale": 3.0,
        "latents": noise,
    }
    return pipe, lambda: pipe(**arguments, num_inference_steps=STEPS, output_type="latent").frames


def _flux(noise):
    import tiny_models

    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        vae=tiny_models._image_vae(),
        transformer=tiny_diffusers("Flux"),
    )
    arguments = {
        "prompt_embeds": random(1, 1, 12, 32),
        "pooled_prompt_embeds": random(51, 1, 32),
        "height": 28,
        "width": 28,
        "guidance_scale": 3.5,
        "latents": pipe._pack_latents(noise, *noise.shape),
    }

    def run():
        packed = pipe(**arguments, num_inference_steps=STEPS, output_type="latent").images
        return pipe._unpack_latents(packed, 28, 28, pipe.vae_scale_factor)

    return pipe, run


@pytest.mark.parametrize("precision", ["exact", "int8"])
@pytest.mark.parametrize("family", ["Wan", "Flux"])
def test_the_same_weights_and_plan_give_what_diffusers_gives(host, family, precision):
    noise = latent(family, sizes=(28, 28) if family == "Flux" else None)
    pipe, run = (_flux if family == "Flux" else _wan)(noise)
    pipe.set_progress_bar_config(disable=True)
    patcher = host.patcher_of(family, pipe.transformer)
    dense = run()
    sigmas = pipe.scheduler.sigmas
    plan = replace(
        plan_for(family, precision=precision), model=paroattn.identify(pipe), schedule=tuple(sigmas[:-1].tolist())
    )
    handle = paroattn.apply(pipe, plan)
    expected = run()
    calls = handle.report().planned
    handle.remove()

    def sample(patcher):
        guided = {"negative": host.cond(family, seed=2), "cfg": 3.0} if family == "Wan" else {}
        return host.sample(patcher, noise, sigmas, host.cond(family), **guided)

    assert torch.allclose(sample(patcher), dense, atol=1e-4)
    found = sample(apply_plan(patcher, plan))
    assert calls
    assert float((expected - dense).abs().max()) > 1e-2
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max().clamp(min=1))
