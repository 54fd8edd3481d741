"""Every model class that paroattn knows, as a tiny pipeline: taken over, calibrated, compiled, and given back."""

import contextlib
import functools
import importlib
import inspect
import pkgutil
import re
import warnings
from dataclasses import replace
from pathlib import Path

import oracles
import pytest
import tiny
import tiny_models
import torch
from tiny_families import ALL, FAMILIES
from tiny_models import MODELS
from torch.utils._python_dispatch import TorchDispatchMode

import paroattn
from paroattn.block_mask import block_count, text_blocks, unpack_bits
from paroattn.calibration.calibrate import collect_costs
from paroattn.integrations.attach import Attachment
from paroattn.integrations.descriptors import DESCRIPTORS, ModelDescriptor, attention_modules, known_class
from paroattn.integrations.pipeline import Pipeline
from paroattn.order import token_order


def each_model(models=ALL):
    return pytest.mark.parametrize("model", models, ids=lambda model: model.name)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Aa]utocast.*")
        yield


def relative_error(latents, expected):
    return float(torch.linalg.norm(latents - expected) / torch.linalg.norm(expected))


def half_of_the_blocks(model, pipe, buckets=1):
    """Random masks that keep the diagonal and what touches text, with `edges` to go with them."""
    identity, blocks = Pipeline(pipe).identity, block_count(model.grid.tokens, 64)
    generator = torch.Generator().manual_seed(5)
    masks = torch.rand(buckets, identity.layers, identity.heads, blocks, blocks, generator=generator) < 0.3
    masks |= torch.eye(blocks, dtype=torch.bool) | text_blocks(model.grid)
    return masks


@each_model()
def test_taking_over_changes_nothing_and_sees_every_layer_and_the_grid(model):
    pipe = model.pipe()
    full, grids, layers = model.latents(pipe), [], set()
    modules = [module for transformer in Pipeline(pipe).transformers for module in attention_modules(transformer)]
    processors = [module.processor for module in modules]

    def own_attention(layer):
        def attend(call):
            layers.add(layer)
            return call.dense()

        return attend

    attachment = Attachment(
        pipe,
        [own_attention(layer) for layer in range(Pipeline(pipe).identity.layers)],
        lambda forward: grids.append(forward.grid),
    )
    assert torch.equal(model.latents(pipe), full)
    attachment.remove()
    assert torch.equal(model.latents(pipe), full)
    assert grids[0] == model.grid
    assert layers == set(range(model.layers))
    assert all(module.processor is before for module, before in zip(modules, processors, strict=True))


