"""The order of the folders: each imports only what stands before it; and what a missing part answers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import paroattn
from paroattn.errors import MissingPartError, require

SOURCE = Path(paroattn.__file__).parent
COLUMN = "errors files grid block_mask order quantize plan plan_facts ops integrations calibration cli".split()  # noqa: SIM905


def test_a_folder_imports_only_what_stands_before_it():
    for path in SOURCE.rglob("*.py"):
        own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else getattr(node, "names", [])
            for name in (getattr(item, "name", item) for item in names if item):
                if str(name).split(".")[0] == "paroattn":
                    assert COLUMN.index(str(name).split(".")[1]) <= COLUMN.index(own), f"{path} imports {name}"


def test_the_operator_needs_torch_numpy_and_safetensors_only():
    """In a process that finds nothing else of what the extras bring."""
    code = """
import sys
absent = "diffusers transformers accelerate click rich PIL imageio packaging matplotlib jinja2 torchmetrics tqdm"
sys.modules.update(dict.fromkeys(absent.split()))
import torch, paroattn
q = torch.randn(1, 2, 100, 16)
assert paroattn.attention(q, q, q, precision="int8").shape == q.shape
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_part_is_answered_with_the_line_that_installs_it():
    require("paroattn[cli]", "json")
    with pytest.raises(
        MissingPartError, match=r"^no_such_module is not installed; run: pip install 'paroattn\[cli\]'$"
    ):
        require("paroattn[cli]", "json", "no_such_module")
