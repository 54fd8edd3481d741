"""The order of the folders: each imports only what stands before it; and what a missing part answers."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import paroattn
from paroattn.errors import MissingPartError, require

SOURCE = Path(paroattn.__file__).parent
COLUMN = """
errors files grid block_mask keep order quantize transfer mask_coding plan_file plan_header plan_summary plan_card hub
plan plan_facts balance plan_cache ops runner serving integrations calibration cli __main__
""".split()  # noqa: SIM905


def module_name(path):
    return ".".join(("paroattn", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_name(path): path for path in SOURCE.rglob("*.py")}


def imports(path):
    """Modules of the package that a file imports, at its top or within functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "paroattn":
            for item in node.names:
                inner = f"{node.module}.{item.name}"
                yield inner if inner in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (item.name for item in node.names if item.name in MODULES)


def test_a_folder_imports_only_what_stands_before_it():
    for module, path in MODULES.items():
        if module == "paroattn":
            continue
        own = COLUMN.index(module.split(".")[1])
        for name in imports(path):
            assert name != "paroattn", f"{module} imports the package from inside"
            assert COLUMN.index(name.split(".")[1]) <= own, f"{module} imports {name}"


def test_no_module_imports_itself_by_way_of_others():
    graph = {module: set(imports(path)) - {module} for module, path in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_operator_needs_torch_numpy_and_safetensors_only():
    """In a process that finds nothing else of what the extras bring."""
    code = """
import sys
absent = "diffusers transformers accelerate click rich PIL imageio packaging platformdirs matplotlib jinja2 tqdm"
absent += " torchmetrics huggingface_hub"
sys.modules.update(dict.fromkeys(absent.split()))
import torch, paroattn, paroattn.runner
q = torch.randn(1, 2, 100, 16)
assert paroattn.attention(q, q, q, precision="int8").shape == q.shape
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_does_not_wait_for_torch():
    code = "import sys, paroattn, paroattn.cli; assert not {'torch', 'numpy', 'diffusers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_part_is_answered_with_the_line_that_installs_it():
    require("paroattn[cli]", "json")
    with pytest.raises(
        MissingPartError, match=r"^no_such_module is not installed; run: pip install 'paroattn\[cli\]'$"
    ):
        require("paroattn[cli]", "json", "no_such_module")


def test_nothing_is_pickled():
    """Neither imported nor by way of torch and numpy; in the library and the lab."""
    sources = [*SOURCE.rglob("*.py"), *(SOURCE.parents[1] / "lab" / "paroattn_lab").rglob("*.py")]
    assert len(sources) > 80
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [item.name for item in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"} & {*names}, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save"), ("np", "load")}, path
