"""The CPU backend: every kernel this machine has, against float64 and against the reference."""

import os
import subprocess
import sys
from dataclasses import replace

import oracles
import pytest
import torch
from attention_inputs import call_of, exact_attention, inputs, masks, over_nan, permutations
from suite_settings import CPU_CAPABILITIES

import paroattn
from paroattn import Precision
from paroattn.ops import cpu, reference
from paroattn.ops.backend import choose_backend
from paroattn.ops.inputs import CallKind

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not CPU_CAPABILITIES, reason="paroattn was installed without a compiler"),
]

PRECISIONS = ("exact", "bf16", "int8", "int4", "int8/exact", "exact/int8", "bf16/int4")


@pytest.fixture(params=CPU_CAPABILITIES)
def capability(request, monkeypatch):
    monkeypatch.setenv(cpu.CAPABILITY_VARIABLE, request.param)
    return request.param


def kind_of_inputs(kind, tokens, head_dim):
    query, key, value = inputs(tokens, heads=3, head_dim=head_dim, batch=2)
    position = torch.arange(tokens) / tokens
    waves = torch.stack([torch.sin(position * (6 + d)) for d in range(head_dim)], -1)
    if kind == "smooth":
        return tuple(waves + 0.1 * x for x in (query, key, value))
    if kind == "peaky":
        return 6 * query, key, value
    if kind == "offset channels":
        return query, key + 20 * (torch.arange(head_dim) % 5 == 0), value + 8 * (torch.arange(head_dim) % 3 == 0)
    if kind == "zeros":
        return 0 * query, 0 * key, 0 * value
    if kind == "one-hot":
        hot = torch.nn.functional.one_hot(torch.arange(tokens) % head_dim, head_dim).float().expand(query.shape)
        return 4 * head_dim**0.5 * hot, hot, value
    if kind == "large logits":
        return 300 * query, 300 * key, value
    if kind == "position-coded":
        return query, key, torch.arange(tokens).view(-1, 1).expand(query.shape).float()
    return query, key, value


@pytest.mark.parametrize(
    "kind",
    ["random", "smooth", "peaky", "offset channels", "zeros", "one-hot", "large logits", "position-coded"],
)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("compensate", [[False] * 3, [True, False, True]])
def test_errors_are_at_most_twice_the_references(capability, kind, precision, compensate):
    tokens = 330
    for head_dim in (40, 128, 256):
        mask, order = masks(3, tokens, seed=head_dim), permutations(3, tokens)
        tensors, key_mask = kind_of_inputs(kind, tokens, head_dim), torch.rand(2, tokens) < 0.9
        call = call_of(tensors, precision, mask, order, compensate, key_mask)
        exact, exact_lse = exact_attention(call)
        found = {"reference": reference.attend(call), "cpu": over_nan(cpu.run_kernel, call)}
        errors = {
            name: ((output - exact).norm() / (1e-30 + exact.norm()), (lse - exact_lse).norm())
            for name, (output, lse) in found.items()
        }
        floor = 1e-6
        if kind == "large logits":  # where keys nearly tie, a logit's own rounding to float32 decides between them
            spread = exact_attention(replace(call, value=call.value**2))[0] - exact.square()
            floor += (3e-7 * exact_lse.unsqueeze(-1) * spread.clamp(min=0).sqrt()).norm() / exact.norm()
        assert errors["cpu"][0] <= 2 * errors["reference"][0] + floor
        # A logit's own rounding to float32 and, with integer P, of its power of two to steps of 1/64.
        floor = 3e-7 * exact_lse.norm() + (0.003 * exact_lse.numel() ** 0.5 if "int" in precision else 0)
        assert errors["cpu"][1] <= 2 * errors["reference"][1] + floor


@pytest.mark.parametrize("number_format", ["int8", "int4"])
@pytest.mark.parametrize("capability", [name for name in CPU_CAPABILITIES if "avx512" not in name], indirect=True)
@pytest.mark.parametrize("head_dim", [32, 200])
def test_integers_are_the_references(capability, number_format, head_dim):
    """These kernels compute the exponent in float32, so only roundings at the middle of a step may fall otherwise."""
    call = call_of(inputs(200, head_dim=head_dim), number_format, masks(2, 200), compensate=[True, False], scale=0.2)
    expected, _ = reference.attend(call, cpu.P_QUANTIZATION)
    output, _ = over_nan(cpu.run_kernel, call)
    assert oracles.relative_error(output, expected) < 1e-4


