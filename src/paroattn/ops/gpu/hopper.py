"""The attention forward on Hopper: compiles hopper_forward.cu by NVRTC at its first use, and launches it.

Both libraries, `cuda.bindings` and NVRTC, come with PyTorch's CUDA builds. Where they are missing, and for what this
kernel does not do, forward.py computes the same.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paroattn.block_mask import BLOCK

PV_FORMATS = ("int8", "fp8")
THREADS = 128
STAGES = 2  # steps whose keys and values are in shared memory or on their way
_KEPT = "hopper_forward.cubin"
PROGRAMS = {64: 4, 128: 3}  # per multiprocessor, by head_dim; it limits the registers

_POINTERS = (
    "q records output lse heads order order_index q_factor lse_shift v_mean v_scale bias slots rows counts indices "
    "compensate mask mask_index bucket mean_records mean_v_scale mean_bias"
)
_STRIDES = "stride_ob stride_oh stride_on stride_mask"
_SIZES = "batch n_heads group tokens n_slots q_blocks parts kv_blocks mean_blocks mask_bytes head_dim"


class Arguments(ctypes.Structure):
    """`Arguments` of the kernel, in its order."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in _POINTERS.split()]
        + [(name, ctypes.c_longlong) for name in _STRIDES.split()]
        + [(name, ctypes.c_int) for name in _SIZES.split()]
    )


@functools.cache
def unavailable() -> str | None:
    """Why the kernel cannot be compiled here, or None if it can."""
    try:
        from cuda.bindings import nvrtc

        version = _checked(nvrtc.nvrtcVersion())
    except ImportError:
        return "cuda-bindings is not installed"
    except RuntimeError as error:  # the library is not found
        return str(error).partition("\n")[0]
    return None if version[0] >= 12 else f"NVRTC {version[0]}.{version[1]} is older than 12.0"


def takes(qk: str, pv: str, output: Tensor) -> bool:
    """Whether the kernel does these formats and D, and can write this output [B, H, N, D] in whole 16 bytes."""
    if output.shape[-1] > max(PROGRAMS):
        return False
    aligned = output.shape[-1] % 8 == 0 and all(stride % 8 == 0 for stride in output.stride()[:3])
    return qk == "int8" and pv in PV_FORMATS and output.dtype != torch.float32 and aligned


@dataclass(frozen=True)
class Layout:
    """Where a packed block and a program's shared memory have what, in bytes; the kernels are compiled with it.

    A record is a packed block of 64 tokens: its keys, then its values, then the scale of its keys.

    Attributes:
        columns: of the values: the channels and, for fp8 with head_dim 64, eight of ones.
        values, scale: where they start in a record; record: from one to the next, in whole cache lines.
        queries, bias, barriers: places in shared memory after the stages, of two blocks each; bias is for two blocks.
        shared: how much of it a program takes.
    """

    columns: int
    values: int
    scale: int
    record: int
    queries: int
    bias: int
    barriers: int
    shared: int


@functools.cache
def layout(width: int, pv: str) -> Layout:
    """For heads of 64 or 128 channels, "int8" or "fp8"."""
    columns = width + 8 if (pv, width) == ("fp8", 64) else width
    values = BLOCK * width
    scale = values + BLOCK * columns
    record = scale + 128
    queries = -(-STAGES * 2 * (scale + 16) // 128) * 128
    bias = queries + BLOCK * width
    barriers = bias + 4 * 2 * BLOCK
    return Layout(columns, values, scale, record, queries, bias, barriers, barriers + 8 * (STAGES + 1))


@functools.cache
def launcher(device: int, width: int, pv: str, dtype: torch.dtype, programs: int) -> Callable[[Arguments, int], None]:
    """What runs so many programs on the current device, which is `device`, on a stream."""
    from cuda.bindings import driver

    function, shared = _function(device, width, pv, dtype), layout(width, pv).shared
    shape = (programs, 1, 1, THREADS, 1, 1, shared)

    def launch(arguments: Arguments, stream: int) -> None:
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        _checked(driver.cuLaunchKernel(function, *shape, stream, ctypes.addressof(parameters), 0))

    return launch


@functools.cache
def loads(device: int, width: int, pv: str, dtype: torch.dtype) -> bool:
    """Whether the kernel compiles and loads on the current device, which is `device`; warns once if it does not."""
    try:
        _function(device, width, pv, dtype)
    except RuntimeError as error:
        warnings.warn(f"{error}; Triton's kernel takes its place", stacklevel=2)
        return False
    return True


@functools.cache
def _function(device: int, width: int, pv: str, dtype: torch.dtype) -> Any:
    """The kernel, loaded on the current device, which is `device`."""
    from cuda.bindings import driver

    module = _checked(driver.cuModuleLoadData(compiled(width, pv, dtype)))
    function = _checked(driver.cuModuleGetFunction(module, b"attention_forward"))
    attribute = driver.CUfunction_attribute
    for key, value in (
        (attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, layout(width, pv).shared),
        (attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),  # percent
    ):
        _checked(driver.cuFuncSetAttribute(function, key, value))
    return function


@functools.cache
def compiled(width: int, pv: str, dtype: torch.dtype) -> bytes:
    """The kernel's machine code for heads of 64 or 128 channels, "int8" or "fp8", and a 16-bit output.

    It is kept on disk beside Triton's kernels.
    """
    from cuda.bindings import nvrtc
    from triton.runtime.cache import get_cache_manager

    source = (files("paroattn.ops.gpu") / "hopper_forward.cu").read_bytes()
    defined = {
        "D": width,
        "PV_FP8": int(pv == "fp8"),
        "OUT_BF16": int(dtype == torch.bfloat16),
        "STAGES": STAGES,
        "PROGRAMS": PROGRAMS[width],
        **{name.upper(): value for name, value in asdict(layout(width, pv)).items()},
    }
    options = [b"-arch=sm_90a", b"-std=c++17", b"-default-device"]
    options += [f"-D{name}={value}".encode() for name, value in defined.items()]
    version = _checked(nvrtc.nvrtcVersion())
    kept = get_cache_manager(hashlib.sha256(repr((source, options, version)).encode()).hexdigest())
    path = kept.get_file(_KEPT)
    if path is not None:
        return Path(path).read_bytes()
    code = _compile(source, options)
    kept.put(code, _KEPT)
    return code


def _compile(source: bytes, options: list[bytes]) -> bytes:
    from cuda.bindings import nvrtc

    program = _checked(nvrtc.nvrtcCreateProgram(source, b"hopper_forward.cu", 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            text = log.decode().rstrip("\0\n")
            raise RuntimeError(f"hopper_forward.cu does not compile: {text}")
        code = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(code)


def _checked(answer: tuple[Any, ...]) -> Any:
    """What a function of CUDA's returns beside its status, or `RuntimeError`."""
    status, *values = answer
    if status.value:
        raise RuntimeError(f"the kernel of hopper_forward.cu: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)
