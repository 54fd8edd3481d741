"""The example workflows: what is in the folder is what the script makes, and ComfyUI has their nodes."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from pathlib import Path

import pytest
from paroattn_nodes import NODE_CLASS_MAPPINGS

FOLDER = Path(__file__).parents[1] / "workflows"
NAMES = sorted(file.stem for file in FOLDER.glob("*.json"))
WIDGETS = ("BOOLEAN", "COMBO", "FLOAT", "INT", "STRING")


def _made():
    spec = importlib.util.spec_from_file_location("make_workflows", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["make_workflows"] = module
    spec.loader.exec_module(module)
    return module.WORKFLOWS


@pytest.mark.parametrize("name", NAMES)
def test_files_are_what_the_script_makes(name):
    workflow = _made()[name]
    assert json.loads((FOLDER / f"{name}.json").read_text()) == json.loads(json.dumps(workflow.as_json()))
    assert (FOLDER / f"{name}.svg").read_text() == workflow.as_svg()


def test_all_workflows_are_there():
    assert set(NAMES) == set(_made())


@pytest.mark.parametrize("name", NAMES)
def test_workflows_use_the_nodes_as_they_are(name):
    nodes = {node["type"]: node for node in json.loads((FOLDER / f"{name}.json").read_text())["nodes"]}
    for kind in NODE_CLASS_MAPPINGS:
        schema = NODE_CLASS_MAPPINGS[kind].define_schema()
        assert len(nodes[kind]["inputs"]) + len(nodes[kind]["widgets_values"]) == len(schema.inputs)
        assert len(nodes[kind]["outputs"]) == len(schema.outputs)


@pytest.mark.real_host
@pytest.mark.parametrize("name", NAMES)
def test_comfyui_has_the_nodes_of_the_workflows(name):
    import nodes

    extras = Path(nodes.__file__).parent / "comfy_extras"
    for file in ("nodes_flux", "nodes_hunyuan", "nodes_model_advanced", "nodes_sd3", "nodes_video"):
        assert asyncio.run(nodes.load_custom_node(str(extras / f"{file}.py"), module_parent="comfy_extras"))
    known = {**nodes.NODE_CLASS_MAPPINGS, **NODE_CLASS_MAPPINGS}
    workflow = json.loads((FOLDER / f"{name}.json").read_text())
    outputs = {}
    for node in workflow["nodes"]:
        kind = known[node["type"]]
        given = kind.INPUT_TYPES()
        inputs = {**given["required"], **given.get("optional", {})}
        for own in node["inputs"]:
            assert inputs[own["name"]][0] == own["type"]
        widgets = [key for key, own in inputs.items() if isinstance(own[0], list) or own[0] in WIDGETS]
        seeds = sum("control_after_generate" in str(inputs[key][1:]) for key in widgets)
        assert len(node["widgets_values"]) == len(widgets) + seeds
        assert [own["type"] for own in node["outputs"]] == list(kind.RETURN_TYPES)
        outputs[node["id"]] = kind.RETURN_TYPES
    for _, source, output, _, _, kind in workflow["links"]:
        assert outputs[source][output] == kind
