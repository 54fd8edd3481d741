"""Applying plans to a pipeline: what changes, what does not, and what is refused."""

import inspect
import warnings

import oracles
import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import paroattn
from paroattn.block_mask import block_count


@pytest.fixture(scope="module")
def pipe():
    return tiny.tiny_wan()


@pytest.fixture(scope="module")
def full(pipe):
    return tiny.latents(pipe)


def test_all_blocks_in_exact_precision_give_the_pipelines_own_latents(pipe, full):
    with paroattn.apply(pipe, tiny.make_plan(pipe)):
        applied = tiny.latents(pipe)
    assert torch.linalg.norm(applied - full) <= 1e-4 * torch.linalg.norm(full)
    assert not torch.equal(applied, full)  # the operator did run


def test_remove_restores_the_pipeline_bitwise(pipe, full):
    processors = dict(pipe.transformer.attn_processors)
    handle = paroattn.apply(pipe, tiny.make_plan(pipe, precision="int4"))
    assert not torch.equal(tiny.latents(pipe), full)
    handle.remove()
    handle.remove()  # a second call does nothing
    assert torch.equal(tiny.latents(pipe), full)
    assert all(pipe.transformer.attn_processors[name] is processor for name, processor in processors.items())
    assert "step" not in vars(pipe.scheduler)
    assert "set_timesteps" not in vars(pipe.scheduler)


def test_an_error_inside_with_restores_the_pipeline(pipe, full):
    with pytest.raises(KeyError), paroattn.apply(pipe, tiny.make_plan(pipe, precision="int4")):
        raise KeyError
    assert torch.equal(tiny.latents(pipe), full)


def test_each_layer_and_step_uses_its_own_orders_and_masks(pipe, monkeypatch):
    blocks, edges = block_count(tiny.GRID.tokens, 64), (0.0, 0.25, 0.5)
    masks = torch.rand(3, 2, 2, blocks, blocks, generator=torch.Generator().manual_seed(5)) < 0.5
    masks |= torch.eye(blocks, dtype=torch.bool)
    plan = tiny.make_plan(pipe, masks, edges=edges)
    calls = tiny.record_calls(monkeypatch)
    with paroattn.apply(pipe, plan):
        tiny.latents(pipe)
    assert [call[0] for call in calls] == [0, 0, 1, 1, 2, 2, 2, 2]  # 4 steps of 2 layers
    for number, (bucket, (query, key, value), output, *_) in enumerate(calls):
        layer = number % 2
        permutation = plan.layer(layer).permutation
        expected = oracles.masked_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), masks[bucket, layer], permutation
        )
        error = torch.linalg.norm(output.transpose(1, 2) - expected) / torch.linalg.norm(expected)
        assert error < 1e-6


def test_guidance_does_not_advance_the_step(pipe, monkeypatch):
    calls = tiny.record_calls(monkeypatch)
    with paroattn.apply(pipe, tiny.make_plan(pipe, edges=(0.0, 0.25, 0.5, 0.75))):
        tiny.latents(pipe, guidance_scale=3.0)
        tiny.latents(pipe, steps=8)
    assert [call[0] for call in calls[:16]] == [step for step in range(4) for _ in range(4)]
    assert [call[0] for call in calls[16:]] == [step // 2 for step in range(8) for _ in range(2)]


def test_precision_without_a_plan_is_dense_and_quantised(pipe, full):
    with paroattn.apply(pipe, precision="int8"):
        applied = tiny.latents(pipe)
    error = torch.linalg.norm(applied - full) / torch.linalg.norm(full)
    assert 1e-5 < error < 0.05


def test_signatures_that_diffusers_inspects_stay(pipe):
    before = inspect.signature(pipe.transformer.blocks[0].attn1.processor.__call__).parameters.keys()
    scheduler_before = [inspect.signature(f) for f in (pipe.scheduler.step, pipe.scheduler.set_timesteps)]
    with paroattn.apply(pipe, tiny.make_plan(pipe)):
        assert inspect.signature(pipe.transformer.blocks[0].attn1.processor.__call__).parameters.keys() == before
        after = [inspect.signature(f) for f in (pipe.scheduler.step, pipe.scheduler.set_timesteps)]
    assert after == scheduler_before


def test_fused_projections_and_backend_choice_go_together_with_a_plan(full):
    pipe = tiny.tiny_wan()
    for block in pipe.transformer.blocks:
        block.attn1.fuse_projections()
    with paroattn.apply(pipe, tiny.make_plan(pipe)):
        pipe.transformer.set_attention_backend("native")
        applied = tiny.latents(pipe)
    assert 0 < torch.linalg.norm(applied - full) <= 1e-4 * torch.linalg.norm(full)


def test_cross_attention_is_left_alone(pipe):
    cross = [block.attn2.processor for block in pipe.transformer.blocks]
    with paroattn.apply(pipe, tiny.make_plan(pipe)):
        assert [block.attn2.processor for block in pipe.transformer.blocks] == cross


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_name": "OtherTransformer"}, "class is OtherTransformer, this model's is WanTransformer3DModel"),
        ({"config_hash": "0" * 64}, "the config differs"),
        ({"head_dim": 64}, "head_dim is 64, this model's is 24"),
    ],
)
def test_plan_of_another_model_is_refused(pipe, changes, message):
    with pytest.raises(paroattn.PlanError, match=message):
        paroattn.apply(pipe, tiny.make_plan(pipe, **changes))


