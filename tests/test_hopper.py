"""The CUDA kernel for Hopper without a GPU: what it can be given. `test_triton_kernels` has what compilers make of it.

On a GPU, tests/gpu compares it with float64; `triton_interpreted.py` has the layout it reads.
"""

import ctypes
import re
import sys
import warnings
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from paroattn.ops.gpu import backend, device, hopper

pytestmark = pytest.mark.kernels
SOURCE = Path(hopper.__file__).with_name("hopper_forward.cu")
compiles = pytest.mark.skipif(hopper.unavailable() is not None, reason=f"{hopper.unavailable()}")


@compiles
def test_what_does_not_compile_says_why(monkeypatch):
    monkeypatch.setattr(hopper, "PROGRAMS", {80: 1})
    with pytest.raises(RuntimeError, match=r"hopper_forward\.cu does not compile: .*error"):
        hopper.compiled(80, "int8", torch.bfloat16)


@compiles
def test_what_was_compiled_is_kept_on_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = hopper.compiled.__wrapped__(64, "fp8", torch.bfloat16)

    def compile_again(*_):
        raise AssertionError("it is on disk")

    monkeypatch.setattr(hopper, "_compile", compile_again)
    assert hopper.compiled.__wrapped__(64, "fp8", torch.bfloat16) == code
    with pytest.raises(AssertionError, match="on disk"):
        hopper.compiled.__wrapped__(64, "int8", torch.bfloat16)


def test_arguments_are_those_of_the_kernel():
    """The structure that Python fills has the fields of the one that the kernel reads, in its order."""
    declared = re.search(r"struct Arguments \{(.*?)\};", SOURCE.read_text(), re.S)[1]
    size = {"int": ctypes.c_int, "long long": ctypes.c_longlong}
    found = []
    for line in declared.strip().splitlines():
        kind, names = re.match(r"\s*(?:const )?(u8|int|float|long long) (.*);", line).groups()
        found += [(x.strip("* "), ctypes.c_void_p if "*" in x else size[kind]) for x in names.split(",")]
    assert found == hopper.Arguments._fields_


@compiles
@pytest.mark.parametrize("part", [field.name for field in fields(hopper.Layout)])
def test_a_layout_that_the_kernel_cannot_read_does_not_compile(monkeypatch, part):
    layout = hopper.layout(64, "fp8")
    wrong = replace(layout, **{part: getattr(layout, part) - 4})
    monkeypatch.setattr(hopper, "layout", lambda *_: wrong)
    with pytest.raises(RuntimeError, match="static assertion failed"):
        hopper.compiled.__wrapped__(64, "fp8", torch.bfloat16)


def test_it_takes_8_bits_and_an_output_in_whole_16_bytes():
    output = torch.empty(1, 2, 70, 64, dtype=torch.bfloat16)
    assert hopper.takes("int8", "int8", output)
    assert hopper.takes("int8", "fp8", output.half())
    assert hopper.takes("int8", "int8", output.transpose(1, 2).contiguous().transpose(1, 2))
    assert not hopper.takes("int8", "bf16", output)
    assert not hopper.takes("bf16", "int8", output)
    assert not hopper.takes("int8", "int8", output.float())
    assert not hopper.takes("int8", "int8", output[..., :60])
    assert hopper.takes("int8", "int8", torch.empty(1, 2, 70, 128, dtype=torch.bfloat16))
    assert not hopper.takes("int8", "int8", torch.empty(1, 2, 70, 136, dtype=torch.bfloat16))
    assert not hopper.takes("int8", "int8", torch.empty(1, 2, 70, 68, dtype=torch.bfloat16)[..., :64])


@compiles
def test_without_its_libraries_it_says_so(monkeypatch):
    from cuda.bindings import nvrtc

    def missing():
        raise RuntimeError("no libnvrtc here\nand more")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", missing)
    assert hopper.unavailable.__wrapped__() == "no libnvrtc here"
    monkeypatch.setattr(nvrtc, "nvrtcVersion", lambda: (nvrtc.nvrtcResult.NVRTC_SUCCESS, 11, 8))
    assert hopper.unavailable.__wrapped__() == "NVRTC 11.8 is older than 12.0"
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert hopper.unavailable.__wrapped__() == "cuda-bindings is not installed"


def test_a_kernel_that_does_not_load_is_named_once_and_left(monkeypatch):
    def fails(*_):
        raise RuntimeError("the kernel of hopper_forward.cu: CUDA_ERROR_NO_BINARY_FOR_GPU")

    monkeypatch.setattr(hopper, "_function", fails)
    with pytest.warns(UserWarning, match="NO_BINARY_FOR_GPU; Triton's kernel takes its place"):
        assert not hopper.loads(7, 64, "int8", torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hopper.loads(7, 64, "int8", torch.float16)
    hopper.loads.cache_clear()


def test_the_backend_says_whether_it_is_used(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(device, "target_of", lambda _: "sm90")
    monkeypatch.setattr(hopper, "unavailable", lambda: None)
    assert backend.describe().endswith("NVIDIA H100, CUDA for int8")
    monkeypatch.setattr(hopper, "unavailable", lambda: "cuda-bindings is not installed")
    assert backend.describe().endswith("without CUDA for int8 (cuda-bindings is not installed)")
    monkeypatch.setattr(device, "target_of", lambda _: "sm89")
    assert backend.describe().endswith("NVIDIA H100")
