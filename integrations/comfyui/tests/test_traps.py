"""What ComfyUI does that a plan must not misunderstand: each has a test that fails where it is not recognised."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from paroattn_nodes import adapter
from paroattn_nodes.adapter import apply_plan, plan_on
from paroattn_nodes.override import AttentionCall, Forward, _key_mask, working_dtype
from plans_for_tests import SCHEDULE, SIGMAS, Oracle, grid_of, latent, plan_for, with_layers
from test_models import sample

import paroattn
from paroattn import PlanError, TokenGrid
from paroattn.runner import Dense, Runner

OVERRIDE = "optimized_attention_override"


def reasons(model):
    report = plan_on(model).report()
    return report.planned, list(report.dense)


def buckets_seen(monkeypatch):
    """The step bucket of every planned call."""
    seen, original = [], Runner.call

    def call(self, layer, *args, bucket, **kwargs):
        seen.append(int(bucket))
        return original(self, layer, *args, bucket=bucket, **kwargs)

    monkeypatch.setattr(Runner, "call", call)
    return seen


# Other overrides and patches


@pytest.mark.parametrize("when", ["before", "after"])
def test_other_overrides_get_the_calls_that_stay_dense(host, when):
    calls = []

    def other(func, *args, **kwargs):
        calls.append(args[0].shape)
        return func(*args, **kwargs)

    patcher = host.patcher("Wan")
    if when == "before":
        patcher.model_options["transformer_options"][OVERRIDE] = other
    applied = apply_plan(patcher, plan_for("Wan"), start=0.5)
    if when == "after":
        applied.model_options["transformer_options"][OVERRIDE] = other
    sample(host, "Wan", applied)
    report = plan_on(applied).report()
    assert report.planned > 0
    cross = report.planned + sum(report.dense.values())
    assert len(calls) == sum(report.dense.values()) + cross


def test_a_replacement_of_a_block_runs_in_it(host):
    patcher, layers = host.patcher("Wan"), []

    def replacement(arguments, extra):
        layers.append("before")
        return extra["original_block"](arguments)

    patcher.set_model_patch_replace(replacement, "dit", "double_block", 1)
    applied = apply_plan(patcher, plan_for("Wan"))
    sample(host, "Wan", applied)
    assert len(layers) == 4
    assert reasons(applied) == (8, [])


def test_a_block_that_is_left_out_is_no_other_blocks_call(host, monkeypatch):
    patcher = host.patcher("Wan")
    patcher.set_model_patch_replace(lambda arguments, extra: {"img": arguments["img"]}, "dit", "double_block", 0)
    seen, original = [], Runner.call

    def call(self, layer, *args, **kwargs):
        seen.append(layer)
        return original(self, layer, *args, **kwargs)

    monkeypatch.setattr(Runner, "call", call)
    sample(host, "Wan", apply_plan(patcher, plan_for("Wan")))
    assert seen == [1] * 4


def test_a_forward_call_without_attention_is_reported(host):
    patcher = host.patcher("Wan")
    for block in range(2):
        patcher.set_model_patch_replace(
            lambda arguments, extra: {"img": arguments["img"]}, "dit", "double_block", block
        )
    applied = apply_plan(patcher, plan_for("Wan"))
    sample(host, "Wan", applied)
    report = plan_on(applied).report()
    assert (report.forwards, report.idle) == (4, 4)
    assert "a cache left the blocks out" in str(report)


# Steps


def test_conditional_and_unconditional_passes_apart(host):
    patcher, plan = host.patcher("Wan"), plan_for("Wan")
    applied = apply_plan(patcher, plan)
    together = sample(host, "Wan", applied)
    assert plan_on(applied).report().forwards == 4
    apart = sample(host, "Wan", applied, batched=False)
    report = plan_on(applied).report()
    assert (report.forwards, report.planned) == (8, 16)
    assert torch.allclose(apart, together, atol=1e-4)


def test_second_order_samplers_find_their_buckets(host, monkeypatch):
    seen, applied = buckets_seen(monkeypatch), apply_plan(host.patcher("Wan"), plan_for("Wan"))
    sample(host, "Wan", applied, second_order=True)
    # Two evaluations at most steps, the second at a sigma that is not in the schedule; 0.8 is half way.
    assert len(seen) > 2 * 4
    assert seen == sorted(seen)
    assert {0, 1} == set(seen)


def test_slices_of_a_schedule_are_the_whole(host, monkeypatch):
    seen, applied = buckets_seen(monkeypatch), apply_plan(host.patcher("Wan"), plan_for("Wan"))
    conds = host.cond("Wan"), host.cond("Wan", seed=2)
    whole = host.sample(applied, latent("Wan"), SIGMAS, *conds, 3.0)
    buckets = list(seen)
    seen.clear()
    host.sample(applied, latent("Wan"), SIGMAS[:3], *conds, 3.0)
    host.sample(applied, latent("Wan"), SIGMAS[2:], *conds, 3.0)
    assert seen == buckets
    assert len(set(buckets)) == 2
    assert whole.isfinite().all()


def test_few_steps_with_another_shift_find_the_nearest_bucket(host, monkeypatch):
    seen, plan = buckets_seen(monkeypatch), plan_for("Wan")
    applied = apply_plan(host.patcher("Wan"), plan)
    sigmas = (1.0, 0.97, 0.81, 0.79, 0.3, 0.0)
    host.sample(applied, latent("Wan"), sigmas, host.cond("Wan"), host.cond("Wan", seed=2), 3.0)
    assert plan.bucket_levels == (pytest.approx(0.8),)
    assert seen[::2] == [0, 0, 0, 1, 1]


def test_start_and_end_are_those_of_the_whole_schedule(host):
    patcher, plan = host.patcher("Wan"), plan_for("Wan")
    sampling = patcher.get_model_object("model_sampling")
    start, end = 0.2, 0.7
    between = [sampling.percent_to_sigma(end) <= sigma <= sampling.percent_to_sigma(start) for sigma in SIGMAS[:-1]]
    assert 0 < sum(between) < 4
    applied = apply_plan(patcher, plan, start=start, end=end)
    sample(host, "Wan", applied)
    report = plan_on(applied).report()
    assert report.planned == 2 * sum(between)
    assert report.dense == {"the step is outside of start 0.2 to end 0.7 of the schedule": 2 * (4 - sum(between))}


def test_masks_change_in_place(host):
    """A graph that is replayed runs no Python, but the callback before it does."""
    applied = apply_plan(host.patcher("Wan"), plan_for("Wan"))
    on_model = plan_on(applied)
    planned = on_model._planned_on(on_model._plan, grid_of("Wan"), latent("Wan"))
    address, (callback,) = planned.bucket.data_ptr(), applied.callbacks["on_prepare_state"]["paroattn"]
    for sigma, bucket in ((0.9, 0), (0.4, 1), (1.0, 0)):
        callback(applied, torch.tensor([sigma]), {})
        assert int(planned.bucket) == bucket
        assert planned.bucket.data_ptr() == address
    again = on_model._planned_on(on_model._plan, grid_of("Wan"), latent("Wan"))
    assert again is planned


def test_a_graph_that_is_made_is_left_the_bucket_of_the_callback(host, monkeypatch):
    monkeypatch.setattr(adapter, "_is_capturing", lambda device: True)
    seen, applied = buckets_seen(monkeypatch), apply_plan(host.patcher("Wan"), plan_for("Wan"))
    on_model = plan_on(applied)
    on_model._planned_on(on_model._plan, grid_of("Wan"), latent("Wan"))
    shown = []
    monkeypatch.setattr(adapter, "_show", lambda planned, sigma: shown.append(float(sigma)))
    host.sample(applied, latent("Wan"), SIGMAS, host.cond("Wan"))
    assert shown == pytest.approx(SCHEDULE)  # by the callback, once for each step, and not by the forward calls
    assert len(seen) == 8


def test_memory_is_taken_outside_of_graphs_of_allocations(host, monkeypatch):
    import sys
    import types
    from contextlib import contextmanager

    paused = []

    @contextmanager
    def pause_malloc_graph():
        paused.append(True)
        yield

    monkeypatch.setitem(
        sys.modules, "comfy.model_prefetch", types.SimpleNamespace(pause_malloc_graph=pause_malloc_graph)
    )
    on_model = plan_on(apply_plan(host.patcher("Wan"), plan_for("Wan")))
    on_model._planned_on(on_model._plan, grid_of("Wan"), latent("Wan"))
    assert paused


def test_nothing_stays_on_the_device_after_sampling(host):
    applied = apply_plan(host.patcher("Wan"), plan_for("Wan"))
    sample(host, "Wan", applied)
    assert not plan_on(applied)._planned


# Sizes


def other_size(host, applied):
    return host.sample(applied, latent("Wan", sizes=(5, 10, 14)), SIGMAS, host.cond("Wan"))


def test_other_sizes_stay_dense(host):
    patcher = host.patcher("Wan")
    applied = apply_plan(patcher, plan_for("Wan"))
    assert torch.equal(other_size(host, applied), other_size(host, patcher))
    (reason,) = plan_on(applied).report().dense
    assert reason == "plan is for grid 6x6x6 (216 visual tokens); this request has grid 5x5x7 (175 visual tokens)"


def test_other_sizes_get_an_adapted_plan(host):
    patcher, plan = host.patcher("Wan"), plan_for("Wan")
    applied = apply_plan(patcher, plan, other_sizes="adapt")
    found = other_size(host, applied)
    expected = other_size(host, Oracle(plan.adapt(TokenGrid(5, 5, 7)), "prefix").put_on(patcher))
    assert reasons(applied) == (8, [])
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, other_size(host, patcher), atol=1e-3)


def test_other_sizes_are_an_error(host):
    applied = apply_plan(host.patcher("Wan"), plan_for("Wan"), other_sizes="error")
    with pytest.raises(PlanError) as error:
        other_size(host, applied)
    assert str(error.value) == (
        "plan is for grid 6x6x6 (216 visual tokens); this request has grid 5x5x7 (175 visual tokens). Load a plan for "
        "this size, or set other_sizes to 'adapt' or 'dense'."
    )


def test_sizes_are_padded_up_to_whole_tokens(host):
    patcher, plan = host.patcher("Wan"), plan_for("Wan")
    applied = apply_plan(patcher, plan)
    odd = latent("Wan", sizes=(6, 11, 12))
    found = host.sample(applied, odd, SIGMAS, host.cond("Wan"))
    expected = host.sample(Oracle(plan, "prefix").put_on(patcher), odd, SIGMAS, host.cond("Wan"))
    assert reasons(applied) == (8, [])
    assert torch.allclose(found, expected, atol=1e-4)


def test_area_conditioning_stays_dense(host):
    plan = plan_for("Wan", edges=(0.0,))
    patcher = host.patcher("Wan")
    applied = apply_plan(patcher, plan)
    # The area is as large as what the plan is for: a size alone would not tell.
    noise = latent("Wan", sizes=(6, 12, 20))
    conds = {"positive": host.cond("Wan", area=(12, 12, 0, 4)), "negative": host.cond("Wan", seed=2), "cfg": 2.0}
    found = host.sample(applied, noise, SIGMAS, **conds)
    assert torch.equal(found, host.sample(patcher, noise, SIGMAS, **conds))
    planned, found_reasons = reasons(applied)
    assert planned == 0
    assert "the conditioning is for an area: the model gets a part of the latent" in found_reasons


def test_context_windows_stay_dense(host):
    patcher = host.patcher("Wan")
    applied = apply_plan(patcher, plan_for("Wan"))
    noise = latent("Wan", sizes=(12, 12, 12))
    arguments = (noise, SIGMAS, host.cond("Wan"), host.cond("Wan", seed=2), 2.0)
    found = host.sample(applied, *arguments, window=6)
    assert torch.equal(found, host.sample(patcher, *arguments, window=6))
    assert reasons(applied) == (0, ["context windows: the model gets some of the frames"])


# Tokens beside the grid


@pytest.mark.fake_host
@pytest.mark.parametrize(("family", "shape"), [("Wan", (4, 12, 12)), ("Flux", (4, 8, 8)), ("Qwen-Image", (4, 1, 8, 8))])
def test_reference_frames_stay_dense(host, family, shape):
    reference = torch.randn(1, *shape, generator=torch.Generator().manual_seed(9))
    _stays_dense(host, family, reference)


@pytest.mark.real_host
@pytest.mark.parametrize(("family", "shape"), [("Flux", (4, 8, 8)), ("Qwen-Image", (4, 1, 8, 8))])
def test_reference_images_stay_dense(host, family, shape):
    reference = torch.randn(1, *shape, generator=torch.Generator().manual_seed(9))
    _stays_dense(host, family, reference)


def _stays_dense(host, family, reference):
    patcher = host.patcher(family)
    applied = apply_plan(patcher, plan_for(family))
    conds = {"positive": host.cond(family, reference=reference), "negative": None, "cfg": 1.0}
    found = sample(host, family, applied, **conds)
    assert torch.equal(found, sample(host, family, patcher, **conds))
    planned, (reason,) = reasons(applied)
    assert planned == 0
    assert "reference frames or other tokens stand beside them" in reason


@pytest.mark.fake_host
def test_guide_frames_of_ltx_stay_dense(host):
    """They leave the number of tokens as it was."""
    patcher = host.patcher("LTX-Video")
    applied = apply_plan(patcher, plan_for("LTX-Video"))
    ((text, extra),) = host.cond("LTX-Video")
    conds = {"positive": [[text, {**extra, "keyframe_idxs": list(range(36))}]], "negative": None, "cfg": 1.0}
    sample(host, "LTX-Video", applied, **conds)
    assert reasons(applied) == (0, ["guide frames take tokens out of the video and stand beside it"])


def test_vace_stays_dense(host):
    patcher = host.patcher("Wan VACE")
    applied = apply_plan(patcher, plan_for("Wan VACE"))
    assert torch.equal(sample(host, "Wan VACE", applied), sample(host, "Wan VACE", patcher))
    planned, (reason,) = reasons(applied)
    assert planned == 0
    assert reason.startswith("VaceWanModel: VACE runs blocks of its own")


def test_a_second_call_of_a_block_is_none_of_its_self_attention(host, monkeypatch):
    """Of VACE, were it a Wan, the blocks beside the main ones have their index; and cross-attention may be as long."""
    from paroattn_nodes import models

    monkeypatch.setitem(models.FAMILIES, "VaceWanModel", models.FAMILIES["WanModel"])
    applied = apply_plan(host.patcher("Wan VACE"), plan_for("Wan VACE"))
    sample(host, "Wan VACE", applied)
    assert reasons(applied) == (8, [])


def test_cross_attention_with_as_many_keys_is_no_self_attention(host):
    patcher, plan = host.patcher("Wan"), plan_for("Wan")
    applied = apply_plan(patcher, plan)
    conds = {"positive": host.cond("Wan", tokens=216), "negative": None, "cfg": 1.0}
    found = sample(host, "Wan", applied, **conds)
    assert reasons(applied) == (8, [])
    short = Oracle(plan, "prefix")
    count = [0]

    def first_of_each_block(func, *args, **kwargs):
        count[0] += 1
        return short(func, *args, **kwargs) if count[0] % 2 else func(*args, **kwargs)

    clone = patcher.clone()
    clone.model_options["transformer_options"][OVERRIDE] = first_of_each_block
    assert torch.allclose(found, sample(host, "Wan", clone, **conds), atol=1e-4)


# Masks


def test_masks_of_pairs_stay_dense(host):
    tokens = grid_of("Flux").tokens
    mask = torch.zeros(1, tokens, tokens)
    mask[:, :, 5] = -1.0
    patcher = host.patcher("Flux")
    applied = apply_plan(patcher, plan_for("Flux"))

    def with_mask(model, x, timestep, transformer_options, **others):
        return original(x, timestep, transformer_options=transformer_options, **{**others, "attention_mask": mask})

    diffusion_model = patcher.model.diffusion_model
    original = diffusion_model.forward
    diffusion_model.forward = lambda x, timestep, transformer_options=None, **others: with_mask(
        diffusion_model, x, timestep, transformer_options, **others
    )
    sample(host, "Flux", applied)
    planned, (reason,) = reasons(applied)
    assert planned == 0
    assert "it is about pairs of tokens, not about keys" in reason


def test_text_masks_of_weights_stay_dense(host):
    patcher = host.patcher("HunyuanVideo")
    applied = apply_plan(patcher, plan_for("HunyuanVideo"))
    mask = torch.linspace(-2, 0, 12).view(1, 12)
    sample(host, "HunyuanVideo", applied, positive=host.cond("HunyuanVideo", mask=mask), negative=None, cfg=1.0)
    assert reasons(applied) == (0, ["the text's mask holds weights, not only which tokens are padding"])


@pytest.mark.parametrize("shape", [(1, 1, 6), (2, 1, 6), (2, 1, 1, 6), (1, 6)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16, torch.bfloat16])
def test_key_masks(shape, dtype):
    visible = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    mask = (
        visible
        if dtype == torch.bool
        else torch.zeros(shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    )
    found = _key_mask(mask, 2, 6, True)
    assert torch.equal(found, visible.reshape(-1, 6).expand(2, 6))


@pytest.mark.parametrize("shape", [(6, 6), (1, 6, 6), (2, 4, 1, 6), (3, 1, 6), (1, 1, 5)])
def test_other_masks_are_refused(shape):
    assert isinstance(_key_mask(torch.zeros(shape), 2, 6, True), Dense)


# Layouts, scales and dtypes of calls


@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_layouts_and_scales(skip_reshape, skip_output_reshape, scale):
    plan = plan_for("Wan")
    grid, bucket = plan.grid, torch.tensor(1)
    q, k, v = (torch.randn(2, 2, grid.tokens, 24, generator=torch.Generator().manual_seed(i)) for i in range(3))
    expected = paroattn.attention(
        q, k, v, permutation=plan.layer(0).permutation, block_mask=plan.mask(1, 0),
        compensate=plan.compensate[1, 0].tolist(), scale=scale,
    )  # fmt: skip
    given = (q, k, v) if skip_reshape else (x.transpose(1, 2).flatten(2) for x in (q, k, v))
    call = AttentionCall.of(
        *given, 2, skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape,
        **({} if scale is None else {"scale": scale}),
    )  # fmt: skip
    found = call.run(0, adapter.Planned(Runner(plan, "cpu"), bucket), grid, True)
    expected = expected if skip_output_reshape else expected.transpose(1, 2).flatten(2)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-5)


def test_calls_that_a_model_keeps_from_low_precision_stay_dense():
    plan = plan_for("Wan")
    q = torch.zeros(1, plan.grid.tokens, 48)
    call = AttentionCall.of(q, q, q, 2, low_precision_attention=False)
    found = call.run(0, adapter.Planned(Runner(plan, "cpu"), torch.tensor(0)), plan.grid, True)
    assert found == Dense("the model keeps this call from attention in low precision")


def test_accelerators_get_16_bits():
    assert working_dtype(torch.float32, torch.device("cuda")) == torch.bfloat16
    assert working_dtype(torch.float16, torch.device("cuda")) == torch.float16
    assert working_dtype(torch.float32, torch.device("cpu")) == torch.float32


# Threads


@pytest.mark.fake_host
def test_passes_in_threads_do_not_meet(host):
    """As on two devices: one pass is of an area and stays dense, the other does not, and blocks alternate."""
    barrier = threading.Barrier(2, timeout=20)
    patcher, plan = host.patcher("Wan"), plan_for("Wan", edges=(0.0,))

    def alternating(arguments, extra):
        barrier.wait()
        return extra["original_block"](arguments)

    for block in range(2):
        patcher.set_model_patch_replace(alternating, "dit", "double_block", block)
    applied = apply_plan(patcher, plan)
    conds = {"positive": host.cond("Wan"), "negative": host.cond("Wan", seed=2, area=(8, 12, 0, 0)), "cfg": 2.0}
    in_threads = host.sample(applied, latent("Wan"), SIGMAS, **conds, threads=True)
    report = plan_on(applied).report()
    assert report.planned == 8
    assert sum(report.dense.values()) == 8
    barrier.wait = lambda: None
    in_turn = host.sample(applied, latent("Wan"), SIGMAS, **conds, batched=False)
    assert torch.allclose(in_threads, in_turn, atol=1e-5)


def test_each_device_has_its_own_operators(host):
    on_model = plan_on(apply_plan(host.patcher("Wan"), plan_for("Wan")))
    x = latent("Wan")
    first = on_model._planned_on(on_model._plan, grid_of("Wan"), x)
    on_model._planned[on_model._plan.grid.boxes, torch.device("cuda", 1)] = "of another device"
    assert on_model._planned_on(on_model._plan, grid_of("Wan"), x) is first
    assert set(on_model._planned) == {(on_model._plan.grid.boxes, torch.device(name)) for name in ("cpu", "cuda:1")}


# Two models (Wan 2.2)


def two_models():
    """Layers of the first transformer are called in the first bucket, those of the second in the other."""
    usage = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    return plan_for("Wan", times=2, usage=usage)


@pytest.mark.parametrize(
    ("part", "layers", "sigmas"), [("high noise", (0, 1), SIGMAS[:3]), ("low noise", (2, 3), SIGMAS[2:])]
)
def test_parts_of_a_plan_for_two_models(host, part, layers, sigmas):
    plan, patcher = two_models(), host.patcher("Wan")
    applied = apply_plan(patcher, plan, part=part)
    conds = host.cond("Wan"), host.cond("Wan", seed=2)
    found = host.sample(applied, latent("Wan"), sigmas, *conds, 3.0)
    oracle = Oracle(replace(with_layers(plan, layers), usage=torch.ones(2, 2)), "prefix")
    assert reasons(applied) == (4, [])
    assert torch.allclose(found, host.sample(oracle.put_on(patcher), latent("Wan"), sigmas, *conds, 3.0), atol=1e-4)


@pytest.mark.parametrize(
    ("part", "sigmas", "ran", "own"),
    [
        ("low noise", SIGMAS[:3], "1.000 to 0.900", "0.800 to 0.000"),
        ("high noise", SIGMAS[2:], "0.700 to 0.400", "1.000 to 0.800"),
    ],
)
def test_parts_that_are_mixed_up_are_an_error(host, part, sigmas, ran, own):
    applied = apply_plan(host.patcher("Wan"), two_models(), part=part)
    with pytest.raises(PlanError) as error:
        host.sample(applied, latent("Wan"), sigmas, host.cond("Wan"))
    assert str(error.value) == (
        f"part is {part!r}, but this sampler runs noise levels {ran}; in the plan that part runs from {own}. Choose "
        "the other part, or check which steps this sampler runs."
    )


def test_attention_after_a_block_that_called_none_is_no_block_s(host):
    forward = Forward(Dense("all of it"), grid_of("Wan"), True, lambda reason: None)
    options = forward.options({}, [("double_block", 0)])
    options["patches_replace"]["dit"]["double_block", 0]({}, {"original_block": lambda arguments: arguments})
    options[OVERRIDE](lambda *args: None)
    assert forward.calls == 0


def test_gradients_are_the_models_own():
    plan = plan_for("Wan")
    q = torch.zeros(1, plan.grid.tokens, 48, requires_grad=True)
    with torch.enable_grad():
        call = AttentionCall.of(q, q, q, 2)
        found = call.run(0, adapter.Planned(Runner(plan, "cpu"), torch.tensor(0)), plan.grid, True)
    assert found == Dense("gradients are asked for, and a plan is for inference")
