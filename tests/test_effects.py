"""What errors of heads and steps do to the final result, against doing it."""

from dataclasses import replace

import pytest
import tiny
import torch

import paroattn
from paroattn import InputError
from paroattn.block_mask import block_count
from paroattn.calibration import sensitivity as effects
from paroattn.calibration.run import QUICK, THOROUGH, CalibrationRun
from paroattn.calibration.sensitivity import measure_effects
from paroattn.ops import prepare
from paroattn.plan import Plan

EDGES = (0.0, 0.5)
MANY_COTANGENTS = replace(THOROUGH, cotangents=100)


@pytest.fixture(scope="module")
def pipe():
    return tiny.tiny_wan()


@pytest.fixture(scope="module")
def draft(pipe):
    blocks = block_count(tiny.GRID.tokens, 64)
    return tiny.make_plan(pipe, torch.eye(blocks, dtype=torch.bool).expand(2, 2, 2, -1, -1), edges=EDGES)


def calibration_run(pipe, **changes):
    run = CalibrationRun(pipe, [tiny.call_arguments(**changes)], (), 7, {}, progress=False)
    run.measure("grid", "grid", lambda: (), lambda *_: None)
    return run


def with_one_head_skipped(pipe, draft, layer, head, step, seed=7):
    """Final latents with one head approximated at one step, the head's squared error there, and the model's outputs."""
    steps, found = [], {}

    def skip(call):
        if (call.layer, call.step) != (layer, step):
            return None
        output = call.dense().clone()
        how = {"device": "cpu", "dtype": call.query.dtype, "tensor_layout": "NHD", "scale": call.scale}
        bucket = torch.tensor(draft.bucket_of(call.level))
        changed = prepare(draft.layer(layer), **how)(call.query, call.key, call.value, bucket=bucket)[:, :, head]
        found["error"] = float((changed - output[:, :, head]).double().square().sum())
        output[:, :, head] = changed
        return output

    observation = paroattn.observe(pipe, skip)
    hook = pipe.transformer.register_forward_hook(lambda module, args, output: steps.append(output[0].clone()))
    try:
        arguments = {**tiny.call_arguments(), "generator": torch.Generator().manual_seed(seed)}
        return pipe(**arguments).frames, found.get("error"), steps
    finally:
        hook.remove()
        observation.remove()


def draft_errors(pipe, draft):
    """Squared error of each head's output in the middle step of each bucket."""
    found = torch.zeros(2, 2, 2, dtype=torch.float64)
    for bucket, step in enumerate((1, 3)):
        for layer in range(2):
            for head in range(2):
                found[bucket, layer, head] = with_one_head_skipped(pipe, draft, layer, head, step)[1]
    return found


