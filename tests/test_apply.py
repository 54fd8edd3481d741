"""Applying plans to a pipeline: what changes, what does not, and what is refused."""

import copy
import inspect
import pickle
import threading
import warnings
from contextlib import contextmanager
from dataclasses import replace

import oracles
import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

import paroattn
from paroattn.block_mask import block_count
from paroattn.integrations.pipeline import Pipeline


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
    calibrated = torch.tensor(tiny.schedule_of())
    nearest = [int((calibrated - level).abs().argmin()) for level in tiny.schedule_of(8)]
    assert [call[0] for call in calls[16:]] == [step for step in nearest for _ in range(2)]


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


def test_a_plan_fits_subclasses_quantised_weights_and_newer_configs_but_no_other_patches():
    pipe = tiny.tiny_wan()
    plan = tiny.make_plan(pipe)
    kind = type(pipe.transformer)
    pipe.transformer.register_to_config(new_in_a_later_diffusers=True, quantization_config={"quant_type": "int8wo"})
    pipe.transformer.__class__ = type("WanTransformerOfMine", (kind,), {})
    with paroattn.apply(pipe, plan, strict=True) as handle:
        tiny.latents(pipe)
    assert handle.report().planned == 4 * 2
    pipe.transformer.register_to_config(patch_size=(1, 4, 4))
    with pytest.raises(paroattn.PlanError, match="the config differs"):
        paroattn.apply(pipe, plan)


ANOTHER_GRID = r"plan is for grid 6x4x5 \(120 visual tokens\); this request has grid 6x3x5 \(90 visual tokens\)"


def test_another_grid_is_refused_whenever_strict_with_both_grids_named(pipe):
    with paroattn.apply(pipe, tiny.make_plan(pipe), strict=True):
        for _ in range(2):
            with pytest.raises(paroattn.PlanError, match=ANOTHER_GRID):
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


def sparse_plan(pipe, **changes):
    blocks = block_count(tiny.GRID.tokens, 64)
    masks = torch.rand(4, 2, 2, blocks, blocks, generator=torch.Generator().manual_seed(5)) < 0.5
    masks |= torch.eye(blocks, dtype=torch.bool)
    return tiny.make_plan(pipe, masks, edges=(0.0, 0.25, 0.5, 0.75), **changes)


