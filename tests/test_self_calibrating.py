"""Applying with a density: the first request of a size is observed, later ones run with the plan that came of it."""

import copy
import threading
import warnings
from dataclasses import replace

import pytest
import tiny
import tiny_families
import tiny_models
import torch

import paroattn
from paroattn import InputError, PlanError, TokenGrid
from paroattn.calibration.capture import BlockCosts
from paroattn.calibration.observation import Observation, early_weights, head_weights
from paroattn.calibration.run import QUICK
from paroattn.calibration.self_calibrating import OBSERVED
from paroattn.integrations.apply import UNSEEN
from paroattn.integrations.observe import ObservedCall
from paroattn.integrations.pipeline import Pipeline
from paroattn.plan import Plan
from paroattn.plan_cache import PlanCache

SETTINGS = {"density": 0.75, "requests": 1, "progress": False}


@pytest.fixture
def pipe():
    return tiny.tiny_wan()


def test_the_first_request_is_the_models_own_and_the_second_runs_as_its_plan_says(pipe, tmp_path, capsys):
    own = tiny.latents(pipe)
    with paroattn.apply(pipe, density=0.75, precision="int8", requests=1, cache=tmp_path, strict=True) as handle:
        assert not handle.ready
        assert torch.equal(tiny.latents(pipe), own)
        assert handle.ready
        assert handle.report().planned == 0
        assert dict(handle.report().dense) == {OBSERVED: 2 * tiny.STEPS}
        sparse = tiny.latents(pipe)
        assert handle.report().planned == 2 * tiny.STEPS
        plan = handle.plan
    assert not torch.equal(sparse, own)
    assert plan.density() == pytest.approx(0.75, abs=1 / 32)
    assert [str(precision) for precision in plan.precisions] == ["int8"]
    assert plan.schedule == tiny.schedule_of()
    assert torch.equal(tiny.latents(pipe), own)
    with paroattn.apply(pipe, plan):
        assert torch.equal(tiny.latents(pipe), sparse)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert "plan for 6x4x5 (120 visual tokens): being made; this request runs with the model's own attention" in told[0]
    assert str(tmp_path) in told[1]


def test_later_processes_find_the_plan(pipe, tmp_path, monkeypatch):
    with paroattn.apply(pipe, cache=tmp_path, **SETTINGS):
        tiny.latents(pipe)
        expected = tiny.latents(pipe)
    monkeypatch.setattr(Observation, "add", lambda *_: pytest.fail("observed again"))
    with paroattn.apply(pipe, cache=tmp_path, strict=True, **SETTINGS) as handle:
        assert torch.equal(tiny.latents(pipe), expected)
        assert handle.ready
        assert str(tmp_path) in handle.report().plans[str(tiny.GRID)]
    monkeypatch.undo()
    with paroattn.apply(pipe, density=0.8, cache=tmp_path, progress=False) as handle:
        tiny.latents(pipe)
        assert handle.report().planned == 0  # that of another density does not serve


def test_later_requests_run_with_the_plan_and_make_it_better(pipe, tmp_path, capsys):
    settings = {**SETTINGS, "requests": 3, "progress": True}
    with paroattn.apply(pipe, cache=tmp_path, **settings) as handle:
        tiny.latents(pipe)
        first = handle.plan
        second_request = tiny.latents(pipe, seed=8)
        second = handle.plan
        assert not torch.equal(first.mask_table[first.mask_index], second.mask_table[second.mask_index])
        assert handle.report().planned == 2 * tiny.STEPS
        assert "of 2 requests" in handle.report().plans[str(tiny.GRID)]
        assert {plan for plan, _ in handle._runners} <= {second}
        tiny.latents(pipe, seed=8, steps=tiny.STEPS + 1)  # another schedule tells nothing of this one's buckets
        assert handle.plan is second
        tiny.latents(pipe, seed=9)
        third = handle.plan
        tiny.latents(pipe, seed=10)
        assert handle.plan is third
        assert third.provenance["requests"] == 3
    with paroattn.apply(pipe, first):
        assert torch.equal(tiny.latents(pipe, seed=8), second_request)
    entry = PlanCache(tmp_path).entries()
    assert len(entry) == 1
    assert Plan.load(entry[0].path).provenance["requests"] == 3
    assert [line.count("requests,") for line in capsys.readouterr().err.splitlines()] == [0, 0, 1, 1]


