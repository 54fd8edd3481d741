"""Noise levels, steps and step buckets, under schedulers and pipelines of all kinds."""

import diffusers
import pytest
import tiny
import tiny_models
import torch

import paroattn
from paroattn.integrations.descriptors import DESCRIPTORS
from paroattn.integrations.schedule import Schedule


def steps_seen(pipe, generate):
    """(step, noise level, steps) at every forward call; the levels have to be those that the transformer was given."""
    seen, given = [], []

    def look(forward):
        seen.append(now[0])
        given.append(float(forward.descriptor.level(forward.timestep)))

    now = [None]

    def follow(schedule):
        now[0] = (schedule.step, schedule.level, schedule.num_steps)

    with paroattn.observe(pipe, lambda call: None, on_forward=look, on_step=follow):
        generate()
    assert [level for _, level, _ in seen] == pytest.approx(given, abs=1e-6)
    return seen


def check(seen, steps):
    """Steps count up from 0, and are known to be so many from the first call on."""
    assert sorted({step for step, _, _ in seen}) == list(range(steps))
    assert [step for step, _, _ in seen] == sorted(step for step, _, _ in seen)
    assert {count for _, _, count in seen} == {steps}
    assert [level for _, level, _ in seen] == sorted((level for _, level, _ in seen), reverse=True)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.UniPCMultistepScheduler(**FLOW),
        diffusers.DPMSolverMultistepScheduler(**FLOW),
        diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
        diffusers.EulerDiscreteScheduler(),
        diffusers.DDIMScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
@pytest.mark.parametrize("steps", [3, 7])
def test_the_steps_are_those_of_the_schedulers_timesteps(scheduler, steps):
    pipe = tiny.tiny_wan()
    pipe.scheduler = scheduler
    # Not every scheduler has what WanPipeline asks of it; diffusers users set these on the instance, too.
    if not hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index = lambda begin_index=0: None
    if not hasattr(scheduler, "sigmas"):
        scheduler.sigmas = torch.zeros(1000)
    seen = steps_seen(pipe, lambda: tiny.latents(pipe, steps=steps))
    check(seen, len(scheduler.timesteps.unique()))


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_image_to_image_begins_where_its_strength_says(strength):
    text = tiny_models.FLUX
    pipe = diffusers.FluxImg2ImgPipeline(**text.pipe().components)
    pipe.set_progress_bar_config(disable=True)
    arguments = {**text.arguments(), "image": torch.rand(1, 3, 20, 28), "num_inference_steps": 6}
    arguments |= {"strength": strength, "output_type": "latent"}
    seen = steps_seen(pipe, lambda: pipe(**arguments))
    check(seen, round(6 * strength))


@pytest.mark.parametrize(
    "scheduler", [diffusers.CogVideoXDDIMScheduler, diffusers.CogVideoXDPMScheduler], ids=lambda kind: kind.__name__
)
def test_video_to_video_begins_where_its_strength_says(scheduler):
    """CogVideoX's schedulers know no step index."""
    pipe = diffusers.CogVideoXVideoToVideoPipeline(**tiny_models.COGVIDEOX.pipe().components)
    pipe.scheduler = scheduler()
    pipe.set_progress_bar_config(disable=True)
    arguments = tiny_models.COGVIDEOX.arguments()
    video = torch.rand(1, arguments.pop("num_frames"), 3, arguments["height"], arguments["width"])
    arguments |= {"video": video, "strength": 0.5, "num_inference_steps": 6, "output_type": "latent"}
    seen = steps_seen(pipe, lambda: pipe(**arguments))
    check(seen, 3)


def pyramid_broadcast(pipe):
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: int(pipe.scheduler.timesteps[pipe.scheduler.step_index or 0]),
    )


CACHES = {
    "FirstBlockCache": lambda pipe: diffusers.FirstBlockCacheConfig(threshold=10.0),
    "PyramidAttentionBroadcast": pyramid_broadcast,
    "TaylorSeer": lambda pipe: diffusers.TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=2, cache_identifiers=[r"blocks\.\d+\.attn1"]
    ),
    "MagCache": lambda pipe: diffusers.MagCacheConfig(
        threshold=0.5, max_skip_steps=2, num_inference_steps=8, mag_ratios=torch.ones(8)
    ),
}


