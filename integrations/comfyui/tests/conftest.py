"""Which ComfyUI the tests run in, and the node pack, imported as ComfyUI imports a folder of `custom_nodes`."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
PACK = HERE.parent
sys.path[:0] = [str(HERE), str(PACK.parents[1] / "tests")]

torch.set_num_threads(2)
MODELS = tempfile.mkdtemp()
if os.environ.get("COMFYUI_DIR"):
    from real_host import RealHost

    HOST = RealHost(os.environ["COMFYUI_DIR"], MODELS)
else:
    from fake_host import FakeHost

    HOST = FakeHost(MODELS)


def _import_pack():
    spec = importlib.util.spec_from_file_location(
        "paroattn_nodes", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["paroattn_nodes"] = module
    spec.loader.exec_module(module)


_import_pack()
collect_ignore = [str(PACK / "__init__.py")]


def pytest_collection_modifyitems(items):
    is_fake = HOST.name == "the stand-in"
    for item in items:
        if item.get_closest_marker("real_host") and is_fake:
            item.add_marker(pytest.mark.skip(reason="COMFYUI_DIR is not set"))
        if item.get_closest_marker("fake_host") and not is_fake:
            item.add_marker(pytest.mark.skip(reason=f"not for {HOST.name}"))


def pytest_configure(config):
    config.addinivalue_line("markers", "fake_host: only against the stand-in, which can be made to do this")
    config.addinivalue_line("markers", "real_host: only against ComfyUI in COMFYUI_DIR")


def pytest_report_header():
    return f"ComfyUI: {HOST.name}"


@pytest.fixture(scope="session")
def host():
    return HOST


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield
