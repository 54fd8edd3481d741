"""The `bench` commands: reads arguments, calls the package, prints."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from paroattn.cli.options import (
    backend_option,
    chosen_device,
    device_option,
    example_lines,
    load,
    new_console,
    path_option,
    seed_option,
)
from paroattn.files import check_output
from paroattn.plan import Plan
from paroattn_lab.cli.options import require_metrics


@click.group()
def bench() -> None:
    """Time the operator, or a whole transformer, beside what PyTorch has."""


def _densities(default: tuple[float, ...], help: str) -> Any:
    return click.option(
        "--density", "densities", multiple=True, type=float, default=default, show_default=True, help=help
    )


@bench.command(
    "attention",
    epilog=example_lines(
        "paroattn bench attention --tokens 17776 --heads 2 --head-dim 64 --density 1 --density 0.3",
        "paroattn bench attention --tokens 4096 --precision bf16 --precision int8 --output attention.jsonl",
        "paroattn bench attention --backend triton --tokens 17776 --heads 24 --precision int8 --precision int8/fp8",
    ),
)
@click.option("--tokens", type=click.IntRange(min=1), default=4096, show_default=True, help="Sequence length.")
@click.option("--heads", type=click.IntRange(min=1), default=2, show_default=True, help="Attention heads.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences at once.")
@click.option("--head-dim", type=click.IntRange(1, 256), default=64, show_default=True, help="Channels per head.")
@_densities((1.0, 0.5, 0.3, 0.2), "Share of blocks; repeatable.")
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    default=("exact", "int8"),
    show_default=True,
    help="exact, bf16, int8, int4, or qk/pv; repeatable.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True, help="Rounds of all contenders.")
@click.option("--unequal", is_flag=True, help="Let the heads' densities differ by up to a factor of three.")
@click.option("--compensate", is_flag=True, help="Also with skipped blocks approximated by their means.")
@click.option("--flex/--no-flex", default=True, show_default=True, help="Also time compiled FlexAttention.")
@click.option("--block-q", type=click.Choice(["64", "128"]), default="64", show_default=True, help="Queries per block.")
@click.option("--block-kv", type=click.Choice(["64", "128"]), default="64", show_default=True, help="Keys per block.")
@path_option("--output", "Write the records to this file.")
@seed_option
@backend_option
@click.option("--json", "as_json", is_flag=True, help="Print the records, one JSON line each.")
def bench_attention(
    tokens: int,
    heads: int,
    head_dim: int,
    batch: int,
    block_q: str,
    block_kv: str,
    output: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Time attention on random inputs with random masks, after a check against float64.

    Medians of interleaved rounds; ratios are to the fastest dense attention, round by round: on a CPU SDPA in fp32 and
    bf16; on a GPU, in bf16, SDPA's kernels and the packages that are installed.
    """
    require_metrics()
    if output is not None:
        check_output(output)
    from paroattn_lab.report.tables import attention_table
    from paroattn_lab.speed.bench import Shape
    from paroattn_lab.speed.bench import bench_attention as run

    shape = Shape(tokens, heads, head_dim, batch)
    try:
        records = run(shape, block_q=int(block_q), block_kv=int(block_kv), progress=not as_json, **settings)
    except ArithmeticError as error:
        raise click.ClickException(str(error)) from error
    _finish(records, attention_table, output, as_json)


def _size(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int, int] | None:
    if value is None:
        return None
    match = re.fullmatch(r"(?:(\d+)x)?(\d+)x(\d+)", value)
    size = tuple(int(part or 1) for part in match.groups()) if match else ()
    if not size or not all(size):
        raise click.BadParameter(f"{value!r}; expected FRAMESxHEIGHTxWIDTH such as 81x480x832, or HEIGHTxWIDTH")
    return size  # type: ignore[return-value]