@pytest.mark.parametrize("name", CACHES)
def test_the_step_goes_on_when_a_cache_skips_calls(monkeypatch, name):
    """Caches leave out blocks, or their attention, in some steps; the masks stay those of the step."""
    if not hasattr(diffusers, f"{name}Config") and not hasattr(diffusers, f"{name}CacheConfig"):
        pytest.skip(f"this diffusers has no {name}")
    pipe = tiny.tiny_wan(layers=3)
    plan = tiny.make_plan(pipe, edges=(0.0, 0.25, 0.5, 0.75))
    pipe.transformer.enable_cache(CACHES[name](pipe))
    dense = tiny.latents(pipe, steps=8)
    calls = tiny.record_calls(monkeypatch)
    with paroattn.apply(pipe, plan):
        cached = tiny.latents(pipe, steps=8)
    first = [call[0] for call in calls if call[3].layer_plan is calls[0][3].layer_plan]
    assert first[0] == 0
    assert first == sorted(first)
    assert max(first) >= 2  # with most caches whole steps are left out
    assert len(calls) < 3 * 8
    assert torch.linalg.norm(cached - dense) <= 1e-4 * torch.linalg.norm(dense)
    pipe.transformer.disable_cache()


def test_a_generation_that_was_broken_off_does_not_shift_the_next(monkeypatch):
    pipe = tiny.tiny_wan()
    calls = tiny.record_calls(monkeypatch)

    def stop(pipe, step, timestep, kwargs):
        if step == 1:
            raise KeyboardInterrupt
        return kwargs

    with paroattn.apply(pipe, tiny.make_plan(pipe, edges=(0.0, 0.25, 0.5, 0.75))):
        with pytest.raises(KeyboardInterrupt):
            tiny.latents(pipe, steps=4, callback=stop)
        calls.clear()
        tiny.latents(pipe, steps=4)
    assert [call[0] for call in calls] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_steps_are_followed_where_the_scheduler_has_other_timesteps():
    """A pipeline of one's own: levels are then known as they come."""
    descriptor, schedule, scheduler = DESCRIPTORS["WanTransformer3DModel"], Schedule(), tiny.tiny_wan().scheduler
    scheduler.set_timesteps(4)
    moved = [schedule.follow(descriptor, timestep, scheduler) for timestep in (777.0, 777.0, 555.0, 777.0)]
    assert moved == [True, False, True, True]
    assert schedule.levels == pytest.approx((0.777,))


@pytest.mark.parametrize("steps", [3, 4, 8, 50])
def test_a_call_has_the_bucket_of_the_nearest_calibrated_step(steps):
    plan = tiny.make_plan(tiny.tiny_wan(), edges=(0.0, 0.25, 0.5, 0.75))
    calibrated = torch.tensor(plan.schedule)
    for level in tiny.schedule_of(steps):
        assert plan.bucket_of(level) == int((calibrated - level).abs().argmin())


@pytest.mark.parametrize(
    ("name", "timestep", "level"),
    [
        ("WanTransformer3DModel", torch.tensor([500, 500]), 0.5),
        (
            "WanTransformer3DModel",
            torch.tensor([[0.0, 250.0, 250.0]]),
            0.25,
        ),  # the first frame is given
        ("FluxTransformer2DModel", torch.tensor([0.5]), 0.5),
        ("QwenImageTransformer2DModel", torch.tensor([0.75], dtype=torch.bfloat16), 0.75),
        ("MochiTransformer3DModel", torch.tensor([100.0]), 0.9),
        ("CogVideoXTransformer3DModel", torch.tensor(999), 0.999),
    ],
)
def test_noise_levels_of_models(name, timestep, level):
    descriptor = DESCRIPTORS[name]
    assert float(descriptor.level(timestep)) == pytest.approx(level)
    assert descriptor.timestep(level) == pytest.approx(float(timestep.max()))
