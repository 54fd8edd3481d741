"""The nodes, the plan folder, and the line that each mistake gets."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paroattn_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, comfy_entrypoint, plans
from paroattn_nodes.adapter import apply_plan
from plans_for_tests import SIGMAS, latent, plan_for

import paroattn
from paroattn import InputError, PlanError

PACK = Path(__file__).parents[1]
NODES = ("LoadParoPlan", "ApplyParoPlan", "ParoReport")


@pytest.fixture
def folder():
    import folder_paths

    folder = Path(folder_paths.models_dir) / "paroattn_plans"
    plan_for("Wan").save(folder / "wan.safetensors")
    (folder / "notes.txt").write_text("no plan")
    yield folder
    for file in folder.iterdir():
        file.unlink()


def values(output):
    return output.args


def test_both_ways_to_the_nodes():
    extension = asyncio.run(comfy_entrypoint())
    nodes = asyncio.run(extension.get_node_list())
    assert [node.define_schema().node_id for node in nodes] == list(NODES) == list(NODE_CLASS_MAPPINGS)
    assert list(NODE_CLASS_MAPPINGS.values()) == nodes
    assert NODE_DISPLAY_NAME_MAPPINGS["ApplyParoPlan"] == "Apply PARO plan"


def test_from_a_file_to_a_report(host, folder):
    load, apply, report = (NODE_CLASS_MAPPINGS[name] for name in NODES)
    assert plans.plan_names() == ["wan.safetensors"]
    plan, about = values(load.execute("wan.safetensors"))
    assert "grid: 6x6x6 (216 visual tokens)" in about
    (model,) = values(apply.execute(host.patcher("Wan"), plan, "whole", 0.0, 1.0, "dense"))
    samples = host.sample(model, latent("Wan"), SIGMAS, host.cond("Wan"))
    handed_on, text = values(report.execute(model, {"samples": samples}))
    assert handed_on["samples"] is samples
    assert text == "8 of 8 attention calls in 4 forward calls ran as planned"
    assert values(report.execute(model, {}))[1] == "nothing ran since the last report"


def test_a_replaced_file_is_read_again(folder):
    load = NODE_CLASS_MAPPINGS["LoadParoPlan"]
    before = load.fingerprint_inputs("wan.safetensors")
    os.utime(folder / "wan.safetensors", (1, 1))
    assert load.fingerprint_inputs("wan.safetensors") != before


@pytest.mark.parametrize("name", ["../wan.safetensors", "/etc/passwd", "notes.txt", "wan", "", "a/../wan.safetensors"])
def test_only_names_of_the_list_are_read(folder, name):
    plan_for("Wan").save(folder.parent / "wan.safetensors")
    with pytest.raises(InputError, match="there are wan.safetensors"):
        plans.load(name)


def test_bad_files_get_one_line(folder):
    path = folder / "wan.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(PlanError) as error:
        plans.load("wan.safetensors")
    assert "\n" not in str(error.value)


def test_a_model_without_a_plan_has_no_report(host):
    with pytest.raises(InputError, match="connect the output of 'Apply PARO plan'"):
        NODE_CLASS_MAPPINGS["ParoReport"].execute(host.patcher("Wan"), {})


@pytest.mark.parametrize(
    ("change", "arguments", "line"),
    [
        ({"family": "Flux"}, {}, "plan is for FluxTransformer2DModel, the model is a WanModel of ComfyUI; expected a "
         "plan for WanTransformer3DModel. Load that model's plan."),
        ({"heads": 4}, {}, "plan is for 4 heads, this WanModel has 2. Load a plan for this model size."),
        ({"head_dim": 64}, {}, "plan is for 64 channels per head, this WanModel has 24. Load a plan for this model "
         "size."),
        ({"times": 2}, {}, "plan has 4 layers, those of two models of 2 as of Wan 2.2; part is 'whole'. Choose 'high "
         "noise' for the model that samples first, 'low noise' for the other."),
        ({"times": 3}, {}, "plan has 6 layers; this model has 2. Load a plan for this model."),
        ({"times": 3}, {"part": "low noise"}, "plan has 6 layers, half of them for part 'low noise'; this model has 2. "
         "Load a plan for this model."),
        ({}, {"part": "high noise"}, "plan has 2 layers, half of them for part 'high noise'; this model has 2. Load a "
         "plan for this model, or choose part 'whole'."),
        ({}, {"part": "both"}, "part is 'both'; expected one of whole, high noise, low noise"),
        ({}, {"other_sizes": "guess"}, "other_sizes is 'guess'; expected one of dense, adapt, error"),
        ({}, {"start": 0.5, "end": 0.5}, "start is 0.5 and end 0.5; expected 0 <= start < end <= 1"),
        ({}, {"start": -0.1}, "start is -0.1 and end 1.0; expected 0 <= start < end <= 1"),
    ],
)  # fmt: skip
def test_each_mistake_gets_a_line(host, change, arguments, line):
    change = dict(change)
    heads = change.pop("heads", None)
    plan = plan_for(change.pop("family", "Wan"), **change)
    if heads:
        plan = _with_heads(plan, heads)
    with pytest.raises(InputError) as error:
        apply_plan(host.patcher("Wan"), plan, **arguments)
    assert str(error.value) == line


def _with_heads(plan, heads):
    from dataclasses import replace

    def more(x):
        return x.repeat_interleave(heads // plan.model.heads, -1)

    return replace(
        plan,
        model=replace(plan.model, heads=heads),
        order_index=more(plan.order_index),
        precision_index=more(plan.precision_index),
        mask_index=more(plan.mask_index),
        compensate=more(plan.compensate),
    )


def test_text_that_a_model_does_not_have(host):
    from dataclasses import replace

    plan = plan_for("HunyuanVideo")
    plan = replace(plan, model=replace(plan_for("Wan", times=2).model, head_dim=24))
    with pytest.raises(PlanError, match="plan has 12 text tokens in self-attention; a WanModel has none"):
        apply_plan(host.patcher("Wan"), plan, part="high noise")


def test_a_plan_with_references_is_refused(host):
    grid = paroattn.TokenGrid(1, 4, 4, references=((1, 2, 2),))
    plan = paroattn.Plan.default(plan_for("Wan").model, grid, 1.0)
    with pytest.raises(PlanError, match="with images to refer to; in ComfyUI they stay dense"):
        apply_plan(host.patcher("Wan"), plan)


def test_two_plans_on_a_model_are_refused(host):
    applied = apply_plan(host.patcher("Wan"), plan_for("Wan"))
    with pytest.raises(PlanError, match="model already has a plan"):
        apply_plan(applied, plan_for("Wan"))


def test_an_unknown_model_is_refused(host):
    patcher = host.patcher("Wan")

    class FutureWanModel(type(patcher.model.diffusion_model)):
        pass

    patcher.model.diffusion_model.__class__ = FutureWanModel
    with pytest.raises(InputError, match="model is a FutureWanModel; this node knows WanModel, HunyuanVideo, Flux"):
        apply_plan(patcher, plan_for("Wan"))


@pytest.mark.fake_host
def test_the_pack_needs_no_diffusers():
    """It and what it imports of paroattn run where diffusers and what the command line needs are not installed."""
    script = (
        "import sys\n"
        "for name in ('diffusers', 'transformers', 'accelerate', 'huggingface_hub', 'click', 'rich'):\n"
        "    sys.modules[name] = None\n"
        f"sys.path[:0] = [{str(PACK / 'tests')!r}, {str(PACK.parent)!r}]\n"
        "import fake_comfy, tempfile\n"
        "fake_comfy.install(tempfile.mkdtemp())\n"
        "import comfyui\n"
        "print(*comfyui.NODE_CLASS_MAPPINGS)\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == list(NODES)


def test_paroattn_imports_no_host():
    core = PACK.parents[1] / "src" / "paroattn"
    lines = [line.split() for file in core.rglob("*.py") for line in file.read_text().splitlines()]
    imported = {line[1].split(".")[0] for line in lines if len(line) > 1 and line[0] in ("import", "from")}
    assert not imported & {"comfy", "comfy_api", "folder_paths", "nodes"}


@pytest.mark.real_host
def test_comfyui_loads_the_pack(host, folder):
    import shutil
    import tempfile

    import nodes

    with tempfile.TemporaryDirectory() as custom_nodes:
        target = Path(custom_nodes) / "paroattn-nodes"
        shutil.copytree(PACK, target, ignore=shutil.ignore_patterns("tests", "__pycache__"))
        assert asyncio.run(nodes.load_custom_node(str(target)))
    for name in NODES:
        node = nodes.NODE_CLASS_MAPPINGS[name]
        inputs = node.INPUT_TYPES()
        assert node.FUNCTION
        assert inputs["required"]
    assert torch.is_tensor(latent("Wan"))
    assert nodes.NODE_DISPLAY_NAME_MAPPINGS["LoadParoPlan"] == "Load PARO plan"
