"""The Triton backend without a GPU: what it says then, and its kernels in Triton's interpreter, in another process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_inputs import call_of, inputs

import paroattn
from paroattn import Precision
from paroattn.calibration import gpu as calibration
from paroattn.ops import reference
from paroattn.ops.backend import choose_backend
from paroattn.ops.gpu import backend, configs, device
from paroattn.ops.gpu.configs import Config, Kind
from paroattn.ops.inputs import CallKind

pytestmark = pytest.mark.kernels

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
HERE = Path(__file__).parent


def test_the_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "triton_interpreted.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    answer = subprocess.run(command, cwd=HERE, capture_output=True, text=True, env=environment, check=False)
    assert answer.returncode == 0, answer.stdout[-5000:]


@without_gpu
def test_without_a_gpu_the_call_says_so_in_one_line():
    query, key, value = inputs(10)
    with pytest.raises(ValueError, match="backend 'triton' cannot do this: torch sees no GPU") as error:
        paroattn.attention(query, key, value, precision="int8", backend="triton")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="torch sees no GPU"):
        backend.attend(call_of((query, key, value), "int8"))
    with pytest.raises(ValueError, match="torch sees no GPU"):
        calibration.block_sums(query[0, 0], key[0, 0], [torch.arange(10)], 0.1)
    assert paroattn.backends()["triton"] == "torch sees no GPU"


def test_without_triton_the_package_works_and_names_what_is_missing():
    code = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import paroattn, torch
x = torch.randn(1, 1, 64, 8)
paroattn.attention(x, x, x)
print(paroattn.backends()["triton"])
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "Triton is not installed; `pip install triton` gets it"


@pytest.fixture
def gpu(monkeypatch):
    """As if an sm80 GPU were there."""
    monkeypatch.setattr(backend, "describe", lambda: "a GPU")
    monkeypatch.setattr(device, "_missing", None)
    monkeypatch.setattr(device, "target_of", lambda _: "sm80")
    monkeypatch.setattr(device, "INTERPRETED", False)
    return torch.device("cuda")


def test_auto_takes_it_for_tensors_on_a_gpu(gpu):
    precisions = [Precision.parse("int8")]
    assert choose_backend("auto", CallKind(precisions, gpu, torch.bfloat16)) is backend
    assert choose_backend("auto", CallKind(precisions, torch.device("cpu"))) is not backend


@pytest.mark.parametrize(
    ("precision", "dtype", "block_shape", "message"),
    [
        ("int8/fp8", torch.bfloat16, (64, 64), "fp8 needs one of sm89, sm90, sm100, sm120; this GPU is sm80"),
        ("exact", torch.float32, (64, 64), "it has no float32 products"),
        ("int8", torch.bfloat16, (128, 128), "block_mask has blocks of 128 x 128; it takes 64 x 64 and 128 x 64"),
        ("int4", torch.bfloat16, (64, 64), "precision 'int4' is not available in backend 'triton'"),
    ],
)
def test_what_it_does_not_do_is_named_and_auto_takes_the_reference(gpu, precision, dtype, block_shape, message):
    kind = CallKind([Precision.parse(precision)], gpu, dtype, block_shape)
    with pytest.raises(ValueError, match=message):
        choose_backend("triton", kind)
    assert choose_backend("auto", kind) is reference


def test_gpus_get_the_newest_target_of_their_generation():
    found = {(8, 0): "sm80", (8, 6): "sm86", (8, 7): "sm86", (8, 9): "sm89", (9, 0): "sm90", (10, 3): "sm100"}
    found |= {(12, 1): "sm120", (7, 5): None}
    assert {capability: device.nearest_target(*capability) for capability in found} == found


def test_configurations_can_be_replaced(monkeypatch):
    kind = Kind(64, 128, "int8", "int8")
    assert configs.config("sm90", kind) != Config(2, 1)
    monkeypatch.setitem(configs.OVERRIDES, ("sm90", kind), Config(2, 1))
    assert configs.config("sm90", kind) == Config(2, 1)
