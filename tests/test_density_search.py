"""Plans for a quality or a speed, and steps and layers that stay dense."""

import math

import pytest
import tiny
import tiny_models
import torch

import paroattn
from paroattn.block_mask import unpack_bits
from paroattn.calibration import density_search
from paroattn.calibration.run import CalibrationRun
from paroattn.keep import least_density

CALL = tiny_models.WAN22.call()


@pytest.fixture(scope="module")
def pipe():
    return tiny.tiny_wan(layers=3)


@pytest.fixture(scope="module")
def prompts():
    return [{**CALL, "guidance_scale": 1.0, "num_inference_steps": 4}]


def psnr(pipe, plan, prompts):
    full = pipe(**prompts[0], generator=torch.Generator().manual_seed(0))[0]
    with paroattn.apply(pipe, plan, strict=True):
        found = pipe(**prompts[0], generator=torch.Generator().manual_seed(0))[0]
    return 10 * math.log10(float((full.max() - full.min()) ** 2 / (found - full).square().mean()))


def test_a_plan_for_a_quality_reaches_it_with_few_blocks(pipe, prompts):
    at_half = paroattn.calibrate(pipe, prompts, density=0.5, progress=False)
    wanted = psnr(pipe, at_half, prompts)
    plan = paroattn.calibrate(pipe, prompts, target_psnr=wanted - 1e-3, progress=False)
    assert plan.density() <= 0.5 + 1 / 16
    assert psnr(pipe, plan, prompts) >= wanted - 1e-3
    assert plan.provenance["target PSNR"] == wanted - 1e-3
    assert plan.provenance["measured PSNR"] == pytest.approx(psnr(pipe, plan, prompts), abs=1e-3)
    assert plan.quality == {"psnr": plan.provenance["measured PSNR"]}


def halving(monkeypatch, measured, **target):
    """The densities tried when `measured` tells the value at a density."""
    tried = []
    plan = tiny.make_plan(tiny.tiny_wan())

    def select(density):
        tried.append(density)
        return plan

    def measure(run):
        return lambda plan: measured(tried[-1])

    monkeypatch.setattr(density_search, "_quality", measure)
    monkeypatch.setattr(density_search, "_speed", measure)
    run = CalibrationRun(tiny.tiny_wan(), ["a"], (), 0, {}, progress=False)
    run.grid = paroattn.TokenGrid(16, 16, 16)
    found = density_search.reach(run, density_search.Goal(**target), select, least_density(run.grid))
    return tried, found.provenance


def test_quality_is_reached_from_above_and_speed_from_below(monkeypatch):
    tried, provenance = halving(monkeypatch, lambda density: 50 * density, psnr=20.0)
    assert tried[0] == 1.0
    assert len(tried) == 1 + density_search.TRIES
    assert 20 <= provenance["measured PSNR"] < 20 + 50 / 2**density_search.TRIES
    tried, provenance = halving(monkeypatch, lambda density: 1 / (0.1 + density), speed_up=2.0)
    assert tried[0] == pytest.approx(1 / 64)
    assert 2 <= provenance["measured speed-up"] < 2.1


def test_what_cannot_be_reached_says_what_was_measured(monkeypatch):
    with pytest.raises(paroattn.PlanError, match=r"PSNR 60 cannot be reached: at density 1.000 it is 50.00"):
        halving(monkeypatch, lambda density: 50 * density, psnr=60.0)
    with pytest.raises(paroattn.PlanError, match=r"speed-up 9 cannot be reached: at density 0.016 it is 1.98"):
        halving(monkeypatch, lambda density: 2 - density, speed_up=9.0)


def test_speed_is_measured_against_the_models_own_attention(pipe, prompts, monkeypatch):
    """With a clock that counts calls of the transformer as seconds: plans do not change their number."""
    run = CalibrationRun(pipe, prompts, (), 0, {}, progress=False)
    run.measure("grid", "grid", lambda: (), lambda *_: None)
    measured = density_search._speed(run)(tiny.make_plan(pipe, grid=run.grid))
    assert 0.02 < measured < 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_psnr": 30.0, "density": 0.5}, "density is 0.5 beside a target"),
        ({"target_psnr": 30.0, "target_speed_up": 2.0}, "either target_psnr or target_speed_up"),
        ({"target_psnr": -1.0}, "target_psnr is -1.0"),
        ({"target_speed_up": 0.5}, "target_speed_up is 0.5"),
        ({"dense_steps": 1.0}, "dense_steps is 1.0"),
        ({"dense_layers": -1}, "dense_layers is -1"),
    ],
)
def test_wrong_targets_and_guards_are_named_before_anything_runs(arguments, message):
    with pytest.raises(ValueError, match=message):
        paroattn.calibrate(object(), ["a cat"], progress=False, **arguments)


@pytest.mark.parametrize("target", [{"target_speed_up": 1.0}, {"target_psnr": 1.0}], ids=str)
def test_a_target_goes_together_with_dense_steps_and_layers(pipe, prompts, target, monkeypatch):
    monkeypatch.setattr(density_search, "_speed", lambda run: lambda plan: 2 - plan.density())
    settings = {"dense_steps": 0.25, "dense_layers": 1, "step_buckets": 3, "precision": "int8", "progress": False}
    plan = paroattn.calibrate(pipe, prompts, **target, **settings)
    assert (plan.densities()[0] == 1).all()
    assert (plan.densities()[:, 0] == 1).all()


def test_a_target_can_be_asked_for_where_text_takes_more_than_the_usual_density():
    model = tiny_models.HUNYUAN
    pipe = model.pipe()
    assert least_density(model.grid) > 0.3
    plan = paroattn.calibrate(pipe, [model.call()], target_psnr=1.0, progress=False)
    assert plan.provenance["measured PSNR"] >= 1.0


def test_dense_steps_and_layers_are_all_true_and_count(pipe, prompts):
    plan = paroattn.calibrate(
        pipe, prompts, density=0.8, precision="int8", dense_steps=0.25, dense_layers=1, step_buckets=3, progress=False
    )
    masks = unpack_bits(plan.mask_table, 4)[plan.mask_index.long()]
    assert plan.bucket_edges[1] == 0.25
    assert masks[0].all()
    assert masks[:, 0].all()
    assert not masks[1:, 1:].all()
    assert plan.density() == pytest.approx(0.8, abs=1 / 16)
    names = [[str(plan.precisions[index]) for index in layer] for layer in plan.precision_index.tolist()]
    assert names == [["exact"] * 2, ["int8"] * 2, ["int8"] * 2]
    with pytest.raises(paroattn.PlanError, match=r"dense steps and layers, text blocks .* already need 0\.\d+"):
        paroattn.calibrate(pipe, prompts, density=0.3, dense_steps=0.5, dense_layers=2, progress=False)
