"""The shipped kernels on a real GPU, to run first on a new kind of GPU; `-n 8`, since most of the time is compiling."""

import gpu_checks
import pytest
import torch
from attention_inputs import call_of, inputs, masks, permutations

from paroattn.ops import repair
from paroattn.ops.gpu import backend, device, hopper, launch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("variant", gpu_checks.variants(), ids=str)
def test_a_variant_errs_at_most_twice_as_much_as_the_reference(variant):
    record = gpu_checks.check(variant)
    assert record["repeats"]
    assert record["error"] <= record["limit"]


@pytest.mark.parametrize("check", gpu_checks.checks(), ids=str)
def test_what_is_no_variant_stays_within_its_limit(check):
    assert check.error() <= check.limit


def test_the_kernel_for_hopper_agrees_with_tritons(monkeypatch):
    if device.target_of(torch.device("cuda")) != "sm90":
        pytest.skip("needs a GPU of sm90")
    tensors = [x.cuda().bfloat16() for x in inputs(333, heads=3, head_dim=64, batch=2)]
    call = call_of(tensors, "int8", masks(3, 333).cuda(), permutations(3, 333).cuda(), [True, False, True])
    output, lse = backend.attend(call)
    monkeypatch.setattr(hopper, "takes", lambda *_: False)
    launch.recordings.clear()
    expected, expected_lse = backend.attend(call)
    assert (output - expected).float().norm() < 2**-7 * expected.float().norm()
    assert (lse - expected_lse).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
def test_repair_agrees_with_its_definition_and_can_be_captured(head_dim, dtype):
    tensors = [torch.randn(1, 1000, 3, head_dim, device="cuda").transpose(1, 2).to(dtype) for _ in range(4)]
    output, query, key, value = tensors
    rows = {"first": 10, "count": 950}
    expected = repair.by_definition(*(x.double().clone() for x in tensors), **rows)
    found = repair.repaired(output.clone(), query, key, value, **rows)
    error = torch.linalg.norm(found.double() - expected) / torch.linalg.norm(expected)
    assert float(error) < (1e-5 if dtype == torch.float32 else 0.01)
    assert torch.equal(repair.repaired(output.clone(), query, key, value, **rows), found)
    if dtype == torch.float32 and head_dim > 128:
        return  # by PyTorch
    place, graph = output.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        repair.repaired(place, query, key, value, **rows)
    graph.replay()
    assert torch.equal(place, found)