@bench.command(
    "model",
    epilog=example_lines(
        "paroattn bench model",
        "paroattn bench model --config wan-2.1-1.3b-480p --density 0.5 --density 0.3 --output wan.jsonl",
        "paroattn bench model --config wan-2.1-14b-720p --layers 4 --precision int8/fp8 --compile",
        "paroattn bench model --config transformer/config.json --size 81x480x832",
        "paroattn bench model --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --plan wan.safetensors",
    ),
)
@click.option("--model", help="A model with its weights: a bundled one's name, a pipeline folder or a Hub name.")
@click.option("--config", help="Random weights instead: a transformer's config.json, or one of the names below.")
@click.option("--size", callback=_size, help="FRAMESxHEIGHTxWIDTH in pixels; default: the model's or the preset's.")
@click.option("--layers", type=click.IntRange(min=1), help="With --config: take about so many layers only.")
@click.option("--text-tokens", type=click.IntRange(min=1), help="With --config: tokens of the prompt.")
@click.option("--batch", type=click.IntRange(min=1), help="With --config: videos at once, 2 for guidance; default: 1.")
@click.option("--plan", "plan_path", type=click.Path(path_type=Path), help="Plan file; default: random plans.")
@_densities((0.5, 0.3), "Of random plans; repeatable.")
@click.option("--precision", default="int8", show_default=True, help="Of random plans: exact, bf16, int8, or qk/pv.")
@click.option("--block-q", type=click.Choice(["64", "128"]), default="64", show_default=True, help="Of random plans.")
@device_option
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of random weights; default: bfloat16 on a GPU, float32 on a CPU.",
)
@click.option("--linears", type=click.Choice(["float8", "int8"]), help="Also with linear layers in 8 bits, by torchao.")
@click.option("--compile", "compiled", is_flag=True, help="Compile the blocks, with plans and without alike.")
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True, help="Rounds of all contenders.")
@path_option("--output", "Write the records to this file.")
@seed_option
@backend_option
@click.option("--json", "as_json", is_flag=True, help="Print the records, one JSON line each.")
def bench_model(
    model: str | None,
    config: str | None,
    size: tuple[int, int, int] | None,
    layers: int | None,
    text_tokens: int | None,
    batch: int | None,
    plan_path: Path | None,
    precision: str,
    block_q: str,
    device: str | None,
    dtype: str | None,
    seed: int,
    output: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Time one step of a whole transformer with its own attention and with plans, in interleaved rounds.

    Of a model (default: the tiny video model), or of any size of any model that paroattn knows with random weights,
    so that speed can be measured without the weights. The result says how much of a step is attention.
    Names for --config: wan-2.1-1.3b-480p, wan-2.1-14b-720p, wan-2.2-14b-720p, cogvideox-5b, hunyuanvideo-720p and
    flux.1-dev.
    """
    require_metrics()
    import torch

    from paroattn.keep import check_density
    from paroattn.quantize import Precision
    from paroattn_lab.report.tables import model_table
    from paroattn_lab.speed import model_bench, subjects

    if output is not None:
        check_output(output, plan_path)
    Precision.parse(precision)
    for density in settings["densities"]:
        check_density(density)
    plan = Plan.load(plan_path) if plan_path else None
    chosen = chosen_device(device)
    random_only = {"--layers": layers, "--text-tokens": text_tokens, "--batch": batch, "--dtype": dtype}
    try:
        if config is None:
            for name, value in random_only.items():
                if value is not None:
                    raise click.UsageError(f"{name} is {value}, which needs --config")
            frames, height, width = size or (None, None, None)
            loaded = load(model, device=str(chosen), num_frames=frames, height=height, width=width)
            subject = subjects.model_subject(loaded)
        elif model is not None:
            raise click.UsageError(f"both --model {model} and --config {config}; expected one of them")
        else:
            subject = subjects.random_subject(
                config,
                size,
                layers=layers,
                batch=batch or 1,
                text_tokens=text_tokens,
                device=chosen,
                dtype=getattr(torch, dtype or ("float32" if chosen.type == "cpu" else "bfloat16")),
                seed=seed,
            )
        records = model_bench.bench_model(
            subject,
            precision=precision,
            plan=plan,
            block_q=int(block_q),
            seed=seed,
            progress=not as_json,
            **settings,
        )
    except ArithmeticError as error:
        raise click.ClickException(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise click.ClickException("the GPU has too little memory for this; take fewer layers with --layers") from error
    _finish(records, model_table, output, as_json)


def _finish(
    records: list[dict[str, Any]],
    table: Callable[[list[dict[str, Any]]], Table],
    output: Path | None,
    as_json: bool,
) -> None:
    """Write the records, and print them or their table."""
    from paroattn_lab.records import write_records

    if output is not None:
        write_records(records, output)
    if as_json:
        for record in records:
            click.echo(json.dumps(record, sort_keys=True))
        return
    first = records[0]
    console = new_console()
    console.print(table(records))
    used = {record["backend"] for record in records if record["backend"]}
    machine = first.get("gpu") or f"{first['machine']}, {first['threads']} threads"
    console.print(f"{machine}; paroattn on: {', '.join(sorted(used))}")
    if output is not None:
        console.print(f"records: {output}", soft_wrap=True)
