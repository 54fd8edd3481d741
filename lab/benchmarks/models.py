"""What is known of the model classes that paroattn takes, as records: from descriptors, the tests and diffusers itself.

python lab/benchmarks/models.py --output lab/benchmarks/records/models.jsonl

Sizes are those that a class of diffusers has by default, which are a published model's. The share of attention is that
of its products in a forward call, 4 N^2 H D per layer, beside 2 per parameter and token: worked out, not measured.
"""

from __future__ import annotations

import argparse
import inspect
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from paroattn_lab.records import environment, write_records

from paroattn.integrations.descriptors import DESCRIPTORS, attention_modules, head_shape, known_class

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
from tiny_families import FAMILIES
from tiny_models import MODELS

IMAGE, LARGE_IMAGE = ("1024 x 1024", (1, 64, 64)), ("2048 x 2048", (1, 64, 64))
SIZES = {  # a usual one: frames and pixels, and the box of tokens that they become
    "WanTransformer3DModel": ("81 frames, 720 x 1280", (21, 45, 80)),
    "WanVACETransformer3DModel": ("81 frames, 720 x 1280", (21, 45, 80)),
    "SkyReelsV2Transformer3DModel": ("97 frames, 544 x 960", (25, 34, 60)),
    "CogVideoXTransformer3DModel": ("49 frames, 480 x 720", (13, 30, 45)),
    "HunyuanVideoTransformer3DModel": ("129 frames, 720 x 1280", (33, 45, 80)),
    "HunyuanVideo15Transformer3DModel": ("121 frames, 720 x 1280", (31, 45, 80)),
    "LTXVideoTransformer3DModel": ("161 frames, 512 x 704", (21, 16, 22)),
    "LTX2VideoTransformer3DModel": ("121 frames, 512 x 768", (16, 16, 24)),
    "MochiTransformer3DModel": ("163 frames, 480 x 848", (28, 30, 53)),
    "AllegroTransformer3DModel": ("88 frames, 720 x 1280", (22, 45, 80)),
    "CosmosTransformer3DModel": ("93 frames, 704 x 1280", (24, 44, 80)),
    "Kandinsky5Transformer3DModel": ("121 frames, 512 x 768", (31, 32, 48)),
    "HunyuanImageTransformer2DModel": LARGE_IMAGE,
    **dict.fromkeys(
        (
            "FluxTransformer2DModel", "Flux2Transformer2DModel", "ChromaTransformer2DModel", "ZImageTransformer2DModel",
            "QwenImageTransformer2DModel", "LongCatImageTransformer2DModel", "OvisImageTransformer2DModel",
            "BriaTransformer2DModel", "BriaFiboTransformer2DModel", "SD3Transformer2DModel",
            "AuraFlowTransformer2DModel", "Lumina2Transformer2DModel", "CogView4Transformer2DModel",
        ),
        IMAGE,
    ),
}  # fmt: skip


def tested_pipelines() -> dict[str, list[Any]]:
    """Pipeline classes of the tests' tiny models, by the transformer class that they are known as."""
    found: dict[str, list[Any]] = {name: [] for name in DESCRIPTORS}
    for model in (*MODELS, *FAMILIES):
        pipe = model.build()
        kinds = found[known_class(pipe.transformer)]
        if type(pipe) not in kinds:
            kinds.append(type(pipe))
    return found


def default_sizes(name: str) -> dict[str, int]:
    """Layers, heads, head_dim and parameters of a class by default; empty if it has no defaults."""
    try:
        with torch.device("meta"):
            transformer = getattr(diffusers, name)()
    except TypeError:  # a size that has to be given
        return {}
    modules = attention_modules(transformer)
    heads, head_dim = head_shape(modules[0])
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    return {"layers": len(modules), "heads": heads, "head_dim": head_dim, "parameters": parameters}


def example_of(pipeline: Any) -> str | None:
    """The model in diffusers' own example of a pipeline."""
    source = inspect.getsource(inspect.getmodule(pipeline))  # type: ignore[arg-type]
    given = rf"(?:\b{pipeline.__name__}\.from_pretrained\(\s*|\b(?:model|ckpt|repo)_id = )"
    match = re.search(given + r"\"([\w.-]+/[\w.-]+)\"", source)
    return match and match[1]


def records() -> Iterator[dict[str, Any]]:
    for name, pipelines in tested_pipelines().items():
        descriptor, sizes = DESCRIPTORS[name], default_sizes(name)
        usual, box = SIZES.get(name, (None, None))
        share = None
        if sizes and box:
            attention = 4 * math.prod(box) * sizes["layers"] * sizes["heads"] * sizes["head_dim"]
            share = attention / (attention + 2 * sizes["parameters"])
        yield {
            "kind": "known model",
            "class": name,
            "pipelines": [pipeline.__name__ for pipeline in pipelines],
            "example": next(filter(None, map(example_of, pipelines)), None),
            "others": descriptor.text,
            "others_ask": descriptor.text_asks,
            **sizes,
            "usual": usual,
            "tokens": box and math.prod(box),
            "attention_share": share,
            **environment(),
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="write the records to this file")
    write_records(list(records()), parser.parse_args().output)
