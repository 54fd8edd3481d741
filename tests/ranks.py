"""What tests of several ranks run on each of them: torchrun --nproc-per-node 2 tests/ranks.py NAMES [setting ...].

Prints a line of JSON per model on rank 0: relative errors of what ranks share against the same in one process.
"""

import dataclasses
import functools
import json
import os
import sys
import tempfile
import warnings

import tiny
import tiny_models
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from tiny_families import FAMILIES

import paroattn
from paroattn import TokenGrid
from paroattn.block_mask import block_count, text_blocks
from paroattn.integrations.pipeline import Pipeline

EIGHT_HEADS = tiny_models.TinyModel(
    "eight heads", functools.partial(tiny.tiny_wan, heads=8), tiny.call_arguments, tiny.GRID, layers=2
)
MINIMAX = next(model for model in FAMILIES if model.name == "minimax-h3")
EVEN_MINIMAX = dataclasses.replace(  # one text token more than there, so that two ranks can have as many tokens
    MINIMAX,
    name="minimax-h3 of 866",
    arguments=lambda: {
        **MINIMAX.arguments(),
        "prompt_embeds": tiny_models.random(1, 1, 8, 32),
        "text_token_tags": torch.ones(8, dtype=torch.long),
    },
    grid=TokenGrid(37, 3, 4, 8 + 414, "prefix"),
)
MODELS = {model.name: model for model in (*tiny_models.MODELS, *FAMILIES, EIGHT_HEADS, EVEN_MINIMAX)}
BUCKETS = (0.0, 0.5)


def sparse_plan(model, pipe, precision="exact"):
    """Random masks of unequal densities that differ by step bucket; every second head compensated."""
    identity, blocks = Pipeline(pipe).identity, block_count(model.grid.tokens, 64)
    generator = torch.Generator().manual_seed(5)
    shape = (len(BUCKETS), identity.layers, identity.heads)
    densities = torch.rand(*shape, 1, 1, generator=generator)
    masks = torch.rand(*shape, blocks, blocks, generator=generator) < densities
    masks |= torch.eye(blocks, dtype=torch.bool) | text_blocks(model.grid)
    plan = tiny.make_plan(pipe, masks, grid=model.grid, edges=BUCKETS, precision=precision)
    plan.compensate[..., ::2] = True
    return plan


def relative_error(found, expected):
    return float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected))


def share(pipe, anything=False):
    for transformer in Pipeline(pipe).transformers:
        config = ContextParallelConfig(ulysses_degree=dist.get_world_size(), ulysses_anything=anything)
        transformer.enable_parallelism(config=config, cp_plan=paroattn.cp_plan(transformer))


def compare(model, precision, settings):
    """The sparse output of ranks against that of one process, and full attention's likewise."""
    pipe = model.pipe()
    plan = sparse_plan(model, pipe, precision)
    full = model.latents(pipe)
    with paroattn.apply(pipe, plan, strict=True):
        expected = model.latents(pipe)
    first = "before" in settings
    handle = paroattn.apply(pipe, plan, strict=True) if first else None
    share(pipe, "anything" in settings)
    handle = handle or paroattn.apply(pipe, plan, strict=True, compile_blocks="compiled" in settings)
    found = model.latents(pipe)
    again = model.latents(pipe)
    report = str(handle.report())
    (heads,) = handle._heads.values()
    handle.remove()
    with paroattn.apply(pipe, precision="exact", strict=True):
        dense = model.latents(pipe)
    return {
        "error": relative_error(found, expected),
        "repeated": torch.equal(found, again),
        "dense": relative_error(dense, full),
        "sparsity": relative_error(expected, full),
        "moved": any(bool((order != torch.arange(order.shape[-1])).any()) for order in heads),
        "report": report,
    }


def refuse(model, mistake):
    """The message of a mistake, or what comes of it."""
    pipe, rank = model.pipe(), dist.get_rank()
    if mistake == "ring":
        pipe.transformer.enable_parallelism(config=ContextParallelConfig(ring_degree=dist.get_world_size()))
    else:
        share(pipe)
    try:
        if mistake == "own attention":
            model.latents(pipe)
        elif mistake == "calibrating":
            paroattn.calibrate(pipe, [model.arguments()], progress=False, num_inference_steps=2)
        elif mistake == "a density":
            paroattn.apply(pipe, density=0.5, cache=tempfile.mkdtemp(), progress=False)
            model.latents(pipe)
        elif mistake == "a lost rank":
            with paroattn.apply(pipe, precision="exact"):
                model.latents(pipe)
                if rank:
                    os._exit(3)
                model.latents(pipe)
        else:
            plan = sparse_plan(model, pipe, "int8" if mistake == "other plans" and rank else "exact")
            paroattn.apply(pipe, plan)
            model.latents(pipe)
    except Exception as error:
        return {"message": f"{type(error).__name__}: {error}"}
    return {"message": None}


MISTAKES = ("ring", "own attention", "calibrating", "a density", "other plans", "a lost rank")


def main():
    warnings.simplefilter("ignore")
    torch.accelerator.device_count = lambda: 1  # diffusers divides a rank by it; without a GPU it is 0
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    names, *settings = sys.argv[1:]
    precision = next((item for item in settings if item in ("int8", "exact")), "exact")
    mistake = next((item for item in settings if item in MISTAKES), None)
    for name in names.split(","):
        found = refuse(MODELS[name], mistake) if mistake else compare(MODELS[name], precision, settings)
        if dist.get_rank() == 0:
            print(json.dumps({"model": name, **found}), flush=True)
    if mistake is None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