def test_a_later_request_that_ends_early_leaves_the_plan_as_it_is(pipe, tmp_path):
    def stop(pipe, step, *_):
        if step == 2:
            raise RuntimeError("stopped")
        return {}

    with paroattn.apply(pipe, cache=tmp_path, **{**SETTINGS, "requests": 2}) as handle:
        tiny.latents(pipe)
        plan = handle.plan
        with pytest.raises(RuntimeError, match="stopped"):
            tiny.latents(pipe, callback=stop)
        assert handle.plan is plan
        assert "ended early" not in handle.report().plans[str(tiny.GRID)]
        tiny.latents(pipe)
        assert handle.plan is not plan


def test_a_request_that_is_not_finite_makes_no_plan(pipe, tmp_path):
    with torch.no_grad(), paroattn.apply(pipe, cache=tmp_path, **SETTINGS) as handle:
        weight = pipe.transformer.blocks[1].attn1.to_v.weight
        kept = weight.clone()
        weight.fill_(torch.nan)
        try:
            tiny.latents(pipe)
        finally:
            weight.copy_(kept)
        with pytest.warns(
            UserWarning, match="no plan could be made of the first request: errors of the calibration are not finite"
        ):
            tiny.latents(pipe)
    assert not list(tmp_path.iterdir())
    assert "not made: errors of the calibration are not finite" in handle.report().plans[str(tiny.GRID)]


def test_sizes_in_turn_have_plans_of_their_own(pipe, tmp_path):
    sizes = (64, 96)
    own = {height: tiny.latents(pipe, height=height) for height in sizes}
    with paroattn.apply(pipe, cache=tmp_path, **SETTINGS) as handle:
        for height in sizes:
            assert torch.equal(tiny.latents(pipe, height=height), own[height])
        found = {}
        for height in (*sizes, *sizes):
            made = tiny.latents(pipe, height=height)
            assert not torch.equal(made, own[height])
            assert torch.equal(made, found.setdefault(height, made))
            assert handle.plan.grid.height == height // 16
        assert handle.report().planned == 4 * 2 * tiny.STEPS
        assert list(handle.report().plans) == [str(TokenGrid(6, 4, 5)), str(TokenGrid(6, 6, 5))]


@pytest.mark.parametrize("model", tiny_families.ALL, ids=lambda model: model.name)
def test_every_model_calibrates_itself(model, tmp_path):
    pipe = model.pipe()
    own = model.latents(pipe)
    with paroattn.apply(pipe, density=0.9, cache=tmp_path, progress=False) as handle, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the model's own attention")
        assert torch.equal(model.latents(pipe), own)
        assert set(handle.report().dense) == {OBSERVED}
        handle.strict = True
        assert not torch.equal(model.latents(pipe), own)
        assert handle.report().planned == sum(handle.report().dense.values())
        assert (handle.plan.grid.frames, handle.plan.grid.height) == (model.grid.frames, model.grid.height)
        assert handle.plan.density() < 0.95


@pytest.mark.parametrize("steps", [1, 2, 12])
def test_any_number_of_steps_makes_a_plan(pipe, tmp_path, steps):
    with paroattn.apply(pipe, cache=tmp_path, **SETTINGS) as handle:
        tiny.latents(pipe, steps=steps)
        assert handle.plan.buckets == min(steps, 10)
        assert tiny.latents(pipe, steps=steps + 1).isfinite().all()  # one plan serves any number of steps
        assert handle.report().planned == 2 * (steps + 1)