def test_backward_passes_tell_what_noise_in_a_head_does_to_the_models_output(pipe, draft):
    (call,) = calibration_run(pipe).recorded().calls_of(3)
    probe = effects._HeadProbe(pipe, draft, 1, True, cotangents=50)
    sensitivity, int4 = probe.measure(call, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    noise: dict = {}

    def add_noise(call):
        output = call.dense().clone()
        if noise.get("layer") == call.layer:
            output[:, :, noise["head"]] += noise["value"]
        return output

    with torch.no_grad(), paroattn.observe(pipe, add_noise):
        plain = call()
        for layer in range(2):
            for head in range(2):
                changes = []
                for _ in range(20):
                    value = 1e-3 * torch.randn(1, tiny.GRID.tokens, 24, generator=generator)
                    noise.update(layer=layer, head=head, value=value)
                    moved = call()
                    changes.append(float((moved - plain).double().square().sum() / value.double().square().sum()))
                assert float(sensitivity[layer, head]) == pytest.approx(sum(changes) / 20, rel=0.2)
    assert (int4 > 0).all()


def test_weights_are_final_change_per_error_and_leave_the_pipeline_as_it_was(pipe, draft):
    before = tiny.latents(pipe)
    wanted = [parameter.requires_grad for parameter in pipe.transformer.parameters()]
    found = measure_effects(calibration_run(pipe), draft, draft_errors(pipe, draft), MANY_COTANGENTS)
    assert found.weights.shape == (2, 2, 2)
    assert (found.int4 == 0).all()
    assert torch.equal(tiny.latents(pipe), before)
    assert [parameter.requires_grad for parameter in pipe.transformer.parameters()] == wanted
    reference, _, _ = with_one_head_skipped(pipe, draft, None, None, None)
    for bucket, steps in enumerate(((0, 1), (2, 3))):
        measured = torch.zeros(2, 2, dtype=torch.float64)
        for layer in range(2):
            for head in range(2):
                ratios = []
                for step in steps:
                    final, error, _ = with_one_head_skipped(pipe, draft, layer, head, step)
                    ratios.append(float((final - reference).double().square().sum()) / error)
                measured[layer, head] = sum(ratios) / len(ratios)
        ratio = (found.weights[bucket] / measured).log()
        assert ratio.abs().max() < 1.4  # within a factor of four, single heads against all of them together


def test_guidance_with_two_calls_per_step_is_averaged(pipe, draft):
    errors = torch.ones(2, 2, 2, dtype=torch.float64)
    found = measure_effects(calibration_run(pipe, guidance_scale=3.0), draft, errors, THOROUGH, int4=True)
    assert found.weights.isfinite().all()
    assert (found.weights > 0).all()
    assert (found.int4 > 0).all()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_generations_take_over_the_steps_before_an_approximated_one(pipe, draft, guidance):
    run = calibration_run(pipe, guidance_scale=guidance)
    recording, computed = run.recorded(), []
    with paroattn.apply(pipe, effects._only_in(draft, 1)):
        expected = run.generate_one(0)
    assert not torch.equal(expected, recording.latents)
    with paroattn.apply(pipe, effects._only_in(draft, 1)) as handle, recording.replayed(2):
        torch.testing.assert_close(run.generate_one(0), expected, rtol=1e-4, atol=1e-4)  # whose kernel is another
        computed.append(handle.report().planned)
    passes = 1 if guidance == 1 else 2
    assert computed == [2 * passes * 2]  # layers of the last two of four steps
    assert "forward" not in vars(pipe.transformer)


def test_a_quick_measurement_agrees_with_the_thorough_one(pipe, draft):
    errors = draft_errors(pipe, draft)
    many = replace(QUICK, cotangents=100, sensitivity_steps=1, propagation_runs=2)
    quick, thorough = (
        measure_effects(calibration_run(pipe, guidance_scale=3.0), draft, errors, sampling).weights
        for sampling in (many, MANY_COTANGENTS)
    )
    assert (quick / thorough).log().abs().max() < 1.4  # the same figure within a factor of four


def test_steps_between_measured_ones_are_interpolated():
    values = torch.tensor([0.0, 4.0])
    assert [float(effects._between([2, 6], values, place)) for place in (0, 2, 3, 6, 9)] == [0, 0, 1, 4, 4]


def test_a_plan_can_be_kept_to_one_bucket(draft):
    only = effects._only_in(draft, 1)
    assert isinstance(only, Plan)
    assert only.densities()[0].min() == 1
    assert torch.equal(only.densities()[1], draft.densities()[1])


def without_numbers(monkeypatch, lost):
    """Gradients are NaN in backward passes whose number is in `lost`; returns the numbers of all that are made."""
    grad, made = torch.autograd.grad, []

    def sometimes(*args, **kwargs):
        made.append(len(made))
        return [gradient * (torch.nan if made[-1] in lost else 1) for gradient in grad(*args, **kwargs)]

    monkeypatch.setattr(torch.autograd, "grad", sometimes)
    return made


def test_gradients_that_are_not_finite_are_computed_once_more_with_other_kernels(pipe, draft, monkeypatch):
    run, errors = calibration_run(pipe), torch.ones(2, 2, 2, dtype=torch.float64)
    made = without_numbers(monkeypatch, lost={1})
    found = measure_effects(run, draft, errors, QUICK)
    assert made == [0, 1, 2]
    assert found.weights.isfinite().all()
    assert not torch.equal(found.weights[0], found.weights[1])


def test_where_gradients_are_never_finite_the_nearest_step_stands_for_them(pipe, draft, monkeypatch):
    run, errors = calibration_run(pipe), torch.ones(2, 2, 2, dtype=torch.float64)
    without_numbers(monkeypatch, lost={1, 2})
    with pytest.warns(UserWarning, match="not finite in 2 of 4 layers and steps"):
        found = measure_effects(run, draft, errors, QUICK)
    of_heads = found.weights / found.weights.sum((1, 2), keepdim=True)
    assert torch.allclose(of_heads[0], of_heads[1])
    without_numbers(monkeypatch, lost=range(10))
    with pytest.raises(
        InputError, match=r"gradients of layer 0 in torch.float32 are not finite; .* float32 or bfloat16"
    ):
        measure_effects(run, draft, errors, QUICK)


def test_latents_that_are_not_finite_are_refused(pipe, draft, monkeypatch):
    run, errors = calibration_run(pipe), torch.ones(2, 2, 2, dtype=torch.float64)
    run.recorded()
    monkeypatch.setattr(run, "generate_one", lambda prompt: torch.full_like(run.recorded().latents, torch.nan))
    with pytest.raises(InputError, match="makes latents that are not finite"):
        measure_effects(run, draft, errors, QUICK)
