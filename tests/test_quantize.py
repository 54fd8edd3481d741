"""Quantisation: scales of groups, channels and blocks, rounding, and the names of precisions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paroattn import Precision
from paroattn.quantize import PQuantization, quantize_channels, quantize_probabilities, quantize_tokens, round_to

STEPS = {"int8": 127, "int4": 7}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 200), st.integers(1, 9), st.sampled_from(("int8", "int4")), st.integers(0, 99))
def test_tokens_get_one_scale_per_group_of_64_and_err_by_at_most_half_a_step(tokens, dim, number_format, seed):
    x = random(2, tokens, dim, seed=seed)
    quantized = quantize_tokens(x, number_format)
    for batch in range(2):
        for start in range(0, tokens, 64):
            group = slice(start, start + 64)
            scale = x[batch, group].abs().max() / STEPS[number_format]
            torch.testing.assert_close(quantized.scale[batch, group], scale.expand_as(quantized.scale[batch, group]))
    assert torch.equal(quantized.values, quantized.values.round())
    assert quantized.values.abs().max() == STEPS[number_format]
    assert ((quantized.values * quantized.scale - x).abs() <= 0.5001 * quantized.scale).all()


@pytest.mark.parametrize("number_format", ["int8", "int4"])
def test_channels_get_one_scale_each(number_format):
    x = random(2, 130, 5) * torch.tensor([1.0, 10, 100, 1e-3, 1e4])
    quantized = quantize_channels(x, number_format)
    torch.testing.assert_close(quantized.scale, x.abs().amax(1, keepdim=True) / STEPS[number_format])
    assert torch.equal(quantized.values.abs().amax(1), torch.full((2, 5), float(STEPS[number_format])))
    assert ((quantized.values * quantized.scale - x).abs() <= 0.5001 * quantized.scale).all()


@pytest.mark.parametrize(
    ("number_format", "steps", "largest"), [("int8", 255, 255), ("int8", 127, 127), ("int4", 255, 15), ("int4", 127, 7)]
)
@pytest.mark.parametrize("granularity", ["block", "row", "fixed"])
def test_probabilities_use_the_declared_steps_and_scale(number_format, steps, largest, granularity):
    p = torch.rand(2, 64, 3, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 0.5, 0.01]).view(3, 1)
    quantized = quantize_probabilities(p, number_format, PQuantization(granularity, steps))
    step = torch.full((2, 1, 3, 1), 1 / largest)
    if granularity != "fixed":
        step = p.amax(3 if granularity == "row" else (1, 3), keepdim=True) / largest
    torch.testing.assert_close(quantized.scale, step)
    assert quantized.values.min() >= 0
    assert quantized.values.max() <= largest
    assert ((quantized.values * quantized.scale - p).abs() <= 0.5001 * quantized.scale).all()


@pytest.mark.parametrize("quantize", [quantize_tokens, quantize_channels])
@pytest.mark.parametrize("number_format", ["exact", "bf16", "int8", "int4"])
def test_zeros_stay_zeros(quantize, number_format):
    quantized = quantize(torch.zeros(1, 70, 4), number_format)
    assert torch.equal(quantized.values * quantized.scale, torch.zeros(1, 70, 4))


def test_zero_probabilities_stay_zero():
    quantized = quantize_probabilities(torch.zeros(1, 4, 2, 64), "int8", PQuantization())
    assert torch.equal(quantized.values * quantized.scale, torch.zeros(1, 4, 2, 64))


@pytest.mark.parametrize("largest", [1e-36, 1e-40, 1e-43, 1e-44, 1.5e-45])
def test_probabilities_too_small_to_scale_stay_finite(largest):
    p = torch.zeros(1, 4, 1, 64)
    p[0, 0, 0, 0] = largest
    quantized = quantize_probabilities(p, "int8", PQuantization())
    assert (quantized.values * quantized.scale).isfinite().all()


@pytest.mark.parametrize("quantize", [quantize_tokens, quantize_channels])
def test_values_too_small_to_scale_stay_finite(quantize):
    x = torch.zeros(1, 70, 4)
    x[0, 0] = 1e-44
    quantized = quantize(x, "int8")
    assert (quantized.values * quantized.scale).isfinite().all()


def test_bf16_keeps_eight_bits_of_mantissa_and_exact_keeps_all():
    x = torch.tensor([1 + 2**-7, 1 + 2**-9])
    assert round_to(x, "bf16").tolist() == [1 + 2**-7, 1.0]
    assert torch.equal(round_to(x, "exact"), x)


@pytest.mark.parametrize("precision", [Precision(), Precision("int8", "int8"), Precision("int4", "bf16")])
def test_precision_is_parsed_from_what_str_writes(precision):
    assert Precision.parse(str(precision)) == precision
    assert Precision.parse(precision) is precision


@pytest.mark.parametrize("value", ["int2", "", "int8/int2", "int8/int8/int8", "/int8", 8, None])
def test_unknown_precision_lists_the_formats(value):
    with pytest.raises(ValueError, match="exact, bf16, int8, int4, fp8"):
        Precision.parse(value)


@pytest.mark.parametrize("quantize", [quantize_tokens, quantize_channels])
def test_fp8_fills_its_range_and_errs_by_at_most_a_sixteenth(quantize):
    x = random(2, 130, 9)
    quantized = quantize(x, "fp8")
    assert torch.equal(quantized.values, quantized.values.to(torch.float8_e4m3fn).float())
    assert quantized.values.abs().max() == 448
    error = (quantized.values * quantized.scale - x).abs()
    assert (error <= x.abs() / 16 + 2**-10 * quantized.scale).all()  # 3 bits of mantissa; subnormal steps of 2^-9


def test_fp8_probabilities_have_a_fixed_scale():
    p = torch.rand(1, 4, 2, 64, generator=torch.Generator().manual_seed(0))
    quantized = quantize_probabilities(p, "fp8", PQuantization())
    assert torch.equal(quantized.scale, torch.full((1, 1, 1, 1), 1 / 256).expand_as(quantized.scale))
    assert ((quantized.values * quantized.scale - p).abs() <= p / 16 + 2**-18).all()