def test_a_request_that_ends_early_makes_no_plan(pipe, tmp_path):
    def stop(pipe, step, *_):
        if step == 2:
            raise RuntimeError("stopped")
        return {}

    def give_up(pipe, step, *_):
        pipe._interrupt = step >= 1
        return {}

    with paroattn.apply(pipe, cache=tmp_path, **SETTINGS) as handle:
        with pytest.raises(RuntimeError, match="stopped"):
            tiny.latents(pipe, callback=stop)
        assert "ended early" in handle.report().plans[str(tiny.GRID)]
        tiny.latents(pipe, callback=give_up)
        assert "ended early" in handle.report().plans[str(tiny.GRID)]
        assert not handle.ready
        tiny.latents(pipe)
        assert handle.ready


def test_a_host_that_does_not_call_the_pipeline_gets_its_plan_with_the_next_generation(pipe, tmp_path):
    generate = type(pipe).__call__
    with paroattn.apply(pipe, cache=tmp_path, **SETTINGS) as handle:
        for _ in range(2):
            generate(pipe, **tiny.call_arguments(seed=7))
        assert handle.report().planned == 2 * tiny.STEPS


def test_requests_of_other_threads_stay_dense_while_one_is_observed(pipe, tmp_path):
    beside = copy.copy(pipe)
    beside.scheduler = copy.deepcopy(pipe.scheduler)
    own = tiny.latents(pipe, height=96)
    found = []

    def generate_beside(_, step, *rest):
        if step == 1:
            thread = threading.Thread(target=lambda: found.append(tiny.latents(beside, height=96)))
            thread.start()
            thread.join()
        return {}

    with paroattn.apply(pipe, cache=tmp_path, **SETTINGS) as handle:
        with pytest.warns(UserWarning, match="another request is being observed"):
            tiny.latents(pipe, callback=generate_beside)
        assert torch.equal(found[0], own)
        assert handle.ready
        assert dict(handle.report().dense) == {
            OBSERVED: 2 * tiny.STEPS,
            "another request is being observed": 2 * tiny.STEPS,
        }


def test_compiled_code_runs_with_a_plan_that_was_found_and_says_that_it_cannot_be_observed(pipe, tmp_path):
    own = tiny.latents(pipe)
    with paroattn.apply(pipe, cache=tmp_path, **SETTINGS):
        tiny.latents(pipe)
        expected = tiny.latents(pipe)
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    with paroattn.apply(pipe, cache=tmp_path, strict=True, **SETTINGS) as handle:
        assert torch.equal(tiny.latents(pipe), expected)
        assert handle.report().planned > 0
    with paroattn.apply(pipe, cache=tmp_path / "other", **SETTINGS) as handle:
        with pytest.warns(UserWarning, match="compiled code cannot be observed"):
            made = tiny.latents(pipe)
        assert {UNSEEN} <= set(handle.report().dense)
        torch.testing.assert_close(made, own)
        assert "no attention call" in handle.report().plans[str(tiny.GRID)]


def test_a_density_that_a_size_cannot_reach_leaves_it_dense(tmp_path):
    model = next(model for model in tiny_models.MODELS if model.name == "cogvideox")
    pipe = model.pipe()
    own = model.latents(pipe)
    with paroattn.apply(pipe, density=0.2, cache=tmp_path, progress=False) as handle:
        with pytest.warns(UserWarning, match="density 0.2 cannot be reached"):
            assert torch.equal(model.latents(pipe), own)
        handle.strict = True
        with pytest.raises(PlanError, match="density 0.2 cannot be reached"):
            model.latents(pipe)