class _Reads(TorchDispatchMode):
    """Counts what a GPU would be waited for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "_unique2", "equal")
        return function(*args, **(kwargs or {}))


@each_model()
def test_the_grid_is_read_from_tensors_in_the_first_step_only(model, monkeypatch):
    reads, grid = [], ModelDescriptor.grid

    def counted(*given):
        with _Reads() as mode:
            found = grid(*given)
        reads.append(mode.count)
        return found

    monkeypatch.setattr(ModelDescriptor, "grid", counted)
    pipe = model.pipe()
    with paroattn.apply(pipe, precision="exact"):
        model.latents(pipe, steps=4)
    assert len(reads) > 2
    assert sum(map(bool, reads)) <= 2  # with and without the prompt, where a pipeline guides


@each_model()
def test_all_blocks_in_any_order_give_the_models_own_latents(model):
    pipe = model.pipe()
    full = model.latents(pipe)
    with paroattn.apply(pipe, tiny.make_plan(pipe, grid=model.grid), strict=True):
        applied = model.latents(pipe)
    assert 0 < relative_error(applied, full) <= 1e-4
    assert torch.equal(model.latents(pipe), full)


@each_model()
def test_every_call_attends_as_its_layers_masks_and_orders_say(model, monkeypatch):
    """Against float64, with as many text tokens as each call has, padding hidden."""
    pipe = model.pipe()
    masks = half_of_the_blocks(model, pipe)
    plan = tiny.make_plan(pipe, masks, grid=model.grid)
    calls = tiny.record_calls(monkeypatch)
    with paroattn.apply(pipe, plan, strict=True) as handle:
        sparse = model.latents(pipe)
    layer_of = {id(layer.runner._operator): number for number, layer in enumerate(handle._layers)}
    assert relative_error(sparse, model.latents(pipe)) > 1e-3
    visual = model.grid.visual_tokens // 64
    orders, seen = [plan.order_names[index] for index in plan.order_index.flatten().tolist()], set()
    for _, (query, key, value), output, op, key_mask in calls:
        layer = layer_of[id(op)]
        text = query.shape[1] - model.grid.visual_tokens
        seen.add(text)
        grid = replace(model.grid, text_tokens=text)
        blocks = block_count(grid.tokens, 64)
        expected_mask = torch.ones(2, blocks, blocks, dtype=torch.bool)
        region = slice(visual if text or model.grid.text_tokens else blocks)
        expected_mask[:, region, region] = masks[0, layer][:, region, region]
        permutation = torch.stack([token_order(name, grid) for name in orders[2 * layer : 2 * layer + 2]])
        expected, _ = oracles.sparse_attention(
            *(x.transpose(1, 2) for x in (query, key, value)), expected_mask, permutation, key_mask=key_mask
        )
        assert oracles.relative_error(output.transpose(1, 2), expected) < 1e-5
    assert model.grid.text_tokens in seen or model is tiny_models.MOCHI  # which trims its padding


@each_model()
def test_calibration_gives_a_plan_of_the_density_that_keeps_text_dense(model):
    pipe = model.pipe()
    full = model.latents(pipe)
    plan = paroattn.calibrate(pipe, [model.call()], density=0.85, precision="int8", progress=False)
    assert plan.grid == model.grid
    blocks = block_count(model.grid.tokens, 64)
    assert plan.density() == pytest.approx(0.85, abs=1 / blocks**2)  # to a block
    masks = unpack_bits(plan.mask_table, blocks)
    assert masks[:, text_blocks(model.grid)].all()
    assert not masks.all()
    assert torch.equal(model.latents(pipe), full)  # nothing stays behind
    with paroattn.apply(pipe, plan, strict=True):
        assert 1e-5 < relative_error(model.latents(pipe), full) < 0.5
    paper = paroattn.calibrate_paper(pipe, [model.call()], density=0.85, progress=False)
    assert paper.density() == pytest.approx(0.85, abs=1 / blocks**2)


def test_of_two_transformers_each_has_its_own_steps(monkeypatch):
    model = tiny_models.WAN22
    pipe = model.pipe()
    plan = paroattn.calibrate(pipe, [model.call(steps=6)], density=0.8, progress=False)
    called = {0: plan.usage[:, :2], 1: plan.usage[:, 2:]}
    assert set(plan.usage.unique().tolist()) == {0.0, 1.0}  # a bucket begins where the second takes over
    assert torch.equal(called[0] + called[1], torch.ones_like(called[0]))
    densities = plan.densities()
    first, second = ((own > 0).all(1).nonzero().flatten() for own in called.values())
    assert (plan.mask_index[second, :2] == plan.mask_index[first[-1], :2]).all()  # where a layer is not called it has
    assert (plan.mask_index[first, 2:] == plan.mask_index[second[0], 2:]).all()  # the masks of the nearest bucket
    lengths = torch.tensor([*plan.bucket_edges, 1.0], dtype=torch.float64).diff()
    weights = lengths.view(-1, 1, 1) * plan.usage.unsqueeze(-1).expand(densities.shape)
    assert plan.density() == pytest.approx(float((densities * weights).sum() / weights.sum()))
    calls = tiny.record_calls(monkeypatch)
    with paroattn.apply(pipe, plan, strict=True):
        model.latents(pipe, steps=6)
    assert {call[0] for call in calls} == set(range(plan.buckets))
    assert len({id(call[3]) for call in calls}) == 4

    # Another boundary than the calibrated one is covered, too.
    pipe.register_to_config(boundary_ratio=0.5)
    calls.clear()
    full = model.latents(pipe, steps=6)
    with paroattn.apply(pipe, plan, strict=True) as handle:
        assert relative_error(model.latents(pipe, steps=6), full) > 1e-5
    assert handle.report().dense == {}


def test_effects_of_two_transformers_are_measured_in_the_steps_of_each():
    model = tiny_models.WAN22
    quick, thorough = (
        collect_costs(model.pipe(), [model.call(steps=6)], densities=(0.8,), thorough=how, progress=False)
        for how in (False, True)
    )
    for costs in (quick, thorough):
        called = (costs.usage > 0).unsqueeze(-1).expand_as(costs.weights)
        assert (costs.weights[called] > 0).all()
        assert (costs.weights[~called] == 0).all()
    ratio = (quick.weights / thorough.weights)[called].log()
    assert (ratio - ratio.mean()).abs().max() < 2.5  # few cotangents and interpolated, but nothing is starved


def test_a_transformer_that_was_never_calibrated_stays_dense_and_says_so():
    model = tiny_models.WAN22
    pipe = model.pipe()
    pipe.register_to_config(boundary_ratio=0.0)  # the first takes all steps
    plan = paroattn.calibrate(pipe, [model.call()], density=0.8, progress=False)
    assert not plan.usage[:, 2:].any()
    pipe.register_to_config(boundary_ratio=0.8)
    with pytest.warns(UserWarning, match="never called this layer"), paroattn.apply(pipe, plan) as handle:
        model.latents(pipe)
    (reason,) = handle.report().dense
    assert "never called this layer" in reason
    with pytest.raises(paroattn.PlanError, match="never called this layer"), paroattn.apply(pipe, plan, strict=True):
        model.latents(pipe)


REPEATED = {
    "cogvideox": "CogVideoXBlock",
    "mochi": "MochiTransformerBlock",
    "sd3": "JointTransformerBlock",
    "framepack": "HunyuanVideoSingleTransformerBlock",
    "omnigen": "OmniGenBlock",
    "hidream": "HiDreamAttention",  # experts break the graph of a block
    "lumina2": "Lumina2TransformerBlock",
}


def compiled_graphs(model, how, applied):
    """How many graphs a model compiles to, and its latents; a second generation must not add any."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    pipe, counter = model.pipe(), CompileCounter()
    schedule = model.schedule(pipe)
    plan = tiny.make_plan(
        pipe, half_of_the_blocks(model, pipe, 2), grid=model.grid, edges=(0.0, 0.5), schedule=schedule
    )
    for name in ("transformer", "transformer_2"):
        transformer = getattr(pipe, name, None)
        if transformer is None:
            continue
        if how == "whole":
            setattr(pipe, name, torch.compile(transformer, fullgraph=True, backend=counter))
        elif how == "in place":
            transformer.compile(fullgraph=True, backend=counter)
        else:
            if not transformer._repeated_blocks:
                transformer._repeated_blocks = [REPEATED[model.name]]
            transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    with paroattn.apply(pipe, plan, strict=True) if applied else contextlib.nullcontext():
        latents = model.latents(pipe)
        graphs = counter.frame_count
        assert torch.equal(model.latents(pipe), latents)
        assert counter.frame_count == graphs
    return graphs, latents, plan


