"""Every model: what a plan gives is what the operator gives, call by call, and without a plan nothing changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from paroattn_nodes.adapter import apply_plan, plan_on
from plans_for_tests import FAMILIES, SIGMAS, TEXT, Oracle, grid_of, latent, plan_for

PLANNED = [family for family in FAMILIES if family != "Wan VACE"]


def patcher_of(host, family):
    if host.name != "the stand-in" and family == "HunyuanVideo, text first":
        pytest.skip("ComfyUI has the text on one side")
    return host.patcher(family)


def sample(host, family, patcher, sigmas=SIGMAS, **how):
    conds = {"positive": host.cond(family), "negative": host.cond(family, seed=2), "cfg": 3.0}
    return host.sample(patcher, latent(family), sigmas, **{**conds, **how})


@pytest.mark.parametrize("family", PLANNED)
@pytest.mark.parametrize("precision", ["exact", "int8"])
def test_a_plan_gives_what_the_operator_gives(host, family, precision):
    patcher, plan = patcher_of(host, family), plan_for(family, precision=precision)
    applied = apply_plan(patcher, plan)
    # Text on the other side is summed in another order, by which some values are rounded another way, and more with
    # each step.
    sigmas = SIGMAS if precision == "exact" else SIGMAS[-2:]
    found = sample(host, family, applied, sigmas=sigmas)
    oracle = Oracle(plan, host.text_side(family))
    expected = sample(host, family, oracle.put_on(patcher), sigmas=sigmas)
    dense = sample(host, family, patcher, sigmas=sigmas)
    change, difference = float((expected - dense).abs().max()), float((found - expected).abs().max())
    assert change > 0.01
    assert difference < (2e-3 if precision == "exact" else 2e-2) * change + 2e-5
    report = plan_on(applied).report()
    assert report.planned == oracle.calls == plan.model.layers * (len(sigmas) - 1)
    assert not report.dense
    assert not report.idle


def test_repair_brings_a_planned_model_closer_to_its_own_attention(host):
    patcher, plan = patcher_of(host, "Wan"), plan_for("Wan")
    dense = sample(host, "Wan", patcher)
    plain, repaired = (sample(host, "Wan", apply_plan(patcher, plan, repair=repair)) for repair in (False, True))
    assert float((repaired - dense).norm()) < float((plain - dense).norm())


@pytest.mark.parametrize("family", PLANNED)
def test_all_blocks_in_the_models_own_order_change_nothing_but_rounding(host, family):
    patcher = patcher_of(host, family)
    found = sample(host, family, apply_plan(patcher, plan_for(family, density=1.1)))
    dense = sample(host, family, patcher)
    assert torch.allclose(found, dense, atol=2e-4 * float(dense.abs().max()))


@pytest.mark.parametrize("family", PLANNED)
def test_a_model_is_left_as_it_was_to_the_bit(host, family):
    patcher = patcher_of(host, family)
    before = sample(host, family, patcher)
    options = str(patcher.model_options)
    applied = apply_plan(patcher, plan_for(family))
    changed = sample(host, family, applied)
    assert not torch.equal(before, changed)
    assert torch.equal(sample(host, family, patcher), before)
    assert str(patcher.model_options) == options
    assert plan_on(patcher) is None


@pytest.mark.parametrize("family", PLANNED)
def test_calls_that_stay_dense_are_the_models_own_to_the_bit(host, family):
    patcher = patcher_of(host, family)
    other = replace(
        plan_for(family), grid=replace(grid_of(family), frames=3, height=1, width=grid_of(family).visual_tokens // 3)
    )
    applied = apply_plan(patcher, other)
    assert torch.equal(sample(host, family, applied), sample(host, family, patcher))
    report = plan_on(applied).report()
    (reason,) = report.dense
    assert reason.startswith("plan is for grid 3x1x")
    assert report.planned == 0
    assert report.dense[reason] == other.model.layers * (len(SIGMAS) - 1)


@pytest.mark.parametrize("family", ["Flux", "Qwen-Image", "HunyuanVideo"])
def test_prompts_of_other_lengths_use_the_plan(host, family):
    patcher, plan = patcher_of(host, family), plan_for(family)
    applied = apply_plan(patcher, plan)
    conds = {"positive": host.cond(family, tokens=19), "negative": None, "cfg": 1.0}
    found = sample(host, family, applied, **conds)
    longer = replace_text(plan, family, 19)
    oracle = Oracle(longer, host.text_side(family))
    expected = sample(host, family, oracle.put_on(patcher), **conds)
    assert plan_on(applied).report().planned == oracle.calls > 0
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


def replace_text(plan, family, text):
    """A plan with another number of text tokens: visual blocks stay, those that touch text are computed."""
    from paroattn.block_mask import pack_bits, text_blocks, unpack_bits

    grid = replace(plan.grid, text_tokens=text)
    old = unpack_bits(plan.mask_table, -(-plan.grid.tokens // 64))
    touched = text_blocks(grid, 64)
    table = torch.zeros(len(old), *touched.shape, dtype=torch.bool)
    rows, columns = (min(a, b) for a, b in zip(old.shape[1:], touched.shape, strict=True))
    table[:, :rows, :columns] = old[:, :rows, :columns]
    return replace(plan, grid=grid, mask_table=pack_bits(table | touched))


def test_text_masks_of_hunyuan_video_hide_padding(host):
    mask = torch.ones(1, TEXT, dtype=torch.long)
    mask[:, 7:] = 0
    family, plan = "HunyuanVideo", plan_for("HunyuanVideo")
    patcher = host.patcher(family)
    conds = {"positive": host.cond(family, mask=mask), "negative": None, "cfg": 1.0}
    applied = apply_plan(patcher, plan)
    found = sample(host, family, applied, **conds)
    oracle = Oracle(plan, host.text_side(family))
    expected = sample(host, family, oracle.put_on(patcher), **conds)
    assert plan_on(applied).report().planned == oracle.calls > 0
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    without_mask = sample(host, family, applied, positive=host.cond(family), negative=None, cfg=1.0)
    assert not torch.allclose(found, without_mask, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_16_bits_run_in_their_own(host, dtype):
    patcher, plan = host.patcher("Wan"), plan_for("Wan")
    expected = sample(host, "Wan", apply_plan(patcher, plan))
    half = host.in_16_bits("Wan", dtype)
    applied = apply_plan(half, plan)
    found = sample(host, "Wan", applied)
    assert plan_on(applied).report().planned == 8
    assert float((found - expected).abs().max()) < 0.15 * float(expected.abs().max())


def test_a_compiled_model_gives_the_same(host):
    patcher = host.patcher("Wan")
    applied = apply_plan(patcher, plan_for("Wan"))
    expected = sample(host, "Wan", applied)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    patcher.model.diffusion_model.compile(backend=backend)
    found = sample(host, "Wan", applied)
    torch._dynamo.reset()
    assert graphs
    assert torch.allclose(found, expected, atol=1e-5)
    assert plan_on(applied).report().planned == 16


@pytest.mark.parametrize("family", ["Wan", "Flux"])
def test_nothing_needs_inference_mode(host, family):
    """ComfyUI samples within it, but its threads need not be."""
    applied = apply_plan(patcher_of(host, family), plan_for(family))
    with torch.inference_mode():
        inside = sample(host, family, applied)
        planned = plan_on(applied)
        runner = planned._planned_on(planned._plan, grid_of(family), latent(family))
    assert not runner.bucket.is_inference()
    assert torch.equal(sample(host, family, applied), inside.clone())


@pytest.mark.real_host
def test_image_to_video_of_wan(host):
    """Attends to the image's tokens beside the text's, each with the queries of all tokens."""
    patcher, plan = host.image_to_video(), plan_for("Wan")
    applied = apply_plan(patcher, plan)
    conds = {"positive": host.image_cond(1), "negative": host.image_cond(2), "cfg": 3.0}
    found = sample(host, "Wan", applied, **conds)
    expected = sample(host, "Wan", Oracle(plan, "prefix").put_on(patcher), **conds)
    assert plan_on(applied).report().planned == 8
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, sample(host, "Wan", patcher, **conds), atol=1e-2)