@pytest.mark.parametrize("head_dim", [1, 3, 16, 63, 64, 65, 80, 127, 128, 129, 192, 256])
@pytest.mark.parametrize("tokens", [1, 17, 64, 129])
def test_any_size_fits(capability, tokens, head_dim):
    tensors = inputs(tokens, heads=4, key_heads=2, head_dim=head_dim)
    expected, expected_lse = oracles.dense_attention(*tensors)
    for precision, allowed in (("exact", 1e-6), ("bf16", 0.01), ("int8", 0.05)):
        output, lse = over_nan(cpu.run_kernel, call_of(tensors, precision))
        assert oracles.relative_error(output, expected) < allowed
        assert (lse - expected_lse).abs().max() < max(10 * allowed, 1e-5)


def test_an_empty_batch_gives_an_empty_output():
    query, key, value = (x[:0] for x in inputs(10))
    assert paroattn.attention(query, key, value, backend="cpu").shape == query.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_comes_back(capability, dtype):
    """With one token P is 1 and the output is the value: all 65,536 bit patterns through loading and storing."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(2**9, 1, 1, 128)
    value = bits.view(dtype)
    output = paroattn.attention(torch.zeros_like(value), torch.zeros_like(value), value, backend="cpu")
    finite = value.isfinite()
    flushed = finite & (value.abs() < torch.finfo(dtype).tiny) & (output == 0)
    assert torch.equal(output[finite & ~flushed], value[finite & ~flushed])
    if capability != "avx512_bf16" or dtype != torch.bfloat16:  # vdpbf16ps takes subnormal numbers for zero
        assert (value[flushed] == 0).all()
    assert not output[~finite].isfinite().any()  # not infinite either: infinity times the padding's zero is NaN


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outputs_are_rounded_to_the_nearest(capability, dtype):
    """Averages of two neighbours lie on ties and between them; torch's own conversion is the oracle."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2**15 - 2**11, (2**12, 1, 2, 64), generator=generator)
    bits[:, :, 1] = bits[:, :, 0] + torch.randint(-3, 4, bits[:, :, 0].shape, generator=generator)
    value = bits.clamp(0, 2**15 - 2**11).to(torch.int16).view(dtype)
    value = value.where(value.float().abs() < 1e4, 1.0).where(value.float().abs() > 1e-3, 1.0)
    zeros = torch.zeros_like(value)
    expected = value.float().mean(2, keepdim=True).to(dtype).expand_as(value)
    assert torch.equal(paroattn.attention(zeros, zeros, value, precision="exact", backend="cpu"), expected)


