"""Linear layers in 8 bits beside a plan, by torchao."""

from __future__ import annotations

from typing import Any

from torch import nn

from paroattn.errors import InputError, require
from paroattn.integrations.compiling import attention_blocks
from paroattn.integrations.pipeline import Pipeline

FORMATS = ("float8", "int8")
_MULTIPLE = 16  # of both sides, for the products in 8 bits


def quantize_linears(pipe: Any, format: str = "float8") -> int:
    """Compute the linear layers of a pipeline's transformer blocks in 8 bits, weights and inputs, by torchao.

    Weights are rounded once with a scale per output channel, inputs in each call with a scale per token. Layers outside
    of the blocks (embeddings, the last projection) stay, and so do those that make modulations from the timestep, which
    see one token and go into every channel. Before or after `apply`; compile the blocks (`apply(...,
    compile_blocks=True)`), or rounding the inputs costs more than the products save.

    Args:
        pipe: a diffusers pipeline whose transformer paroattn knows.
        format: "float8" (e4m3; GPUs of capability 8.9 on: Ada, Hopper, Blackwell) or "int8" (any GPU, or a CPU).

    Returns:
        How many layers were quantised. This cannot be undone: load the pipeline again.

    Raises:
        InputError: another format, or a transformer on the meta device.
        MissingPartError: torchao is not installed.

    Example:
        >>> paroattn.quantize_linears(pipe, "float8")  # doctest: +SKIP
        300
        >>> paroattn.apply(pipe, "wan.safetensors", compile_blocks=True)  # doctest: +SKIP
    """
    if format not in FORMATS:
        raise InputError(f"format is {format!r}; expected one of {', '.join(FORMATS)}")
    require("torchao", "torchao")
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    pipeline = Pipeline(pipe)
    if pipeline.place[0].type == "meta":
        raise InputError("the transformer is on the meta device; quantise it where it runs")
    # torchao would set inductor to tune every kernel of the process, which takes minutes.
    as_it_is = {"set_inductor_config": False}
    config = (
        Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), **as_it_is)
        if format == "float8"
        else Int8DynamicActivationInt8WeightConfig(**as_it_is)
    )
    count = 0
    for transformer in pipeline.transformers:
        chosen = set(block_linears(transformer))
        quantize_(transformer, config, filter_fn=lambda module, name, chosen=chosen: module in chosen)
        count += len(chosen)
    return count


def block_linears(transformer: nn.Module) -> list[nn.Linear]:
    """The linear layers that `quantize_linears` takes."""
    return [
        module
        for block in attention_blocks(transformer)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
        and not any("norm" in part or "modulation" in part for part in name.split("."))
        and module.in_features % _MULTIPLE == module.out_features % _MULTIPLE == 0
    ]