@functools.cache
def own_graphs(model, in_blocks):
    """How many graphs the unmodified model compiles to: as many as a whole as in place."""
    return compiled_graphs(model, "blocks" if in_blocks else "in place", applied=False)[0]


def _ways_to_compile():
    """Three for each model; one for a family, as a whole where the model itself can be."""
    for model in MODELS:
        yield from (pytest.param(model, how, id=f"{model.name}-{how}") for how in ("whole", "in place", "blocks"))
    for model in FAMILIES:
        how = "in place" if model.whole_graph else "blocks"
        yield pytest.param(model, how, id=f"{model.name}-{how}", marks=pytest.mark.family)


@pytest.mark.parametrize(("model", "how"), _ways_to_compile())
def test_compiled_without_breaks_and_with_no_more_graphs_than_the_model_itself(model, how):
    if model.whole_graph is False:
        with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError)):
            own_graphs(model, in_blocks=False)
    graphs, latents, plan = compiled_graphs(model, how, applied=True)
    pipe = model.pipe()
    with paroattn.apply(pipe, plan, strict=True):
        assert relative_error(latents, model.latents(pipe)) < 1e-5
    # Two numbers of text tokens: made dynamic.
    extra = 1 if model.name in ("qwen", "lumina2") and how != "blocks" else 0
    assert graphs <= own_graphs(model, how == "blocks") + extra


@pytest.mark.family
def test_every_descriptor_names_a_class_of_diffusers_and_is_tested():
    import diffusers

    tested = {known_class(model.pipe().transformer) for model in (*MODELS, *FAMILIES)}
    assert tested | {"WanVACETransformer3DModel"} == set(DESCRIPTORS)  # which test_requests.py tests
    for name in DESCRIPTORS:
        assert hasattr(diffusers, name)


@pytest.mark.family
def test_every_transformer_class_of_diffusers_is_known_or_left_out_with_a_reason():
    from diffusers.models import ModelMixin, transformers

    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.iter_modules(transformers.__path__, f"{transformers.__name__}.")
    ]
    classes = {
        name
        for module in modules
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and issubclass(kind, ModelMixin) and kind.__module__ == module.__name__
    }
    docs = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    known, left_out = docs.split("### Classes that are left out")
    left_out = set(re.findall(r"`(\w+)`", left_out.split("\n## ")[0]))
    assert classes == set(DESCRIPTORS) | left_out
    assert set(DESCRIPTORS) <= set(re.findall(r"`(\w+)`", known))


def test_a_subclass_is_taken_as_the_class_that_it_inherits_from():
    class FineTune(type(tiny.tiny_wan().transformer)):
        pass

    pipe, own = tiny.tiny_wan(), tiny.tiny_wan()
    pipe.transformer.__class__ = FineTune
    plan = tiny.make_plan(own, precision="int4")
    with paroattn.apply(pipe, plan, strict=True), paroattn.apply(own, plan, strict=True):
        assert torch.equal(tiny.latents(pipe), tiny.latents(own))


def test_a_subclass_with_other_attention_is_refused_in_one_line_that_says_what_differs():
    class Renamed(type(tiny.tiny_wan().transformer)):
        pass

    class Bare(torch.nn.Module):
        pass

    renamed, bare, odd = tiny.tiny_wan(), tiny.tiny_wan(), tiny.tiny_wan()
    for pipe in (renamed, bare, odd):
        pipe.transformer.__class__ = Renamed
    for block in renamed.transformer.blocks:
        block.attention = block._modules.pop("attn1")
    bare.transformer.blocks[1].attn1 = Bare()
    odd.transformer.blocks[1].attn1.processor = Bare()
    like = "Renamed is not like WanTransformer3DModel: "
    for pipe, reason in (
        (renamed, like + r"it has no attention modules named blocks"),
        (bare, like + r"its blocks\.1\.attn1 is a Bare without a processor"),
        (odd, "attention processor Bare cannot be taken over"),
    ):
        with pytest.raises(paroattn.InputError, match=reason) as raised:
            paroattn.apply(pipe, precision="int8")
        assert "\n" not in str(raised.value)