@pytest.mark.parametrize("precision", ["exact", "bf16", "int8", "int4"])
def test_threads_and_repetitions_change_no_bit(capability, precision):
    query, key, value = inputs(2500, heads=3, head_dim=48)
    mask, order = masks(3, 2500), permutations(3, 2500)
    results = []
    for threads in (1, 2, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            results.append(
                paroattn.attention(
                    query,
                    key,
                    value,
                    permutation=order,
                    block_mask=mask,
                    precision=precision,
                    compensate=[True, False, True],
                    return_lse=True,
                )
            )
        finally:
            torch.set_num_threads(before)
    for output, lse in results[1:]:
        assert torch.equal(output, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_exactly_the_kept_blocks_are_visited(capability):
    query, key, value = inputs(700, heads=2)
    mask = masks(2, 700)
    call = call_of((query, key, value), ["exact", "int8"], mask, compensate=[True, False])
    visited, seconds = cpu.run_kernel(torch.empty_like(query), torch.empty(1, 2, 700), call)
    assert visited == mask.sum()
    assert seconds > 0


@pytest.mark.parametrize("precision", ["exact", "bf16", "int8", "int4"])
@pytest.mark.parametrize("poisoned", [0, 1, 2])
@pytest.mark.parametrize("compensate", [False, True])
def test_nan_reaches_the_rows_that_read_it_and_no_other_head(capability, precision, poisoned, compensate):
    tensors = inputs(256, heads=2, head_dim=32)
    mask = torch.eye(4, dtype=torch.bool).expand(2, 4, 4)
    settings = {"block_mask": mask, "precision": precision, "compensate": compensate, "backend": "cpu"}
    clean = paroattn.attention(*tensors, **settings)
    tensors[poisoned][0, 0, 70, 3] = torch.nan
    output, lse = paroattn.attention(*tensors, **settings, return_lse=True)
    rows = slice(70, 71) if poisoned == 0 else slice(64, 128)
    assert output[0, 0, rows, 3].isnan().all()
    assert poisoned == 2 or lse[0, 0, rows].isnan().all()
    assert torch.equal(output[0, 1], clean[0, 1])
    # Integers share a scale with their block, means with the whole head; compensation reads all blocks.
    if precision in ("exact", "bf16") and not compensate:
        assert torch.equal(output[0, 0, 128:], clean[0, 0, 128:])
        assert torch.equal(output[0, 0, :64], clean[0, 0, :64])


def test_the_layouts_strides_are_read_in_place(capability):
    wide = torch.randn(2, 100, 3, 5, 48, generator=torch.Generator().manual_seed(0))  # tokens, then q k v of 5 heads
    query, key, value = wide.unbind(2)
    output = paroattn.attention(query, key, value, tensor_layout="NHD", precision="int8", backend="cpu")
    packed = [x.contiguous() for x in (query, key, value)]
    assert torch.equal(output, paroattn.attention(*packed, tensor_layout="NHD", precision="int8", backend="cpu"))
    backwards = [x.mT.contiguous().mT for x in packed]  # channels are not adjacent
    assert torch.equal(output, paroattn.attention(*backwards, tensor_layout="NHD", precision="int8", backend="cpu"))


def test_torch_accepts_the_operator(capability):
    tensors, mask, order = inputs(100, heads=2), masks(2, 100), permutations(2, 100)
    call = call_of(tensors, ["int8", "exact/bf16"], mask, order, compensate=[True, False])
    torch.library.opcheck(torch.ops.paroattn.cpu_attention, call.flat())


def test_one_graph_holds_the_call(monkeypatch):
    query, key, value = inputs(100, heads=2)
    mask, order = masks(2, 100), permutations(2, 100)

    def call(query, key, value):
        output = paroattn.attention(
            2 * query, key, value, permutation=order, block_mask=mask, precision="int8", compensate=[True, False]
        )
        return output + 1

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, key, value), call(query, key, value))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_shape": (64, 16)}, "backend 'cpu' cannot do this: block_mask has blocks of 64 x 16"),
        ({"device": torch.device("meta")}, "backend 'cpu' cannot do this: the tensors are on meta"),
    ],
)
def test_what_it_does_not_do_is_named_and_auto_takes_the_reference(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_backend("cpu", CallKind([Precision()], **arguments))
    assert choose_backend("auto", CallKind([Precision()], **arguments)) is reference
    assert choose_backend("auto", CallKind([Precision()])) is cpu


def test_indices_out_of_range_are_refused(capability):
    order = torch.arange(100).unsqueeze(0)
    order[0, 5] = 100
    for wrong in (order, -order):
        with pytest.raises(ValueError, match="permutation holds"):
            cpu.attend(call_of(inputs(100, heads=1), order=wrong))


def test_an_unknown_capability_is_named(monkeypatch):
    monkeypatch.setenv(cpu.CAPABILITY_VARIABLE, "avx9")
    with pytest.raises(ValueError, match=r"PAROATTN_CPU_CAPABILITY is 'avx9'; this CPU has baseline"):
        paroattn.attention(*inputs(10), backend="cpu")


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_without_the_compiled_part_everything_else_works():
    code = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
sys.modules["paroattn.ops._cpu"] = None  # importing it fails
import paroattn, torch
x = torch.randn(1, 1, 64, 8)
paroattn.attention(x, x, x), paroattn.attention(x, x, x)
print(paroattn.backends()["cpu"])
try:
    paroattn.attention(x, x, x, backend="cpu")
except ValueError as error:
    print(error)
"""
    finished = run_python(code)
    described, refused = finished.stdout.splitlines()
    assert "its compiled part is missing" in described
    assert refused == f"backend 'cpu' cannot do this: {described}"
    assert finished.stderr.count("backend 'auto' is 'reference'") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_memory_beyond_inputs_and_output_is_less_than_twice_the_packed_inputs():
    width = 1 if "avx512" in cpu.capability() else 4  # bytes of an integer
    code = """
import pathlib, torch
import paroattn
heads, tokens, dim = 8, 16384, 128
query, key, value = (torch.ones(1, heads, tokens, dim) for _ in range(3))
paroattn.attention(query[:, :, :64], key[:, :, :64], value[:, :, :64], precision="int8", backend="cpu")
def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
before = peak()
mask = torch.eye(tokens // 64, dtype=torch.bool).unsqueeze(0)
output = paroattn.attention(query, key, value, block_mask=mask, precision="int8", compensate=True, backend="cpu")
print((peak() - before - output.nbytes) / (3 * heads * tokens * dim))
"""
    finished = run_python(code)
    assert 0.5 * width < float(finished.stdout) < 2 * width, finished.stderr
