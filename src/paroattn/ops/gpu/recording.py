"""Launches that are written down at the first call of a kind, and made again with other tensors at the next ones.

What a call needs besides its tensors (grids, sizes, which compiled kernels, room for what is packed) is the same for
all calls of a kind. Working it out again takes the CPU longer than many GPUs take to attend.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALIGNED = 16  # bytes: Triton compiles kernels for pointers that are, and others for those that are not
_ROOM = 256  # bytes to which what is packed is aligned
_TYPES = {"i32": ctypes.c_int32, "u32": ctypes.c_uint32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


class _Launch(NamedTuple):
    """One kernel.

    Attributes:
        make: launches it on a stream.
        places: what of its arguments is set to the address of a tensor, the tensor's number, bytes from its start.
    """

    make: Callable[[int], None]
    places: list[tuple[Callable[[int], None], int, int]]


class Recording:
    """The launches of one kind of call.

    Args:
        tensors: of the call, in the order in which `replay` gets those of another call; None for what it lacks.

    A call makes its launches and its room through it. Kernels may be given the tensors themselves, parts of the room,
    and tensors that stay what they are, which it keeps.
    """

    def __init__(self, tensors: Sequence[Tensor | None]):
        self._tensors = {id(x): number for number, x in enumerate(tensors) if x is not None}
        self._room_number = len(tensors)
        self._rooms: list[tuple[Tensor, int]] = []  # and where it is in the room of another call
        self._size = 0
        self._kept: list[Any] = []
        self._launches: list[_Launch] = []
        self._lock = threading.Lock()  # arguments are filled and launched by one thread at a time

    def room(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised memory that lives as long as the call."""
        made = torch.empty(shape, dtype=dtype, device=device)
        self._rooms.append((made, self._size))
        self._size += -(-made.nbytes // _ROOM) * _ROOM
        return made

    def triton(self, kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], options: dict[str, Any]) -> None:
        """Launch a Triton kernel; options are its constants, by name, and those of the compiler."""
        compiled = kernel[grid](*arguments, **options)
        constants = [options[name] for name in kernel.arg_names[len(arguments) :]]
        values = [*arguments, *constants]
        whole_grid = (*grid, 1, 1)[:3]
        structure = None if torch.version.hip else _structure_of(compiled)
        if structure is None:
            run = compiled[whole_grid]
            self._add(lambda stream: run(*values, stream=stream), values, values.__setitem__)
            return
        taken = [number for number, kind in enumerate(compiled.src.signature.values()) if kind != "constexpr"]
        given = [values[number] for number in taken]
        filled = structure(*(x.data_ptr() if isinstance(x, Tensor) else x for x in given))
        pointers = _pointers_to(filled)
        threads = 32 * compiled.metadata.num_warps
        launch = functools.partial(
            _cuda().cuLaunchKernel, ctypes.c_void_p(compiled.function), *whole_grid, threads, 1, 1,
            compiled.metadata.shared,
        )  # fmt: skip
        self._kept += [compiled, filled]
        self._add(
            lambda stream: _check(launch(ctypes.c_void_p(stream), pointers, None)),
            given,
            lambda number, address: setattr(filled, f"_{number}", address),
        )

    def cuda(
        self, launch: Callable[[Any, int], None], structure: type[ctypes.Structure], given: dict[str, Any]
    ) -> None:
        """Launch a kernel that takes a structure, with the given fields, on a stream."""
        names = [field[0] for field in structure._fields_]
        values = [given[name] for name in names]
        filled = structure(*(x.data_ptr() if isinstance(x, Tensor) else x for x in values))
        launch(filled, torch.cuda.current_stream().cuda_stream)
        self._add(
            lambda stream: launch(filled, stream),
            values,
            lambda number, address: setattr(filled, names[number], address),
        )

    def _add(self, make: Callable[[int], None], arguments: Sequence[Any], fill: Callable[[int, int], None]) -> None:
        places: list[tuple[Callable[[int], None], int, int]] = []
        for number, x in enumerate(arguments):
            if not isinstance(x, Tensor):
                continue
            own = functools.partial(fill, number)
            if id(x) in self._tensors:
                places.append((own, self._tensors[id(x)], 0))
                continue
            for room, start in self._rooms:
                offset = x.data_ptr() - room.data_ptr()
                if 0 <= offset < max(1, room.nbytes):
                    places.append((own, self._room_number, start + offset))
                    break
            else:
                self._kept.append(x)
        self._launches.append(_Launch(make, places))

    def finish(self) -> None:
        """Forget the call's own memory."""
        self._tensors.clear()
        self._rooms.clear()

    def replay(self, tensors: Sequence[Tensor | None], device: torch.device) -> None:
        """Make the launches with another call's tensors."""
        room = torch.empty(self._size, dtype=torch.uint8, device=device)
        starts = [0 if x is None else x.data_ptr() for x in tensors]
        starts.append(room.data_ptr())
        stream = torch.cuda.current_stream(device).cuda_stream
        with self._lock:
            for make, places in self._launches:
                for fill, tensor, offset in places:
                    fill(starts[tensor] + offset)
                make(stream)


@functools.cache
def _cuda() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"a kernel was not launched: CUDA error {status}")


def _pointers_to(filled: ctypes.Structure) -> ctypes.Array[ctypes.c_void_p]:
    """The addresses of a structure's fields, as `cuLaunchKernel` takes arguments."""
    start, kind = ctypes.addressof(filled), type(filled)
    places = [start + getattr(kind, field[0]).offset for field in kind._fields_]
    return (ctypes.c_void_p * len(places))(*places)


def _structure_of(compiled: Any) -> type[ctypes.Structure] | None:
    """The arguments of a compiled Triton kernel, in fields _0, _1, ..., or None where they are not as expected.

    Triton does not document them: those of its signature that are no constants, then pointers that are null for
    kernels without scratch memory. The driver knows the sizes.
    """
    metadata = compiled.metadata
    scratch = (getattr(metadata, f"{kind}_scratch_size", 0) for kind in ("global", "profile"))
    if any(scratch) or getattr(metadata, "num_ctas", 1) != 1 or getattr(metadata, "launch_pdl", False):
        return None
    kinds = [kind for kind in compiled.src.signature.values() if kind != "constexpr"]
    types: list[Any] = [ctypes.c_void_p if kind.startswith("*") else _TYPES.get(kind) for kind in kinds]
    sizes = _argument_sizes(compiled.function)
    if None in types or sizes is None:
        return None
    types += [ctypes.c_void_p] * (len(sizes) - len(types))
    if [ctypes.sizeof(kind) for kind in types] != sizes:
        return None
    fields = [(f"_{number}", kind) for number, kind in enumerate(types)]
    return type("Arguments", (ctypes.Structure,), {"_fields_": fields})


def _argument_sizes(function: int) -> list[int] | None:
    """The bytes of each of a kernel's arguments, or None if the driver is too old to say."""
    try:
        ask = _cuda().cuFuncGetParamInfo
    except AttributeError:
        return None
    sizes: list[int] = []
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    while ask(ctypes.c_void_p(function), ctypes.c_size_t(len(sizes)), ctypes.byref(offset), ctypes.byref(size)) == 0:
        sizes.append(size.value)
    return sizes