def test_a_folder_that_cannot_be_written_is_told_and_the_plan_is_used(pipe, tmp_path):
    (tmp_path / "file").write_text("")
    with paroattn.apply(pipe, cache=tmp_path / "file", **SETTINGS) as handle:
        tiny.latents(pipe)
        assert "not kept: plan cache" in handle.report().plans[str(tiny.GRID)]
        tiny.latents(pipe)
        assert handle.report().planned == 2 * tiny.STEPS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 1.5}, "density is 1.5; expected a number above 0, up to 1"),
        ({"density": 0.3, "precision": "int4"}, "precision 'int4' needs to know which heads it harms"),
        ({"density": 0.3, "precision": "int3"}, "int3"),
        ({"density": 0.3, "requests": 0}, "requests is 0; expected at least 1"),
        ({"density": 0.3, "plan": "a.safetensors"}, "apply takes either a plan or a density; got both"),
        ({}, "apply takes either a plan or a precision; got neither"),
    ],
)
def test_bad_arguments_are_refused(pipe, arguments, message):
    with pytest.raises(InputError, match=message):
        paroattn.apply(pipe, **arguments)
    assert not hasattr(type(pipe), "_paroattn_around")


def test_removing_while_a_request_is_observed_restores_the_pipeline(pipe, tmp_path):
    own = tiny.latents(pipe)

    def remove(_, step, *rest):
        if step == 1:
            handle.remove()
        return {}

    handle = paroattn.apply(pipe, cache=tmp_path, **SETTINGS)
    assert torch.equal(tiny.latents(pipe, callback=remove), own)
    assert torch.equal(tiny.latents(pipe), own)
    assert not list(tmp_path.glob("*.safetensors"))


def observed_call(layer, step, schedule, seed=0):
    grid = TokenGrid(4, 6, 8)
    generator = torch.Generator().manual_seed(100 * seed + 10 * step + layer)
    query, key, value = (torch.randn(1, grid.tokens, 2, 24, generator=generator) for _ in range(3))
    return ObservedCall(layer, step, len(schedule), schedule[step], grid, query, key, value, None, 0.2, lambda: value)


def test_buckets_before_orders_are_known_take_the_costs_of_the_next_one(pipe):
    schedule = tuple(1 - step / 10 for step in range(10))
    identity = Pipeline(pipe).identity
    observation = Observation(identity, TokenGrid(4, 6, 8), schedule, 8.0, [None, None])
    for step in range(10):
        for layer in range(2) if step < 6 else (1,):  # the first layer is called in the first six steps only
            observation.add(observed_call(layer, step, schedule))
            observation.add(observed_call(layer, step, schedule, seed=1))  # of guidance; not looked at
    assert observation._measured == {(step, 0) for step in range(1, 6)} | {(step, 1) for step in range(1, 10)}
    plan = observation.plan(0.5, paroattn.Precision.parse("exact"), torch.device("cpu"))
    costs, errors = (observation._costs.means()[name] for name in ("costs", "errors"))
    assert torch.equal(costs[:, 0], costs[:, 1])
    assert torch.equal(errors[:, 0], errors[:, 1])
    assert not torch.equal(costs[:, 1], costs[:, 2])
    assert plan.usage.tolist() == [[1.0, 1.0]] * 6 + [[0.0, 1.0]] * 4
    assert plan.density() == pytest.approx(0.5, abs=0.02)
    again = Observation(identity, TokenGrid(4, 6, 8), schedule, 8.0, [None, None])
    for step in range(10):
        for layer in range(2):
            again.add(replace(observed_call(layer, step, schedule), layer=layer))
    assert not torch.equal(again.plan(0.5, paroattn.Precision(), torch.device("cpu")).mask_table, plan.mask_table)


