"""Launches that are written down and made again, with kernels that run on the CPU."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from paroattn.ops.gpu import recording
from paroattn.ops.gpu.recording import Recording


def values_at(pointer, count):
    return list((ctypes.c_float * count).from_address(pointer))


def address(x):
    return x.data_ptr() if isinstance(x, torch.Tensor) else x


class Added:
    """In place of a Triton kernel: `target[i] = source[i] + plus[i] * FACTOR`, by addresses."""

    arg_names = ("target", "source", "plus", "count", "FACTOR")
    src = SimpleNamespace(
        signature={"target": "*fp32", "source": "*fp32", "plus": "*fp32", "count": "i32", "FACTOR": "constexpr"}
    )
    function = 5

    def __init__(self, clusters=1):
        self.grids = []
        self.metadata = SimpleNamespace(num_ctas=clusters, num_warps=4, shared=1024)

    def __getitem__(self, grid):
        def run(target, source, plus, count, *constants, stream=None, **options):
            self.grids.append(grid)
            (factor,) = constants or (options["FACTOR"],)
            found = zip(values_at(address(source), count), values_at(address(plus), count), strict=True)
            place = (ctypes.c_float * count).from_address(address(target))
            place[:] = [a + b * factor for a, b in found]
            return self

        return run


class Structure(ctypes.Structure):
    _fields_ = (
        ("target", ctypes.c_void_p),
        ("source", ctypes.c_void_p),
        ("missing", ctypes.c_void_p),
        ("count", ctypes.c_int),
    )


def doubled(structure, stream):
    assert structure.missing is None
    place = (ctypes.c_float * structure.count).from_address(structure.target)
    place[:] = [2 * x for x in values_at(structure.source, structure.count)]


def call(made, source, output, constant, kernel):
    """Fill output with 2 (source + 3 constant), by way of the second half of a room."""
    room = made.room((8,), torch.float32, torch.device("cpu"))
    made.triton(kernel, (1,), (room[4:], source, constant, 4), {"FACTOR": 3, "num_warps": 4})
    given = {"target": output, "source": room[4:], "missing": None, "count": 4}
    made.cuda(doubled, Structure, given)


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    """What was launched through the driver; kernels have a pointer more than their arguments."""
    launched = []

    def launch(function, *shape_stream_pointers):
        *shape, stream, pointers, extra = shape_stream_pointers
        launched.append((function.value, *shape, stream.value, extra))
        target, source, plus = (ctypes.c_void_p.from_address(place).value for place in pointers[:3])
        count = ctypes.c_int.from_address(pointers[3]).value
        assert ctypes.c_void_p.from_address(pointers[4]).value is None
        Added()[1,](target, source, plus, count, FACTOR=3)
        return 0

    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(recording, "_cuda", lambda: SimpleNamespace(cuLaunchKernel=launch))
    monkeypatch.setattr(recording, "_argument_sizes", lambda _: [8, 8, 8, 4, 8])
    return launched


@pytest.mark.parametrize("by_driver", [True, False])
def test_a_replay_reads_and_writes_other_tensors(driver, by_driver):
    source, output, kernel = torch.arange(4.0), torch.empty(4), Added(1 if by_driver else 2)
    made = Recording((source, None, output))
    call(made, source, output, torch.ones(4), kernel)  # nobody else keeps the constant
    assert output.tolist() == [6, 8, 10, 12]
    made.finish()

    other, found = torch.full((4,), 10.0), torch.empty(4)
    made.replay((other, None, found), torch.device("cpu"))
    assert found.tolist() == [26] * 4
    assert output.tolist() == [6, 8, 10, 12]
    assert kernel.grids == ([(1,)] if by_driver else [(1,), (1, 1, 1)])
    assert driver == ([(5, 1, 1, 1, 128, 1, 1, 1024, 7, None)] if by_driver else [])


def test_tensors_that_are_the_same_in_one_call_may_differ_in_the_next():
    both, output = torch.ones(4), torch.empty(4)
    source, constant = both.detach(), both.detach()  # two objects, one place in memory
    made = Recording((source, constant, output))
    call(made, source, output, constant, Added())
    made.finish()
    made.replay((torch.zeros(4), torch.full((4,), 2.0), output), torch.device("cpu"))
    assert output.tolist() == [12] * 4


@pytest.mark.parametrize("sizes", [[8, 8, 8, 8, 8], [8, 8, 8], [8, 8, 8, 4, 4], None])
def test_arguments_that_the_driver_has_otherwise_go_through_triton(monkeypatch, driver, sizes):
    monkeypatch.setattr(recording, "_argument_sizes", lambda _: sizes)
    source, output, kernel = torch.arange(4.0), torch.empty(4), Added()
    made = Recording((source, output))
    call(made, source, output, torch.ones(4), kernel)
    made.finish()
    made.replay((source, output), torch.device("cpu"))
    assert kernel.grids == [(1,), (1, 1, 1)]
    assert not driver


def test_a_launch_that_fails_is_an_error(monkeypatch):
    monkeypatch.setattr(recording, "_cuda", lambda: SimpleNamespace(cuLaunchKernel=lambda *_: 700))
    source, output = torch.arange(4.0), torch.empty(4)
    made = Recording((source, output))
    call(made, source, output, torch.ones(4), Added())
    with pytest.raises(RuntimeError, match="CUDA error 700"):
        made.replay((source, output), torch.device("cpu"))