def test_plan_of_another_number_of_heads_or_layers_is_refused(pipe):
    with pytest.raises(paroattn.PlanError, match="number of heads is 3, this model's is 2"):
        paroattn.apply(pipe, tiny.make_plan(tiny.tiny_wan(heads=3)))
    with pytest.raises(paroattn.PlanError, match="number of layers is 3, this model's is 2"):
        paroattn.apply(pipe, tiny.make_plan(tiny.tiny_wan(layers=3)))


ANOTHER_GRID = r"plan is for grid 6x4x5 \(120 visual tokens\); this request has grid 6x3x5 \(90 visual tokens\)"


def test_another_grid_is_refused_when_strict_with_both_grids_named(pipe):
    with (
        paroattn.apply(pipe, tiny.make_plan(pipe), strict=True),
        pytest.raises(paroattn.PlanError, match=ANOTHER_GRID),
    ):
        tiny.latents(pipe, height=48)


def test_another_grid_runs_dense_after_one_warning_and_the_planned_one_is_sparse_again(pipe):
    dense = tiny.latents(pipe, height=48)
    plan = tiny.make_plan(pipe, precision="int4")
    with paroattn.apply(pipe, plan) as handle:
        sparse = tiny.latents(pipe)
        with pytest.warns(UserWarning, match=ANOTHER_GRID):
            assert torch.equal(tiny.latents(pipe, height=48), dense)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(tiny.latents(pipe, height=48), dense)
        assert torch.equal(tiny.latents(pipe), sparse)
    assert handle.plan is plan


def test_applying_twice_is_refused(pipe, full):
    with paroattn.apply(pipe, tiny.make_plan(pipe)), pytest.raises(ValueError, match="already applied"):
        paroattn.apply(pipe, precision="int8")
    assert torch.equal(tiny.latents(pipe), full)


def test_a_scheduler_replaced_afterwards_is_refused():
    pipe = tiny.tiny_wan()
    with paroattn.apply(pipe, tiny.make_plan(pipe)):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler()
        with pytest.raises(ValueError, match="scheduler was replaced"):
            tiny.latents(pipe)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a plan or a precision; got neither"),
        ({"precision": "int7"}, "int7"),
        ({"precision": "int8", "backend": "cuda"}, "'cuda' is unknown; expected 'auto' or one of 'triton', 'cpu', "),
        ({"precision": "fp8"}, "cannot do this: query and key are multiplied"),
    ],
)
def test_bad_arguments_leave_the_pipeline_alone(pipe, full, arguments, message):
    with pytest.raises(ValueError, match=message):
        paroattn.apply(pipe, **arguments)
    assert torch.equal(tiny.latents(pipe), full)


def test_what_is_no_supported_pipeline_is_refused(pipe):
    with pytest.raises(ValueError, match="expected a diffusers pipeline"):
        paroattn.apply(pipe.transformer, precision="int8")
    other = tiny.tiny_wan()
    other.transformer = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="transformer is a Linear; paroattn knows WanTransformer3DModel"):
        paroattn.apply(other, precision="int8")
