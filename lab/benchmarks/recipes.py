"""What a plan, repair, linear layers in 8 bits and a step cache give together on the bundled models, as records.

python lab/benchmarks/recipes.py [--models moving-digits painted-digits] [--threshold 0.1 …] --output FILE.jsonl

Needs torchao. Every recipe makes each video in turn: PSNR against the model as it is, and seconds in the transformer.
The cache is diffusers' FirstBlockCache, which leaves out the other blocks of a step where the first one changes little.
Prompts and seeds are none of a model's evaluation, so that thresholds and layers may be chosen by what is found;
`--evaluation` takes those of the evaluation. On a GPU, linear layers are in float8, elsewhere in int8.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from paroattn_lab.models.bundled import IMAGE, VIDEO, BundledModel, load_bundled
from paroattn_lab.quality.metrics import compare, standard_error
from paroattn_lab.quality.pairs import Pair
from paroattn_lab.records import environment, write_records
from paroattn_lab.speed.rounds import paired_ratio
from torch import Tensor

import paroattn
from paroattn import Plan
from paroattn.integrations.clock import TransformerClock
from paroattn.integrations.compiling import compile_blocks
from paroattn.integrations.descriptors import attention_modules
from paroattn.integrations.linear import FORMATS
from paroattn.integrations.pipeline import Pipeline

VIDEO_PROMPT, IMAGE_PROMPT = "a fast white seven over the cat camera left", "a big yellow seven over the cat left"
FIRST_SEED = 900
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Recipe:
    """What is done to a pipeline; nothing by default.

    Attributes:
        planned, repaired, linears: whether there is a plan, whether its outputs are repaired, whether linear layers
            are in 8 bits.
        threshold: of the step cache; None for no cache.
    """

    planned: bool = False
    repaired: bool = False
    linears: bool = False
    threshold: float | None = None

    @property
    def name(self) -> str:
        cache = "" if self.threshold is None else f"cache {self.threshold:g}"
        parts = ("plan" * self.planned, "repair" * self.repaired, "linears" * self.linears, cache)
        return " + ".join(part for part in parts if part) or "as it is"


def recipes(thresholds: Sequence[float]) -> list[Recipe]:
    """The model as it is comes first."""
    return [
        Recipe(),
        Recipe(planned=True),
        Recipe(planned=True, repaired=True),
        Recipe(linears=True),
        Recipe(planned=True, linears=True),
        *(Recipe(threshold=threshold) for threshold in thresholds),
        *(Recipe(planned=True, threshold=threshold) for threshold in thresholds),
        *(Recipe(planned=True, linears=True, threshold=threshold) for threshold in thresholds),
    ]


class Contender:
    """A model of its own with a recipe, so that nothing has to be undone or compiled twice."""

    def __init__(self, recipe: Recipe, model: BundledModel, plan: Plan, linears: str, compiled: bool):
        self.recipe, self._model, self._compiled = recipe, model, compiled
        self.seconds: list[float] = []
        self.psnr: list[float] = []
        self.computed: list[float] = []
        self._transformers = Pipeline(model.pipe).transformers
        if recipe.linears:
            paroattn.quantize_linears(model.pipe, linears)
        if recipe.planned:
            paroattn.apply(model.pipe, plan, strict=True, repair=recipe.repaired, compile_blocks=compiled)
        elif compiled:
            compile_blocks(self._transformers)
        if recipe.threshold is not None:
            for transformer in self._transformers:
                transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=recipe.threshold))

    def warm_up(self, pair: Pair) -> None:
        settings = self._model.settings.changed({"num_inference_steps": WARM_UP_STEPS})
        replace(self._model, settings=settings).generate(*pair)

    def generate(self, pair: Pair, reference: Tensor | None) -> Tensor:
        """Frames, after noting seconds, the share of whole forward calls, and PSNR where there is a reference."""
        with TransformerClock(*self._transformers) as clock, self._counted() as calls:
            frames = self._model.generate(*pair)
        self.seconds.append(clock.seconds)
        if not self._compiled:  # compiled blocks would be compiled anew with the hooks that count
            self.computed.append(calls["last"] / calls["first"])
        if reference is not None:
            self.psnr.append(compare(frames, reference).psnr)
        return frames

    @contextlib.contextmanager
    def _counted(self) -> Iterator[dict[str, int]]:
        """Calls of the first and of the last attention: a cache leaves out the last."""
        calls = {"first": 0, "last": 0}
        handles = []

        def count(which: str) -> None:
            calls[which] += 1

        if not self._compiled:
            for transformer in self._transformers:
                modules = attention_modules(transformer)
                for which, module in (("first", modules[0]), ("last", modules[-1])):
                    handles.append(module.register_forward_hook(lambda *_, which=which: count(which)))
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    def record(self, own: Contender) -> dict[str, Any]:
        return {
            "recipe": self.recipe.name,
            **vars(self.recipe),
            "psnr": statistics.fmean(self.psnr) if self.psnr else None,
            "standard_error": standard_error(self.psnr) if len(self.psnr) > 1 else None,
            "psnr_of_pairs": list(self.psnr),
            "seconds": statistics.median(self.seconds),
            "times_own": paired_ratio(own.seconds, self.seconds),
            "computed": statistics.fmean(self.computed) if self.computed else None,
        }


def pairs_of(model: BundledModel, arguments: argparse.Namespace) -> list[Pair]:
    if arguments.evaluation:
        return list(model.evaluation_pairs)[: arguments.pairs]
    prompt = IMAGE_PROMPT if model.makes_images else VIDEO_PROMPT
    return [(prompt, FIRST_SEED + number) for number in range(arguments.pairs)]


def measured(name: str, arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    linears = arguments.linears or ("float8" if device.type == "cuda" else "int8")

    def load() -> BundledModel:
        return load_bundled(name, device=str(device), num_inference_steps=arguments.steps)

    model = load()
    pairs, prompts = pairs_of(model, arguments), [model.call_arguments(prompt) for prompt in model.calibration_prompts]
    plan = paroattn.calibrate(
        model.pipe, prompts, density=arguments.density, precision=arguments.precision, progress=False
    )
    contenders = [
        Contender(recipe, load(), plan, linears, arguments.compile) for recipe in recipes(arguments.threshold)
    ]
    for contender in contenders:
        contender.warm_up(pairs[0])
    for number, pair in enumerate(pairs):
        reference = None
        for contender in contenders:
            frames = contender.generate(pair, reference)
            reference = frames if reference is None else reference
        print(f"{name}: pair {number + 1} of {len(pairs)}", flush=True)
    common = {
        "kind": "recipes",
        "model": name,
        "prompts": "evaluation" if arguments.evaluation else "dev",
        "pairs": len(pairs),
        "steps": arguments.steps,
        "density": plan.density(),
        "precision": arguments.precision,
        "format": linears,
        "compiled": arguments.compile,
        **environment(device),
    }
    return [{**contender.record(contenders[0]), **common} for contender in contenders]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[VIDEO, IMAGE], help="names of bundled models")
    parser.add_argument("--density", type=float, default=0.3, help="of the plan; default: 0.3")
    parser.add_argument("--precision", default="int8", help="of the plan; default: int8")
    parser.add_argument("--linears", choices=FORMATS, help="default: float8 on a GPU, else int8")
    parser.add_argument("--threshold", nargs="+", type=float, default=[0.05, 0.1, 0.2], help="of the step cache")
    parser.add_argument("--steps", type=int, default=20, help="of sampling; default: 20")
    parser.add_argument("--pairs", type=int, default=4, help="prompt/seed pairs; default: 4")
    parser.add_argument("--evaluation", action="store_true", help="take the models' evaluation pairs")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of all recipes")
    parser.add_argument("--output", type=Path, required=True, help="write the records to this file")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    records: list[dict[str, Any]] = []
    with torch.no_grad():
        for name in arguments.models:
            found = measured(name, arguments, device)
            for record in found:
                print({key: record[key] for key in ("recipe", "psnr", "times_own", "computed")}, flush=True)
            records += found
            write_records(records, arguments.output)


if __name__ == "__main__":
    main()