SCHEDULERS = {
    "deep-copied": copy.deepcopy,
    "from_config": lambda scheduler: type(scheduler).from_config(scheduler.config),
    "fresh": lambda scheduler: FlowMatchEulerDiscreteScheduler(shift=3.0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_step_is_that_of_the_call_whatever_happens_to_the_scheduler(name):
    pipe = tiny.tiny_wan()
    with paroattn.apply(pipe, sparse_plan(pipe), strict=True):
        expected = tiny.latents(pipe)
        pipe.scheduler = SCHEDULERS[name](pipe.scheduler)
        assert torch.equal(tiny.latents(pipe), expected)
        other = WanPipeline.from_pipe(pipe, scheduler=SCHEDULERS[name](pipe.scheduler))
        assert torch.equal(tiny.latents(other), expected)
        assert torch.equal(tiny.latents(pipe), expected)


def test_a_plan_can_be_applied_between_two_steps(pipe):
    plan, handles = sparse_plan(pipe), []

    def begin(pipe, step, timestep, kwargs):
        if step == 1:
            handles.append(paroattn.apply(pipe, plan, strict=True))
        return kwargs

    found = tiny.latents(pipe, callback=begin)
    handles[0].remove()
    assert handles[0].report().planned == 2 * 2  # layers and steps
    table = plan.mask_table.clone()
    table[plan.mask_index[:2].flatten().long()] = 3  # all blocks in the steps before
    with paroattn.apply(pipe, replace(plan, mask_table=table)):
        expected = tiny.latents(pipe)
    assert torch.linalg.norm(found - expected) < 1e-4 * torch.linalg.norm(expected)
    with paroattn.apply(pipe, plan):
        assert torch.linalg.norm(found - tiny.latents(pipe)) > 1e-3 * torch.linalg.norm(found)


def test_two_requests_in_two_threads_of_one_transformer_of_which_one_is_not_covered():
    pipe = tiny.tiny_wan()
    other = WanPipeline.from_pipe(pipe, scheduler=copy.deepcopy(pipe.scheduler))
    dense, found = tiny.latents(pipe, height=48, steps=8), {}
    with warnings.catch_warnings(), paroattn.apply(pipe, sparse_plan(pipe)) as handle:
        warnings.simplefilter("ignore")
        expected = tiny.latents(pipe, steps=8)

        def run(name, pipe, **changes):
            found[name] = [tiny.latents(pipe, steps=8, **changes) for _ in range(4)]

        threads = [threading.Thread(target=run, args=("wide", pipe))]
        threads.append(threading.Thread(target=run, args=("narrow", other), kwargs={"height": 48}))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        report = handle.report()
    assert all(torch.equal(latents, expected) for latents in found["wide"])
    assert all(torch.equal(latents, dense) for latents in found["narrow"])
    assert (report.planned, sum(report.dense.values())) == (5 * 8 * 2, 4 * 8 * 2)


def test_two_threads_of_one_compiled_transformer_are_refused():
    """Compiled code cannot tell threads apart in all versions of PyTorch."""
    pipe = tiny.tiny_wan()
    with paroattn.apply(pipe, tiny.make_plan(pipe)):
        pipe.transformer.compile(fullgraph=True, backend="eager")
        expected = tiny.latents(pipe)
        found = []

        def call_from_another_thread(*_):
            hook.remove()
            thread = threading.Thread(target=lambda: found.append(_error_of(lambda: tiny.latents(pipe))))
            thread.start()
            thread.join()

        hook = pipe.transformer.register_forward_pre_hook(torch.compiler.disable(call_from_another_thread))
        assert torch.equal(tiny.latents(pipe), expected)
    assert "two threads call one compiled transformer at once" in found[0]


@pytest.fixture
def compiles_to(monkeypatch):
    """`nn.Module.compile` with a backend that needs no compiler; the modules that were compiled."""
    compiled, compile_module = [], torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda module: compiled.append(module) or compile_module(module, fullgraph=True, backend="eager"),
    )
    torch._dynamo.reset()
    return compiled


def test_blocks_are_compiled_while_a_handle_lasts(compiles_to):
    pipe = tiny.tiny_wan()
    full, plan = tiny.latents(pipe), tiny.make_plan(pipe, precision="int8")
    with paroattn.apply(pipe, plan):
        planned = tiny.latents(pipe)
    first, second = pipe.transformer.blocks
    first.compile()
    own = first._compiled_call_impl
    with paroattn.apply(pipe, plan, compile_blocks=True) as handle:
        assert compiles_to == [first, second]
        assert oracles.relative_error(tiny.latents(pipe), planned) < 1e-5
        assert handle.report().planned > 0
        with pytest.raises(ValueError, match="already applied"):
            paroattn.apply(pipe, plan, compile_blocks=True)
    assert first._compiled_call_impl is own  # it was compiled before
    assert second._compiled_call_impl is None
    first._compiled_call_impl = None
    assert torch.equal(tiny.latents(pipe), full)


def test_what_cannot_be_compiled_in_blocks_is_refused_and_nothing_changes(compiles_to):
    pipe = tiny.tiny_wan()
    full = tiny.latents(pipe)
    with pytest.raises(ValueError, match="compile_blocks goes with a plan"):
        paroattn.apply(pipe, density=0.5, compile_blocks=True)
    pipe.transformer.compile()
    with pytest.raises(ValueError, match="this one is, as a whole"):
        paroattn.apply(pipe, tiny.make_plan(pipe), compile_blocks=True)
    pipe.transformer._compiled_call_impl = None
    assert compiles_to == [pipe.transformer]
    assert torch.equal(tiny.latents(pipe), full)


def _error_of(run):
    try:
        run()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
def test_copies_of_an_applied_pipeline_say_what_to_do(copied):
    pipe = tiny.tiny_wan()
    with paroattn.apply(pipe, tiny.make_plan(pipe)), pytest.raises(ValueError, match="call remove") as caught:
        copied(pipe.transformer)
    assert "\n" not in str(caught.value)
    assert torch.equal(tiny.latents(copy.deepcopy(pipe)), tiny.latents(pipe))


def test_another_transformer_is_noticed_at_the_next_call(full):
    pipe, other = tiny.tiny_wan(), tiny.tiny_wan()
    own = pipe.transformer
    with paroattn.apply(pipe, tiny.make_plan(pipe, precision="int4")):
        sparse = tiny.latents(pipe)
        pipe.transformer = other.transformer
        with pytest.raises(ValueError, match="transformer was replaced after paroattn was applied"):
            tiny.latents(pipe)
        pipe.transformer = own
        assert torch.equal(tiny.latents(pipe), sparse)
    assert type(pipe) is WanPipeline
    assert torch.equal(tiny.latents(pipe), full)


def test_remove_keeps_what_others_changed():
    """Attributes set on a processor while a plan is applied stay, and so do processors that were put in its place."""
    pipe = tiny.tiny_wan()
    first, second = (block.attn1 for block in pipe.transformer.blocks)
    shared = first.processor
    second.processor = shared
    replacement = copy.copy(shared)
    handle = paroattn.apply(pipe, tiny.make_plan(pipe))
    first.processor.scale = 0.5
    second.processor = replacement
    handle.remove()
    assert type(first.processor) is type(shared)
    assert first.processor.scale == 0.5
    assert not hasattr(shared, "scale")
    assert second.processor is replacement


def test_apply_changes_all_or_nothing(monkeypatch):
    pipe = tiny.tiny_wan()
    processors = dict(pipe.transformer.attn_processors)
    plan = tiny.make_plan(pipe)
    monkeypatch.setattr(Pipeline, "hook", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        paroattn.apply(pipe, plan)
    assert all(pipe.transformer.attn_processors[name] is processor for name, processor in processors.items())
    assert type(pipe) is WanPipeline


def test_the_report_counts_every_call_and_says_why(pipe):
    with warnings.catch_warnings(), paroattn.apply(pipe, tiny.make_plan(pipe)) as handle:
        warnings.simplefilter("ignore")
        tiny.latents(pipe, guidance_scale=3.0)
        tiny.latents(pipe, height=48)
    report = handle.report()
    assert report.planned == 4 * 2 * 2  # steps, guidance, layers
    ((reason, count),) = report.dense.items()
    assert count == 4 * 2
    assert "this request has grid 6x3x5" in reason
    assert str(report).splitlines()[0] == "16 of 24 attention calls ran as planned"


def test_a_path_stands_for_its_plan(pipe, tmp_path):
    sparse_plan(pipe).save(tmp_path / "plan.safetensors")
    with paroattn.apply(pipe, sparse_plan(pipe)):
        expected = tiny.latents(pipe)
    for path in (tmp_path / "plan.safetensors", str(tmp_path / "plan.safetensors")):
        with paroattn.apply(pipe, path):
            assert torch.equal(tiny.latents(pipe), expected)
    with pytest.raises(ValueError, match="plan is a dict; expected a Plan or the path of a plan file"):
        paroattn.apply(pipe, {})


def test_autocast_reaches_the_operators():
    pipe = tiny.tiny_wan()
    with torch.autocast("cpu", torch.bfloat16):
        expected = tiny.latents(pipe)
        with paroattn.apply(pipe, tiny.make_plan(pipe), strict=True) as handle:
            found = tiny.latents(pipe)
    assert handle.report().dense == {}
    assert 0 < torch.linalg.norm((found - expected).float()) < 0.05 * torch.linalg.norm(expected.float())


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, lambda: default_dtype(torch.float64)], ids=["inference", "dtype"]
)
def test_inference_mode_and_another_default_dtype_change_nothing(pipe, mode):
    plan = sparse_plan(pipe)
    with paroattn.apply(pipe, plan):
        expected = tiny.latents(pipe)
    with mode():
        handle = paroattn.apply(pipe, plan)
    inside = None
    try:
        assert torch.equal(tiny.latents(pipe), expected)
        with torch.inference_mode():
            inside = tiny.latents(pipe)
    finally:
        handle.remove()
    assert torch.equal(inside, expected)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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