def test_later_requests_add_to_costs_and_bring_those_of_early_buckets(pipe):
    schedule = tuple(1 - step / 10 for step in range(10))
    observation = Observation(Pipeline(pipe).identity, TokenGrid(4, 6, 8), schedule, 8.0, [None, None])
    for seed in range(2):
        if seed:
            observation.next_request()
            assert not observation.is_of_use
        for step in range(10):
            for layer in range(2):
                observation.add(observed_call(layer, step, schedule, seed))
        assert observation.is_of_use
        observation.plan(0.5, paroattn.Precision(), torch.device("cpu"))  # gives early buckets costs of later ones
    costs, errors = (observation._costs.means()[name] for name in ("costs", "errors"))
    assert not torch.equal(costs[:, 0], costs[:, 1])

    alone = BlockCosts(10, observation._names, observation._index, TokenGrid(4, 6, 8), row_share=QUICK.cost_rows,
        error_share=QUICK.error_rows, in_bytes=True)  # fmt: skip
    for step in range(10):
        for seed in range(2) if step > 1 else (1,):
            for layer in range(2):
                alone.add(step, observed_call(layer, step, schedule, seed))
    expected_costs, expected_errors = (alone.means()[name] for name in ("costs", "errors"))
    for bucket in (0, *range(2, 10)):
        assert torch.equal(costs[:, bucket], expected_costs[:, bucket])
        assert torch.equal(errors[:, bucket], expected_errors[:, bucket])


def test_heads_weigh_as_much_as_their_layers_projection_makes_of_them():
    linear = torch.nn.Linear(96, 40)
    with torch.no_grad():
        linear.weight[:, :24] *= 5
        linear.bias += 100  # does not depend on the heads
    norms = linear.weight.detach().unflatten(1, (4, 24)).square().sum((0, 2)).double()
    found = head_weights(linear, torch.zeros(4, 24))
    assert torch.allclose(found / found.mean(), norms / norms.mean(), rtol=0.15)  # 64 random directions of 24


def test_layers_without_a_projection_weigh_as_much_as_the_others_on_average(pipe):
    schedule = tuple(1 - step / 4 for step in range(4))
    twice = torch.nn.Linear(48, 48, bias=False)
    with torch.no_grad():
        twice.weight.copy_(torch.diag(torch.tensor([1.0, 2.0]).repeat_interleave(24)))
    observation = Observation(Pipeline(pipe).identity, TokenGrid(4, 6, 8), schedule, 8.0, [twice, None])
    for step in range(4):
        for layer in range(2):
            observation.add(observed_call(layer, step, schedule))
    weights = observation.statistics().weights
    assert torch.allclose(weights[:, 0, 1], 4 * weights[:, 0, 0])
    assert torch.allclose(weights[:, 1], weights[:, 0].mean(1, keepdim=True).expand(-1, 2))
    early = early_weights(torch.tensor(schedule, dtype=torch.float64))
    assert torch.allclose(weights[:, 0, 0] / weights[-1, 0, 0], early / early[-1])


def test_projections_of_a_pipeline_weigh_its_heads(pipe, tmp_path, monkeypatch):
    matrix = pipe.transformer.blocks[1].attn1.to_out[0].weight
    with torch.no_grad():
        matrix[:, : matrix.shape[1] // 2] *= 3  # the first of two heads
    found, make = [], Observation.plan
    monkeypatch.setattr(Observation, "plan", lambda own, *given: (found.append(own), make(own, *given))[1])
    with paroattn.apply(pipe, cache=tmp_path, **SETTINGS):
        tiny.latents(pipe)
    weights = found[0].statistics().weights[-1]
    ratios = weights[:, 0] / weights[:, 1]
    assert 0.7 < ratios[0] < 1.4
    assert 6 < ratios[1] < 13


def test_early_errors_count_more():
    weights = early_weights(torch.linspace(1, 0, 11))
    assert (weights.diff() <= 0).all()
    assert float(weights[0] / weights[-1]) > 10


def test_caches_can_be_handed_over(pipe, tmp_path):
    cache = PlanCache(tmp_path, limit_gb=0)
    with paroattn.apply(pipe, cache=cache, **SETTINGS):
        tiny.latents(pipe)
    assert len(cache.entries()) == 1
