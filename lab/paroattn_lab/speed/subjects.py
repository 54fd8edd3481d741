"""Transformers to be timed, with the arguments of one forward call: with random weights, or those of a model."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from paroattn.cli.models import GenerativeModel
from paroattn.errors import InputError
from paroattn.grid import TokenGrid
from paroattn.integrations.descriptors import attention_modules, describe
from paroattn.integrations.pipeline import TRANSFORMERS, Pipeline
from paroattn_lab.speed.forward_arguments import CALLS, forward_arguments
from paroattn_lab.speed.presets import PRESETS, Preset

_LAYER_COUNTS = ("num_layers", "num_single_layers")
_LAYER_LISTS = ("vace_layers", "dual_attention_layers")


@dataclass(frozen=True)
class Subject:
    """What is timed: one forward call.

    Attributes:
        name: of the model.
        pipe: what paroattn takes for a pipeline: one or two transformers and a scheduler.
        arguments: keyword arguments of the first transformer's `forward`.
        weights: "random" or "the model's".
        layers: self-attention layers of the whole model; the transformers may have fewer.
    """

    name: str
    pipe: Any
    arguments: Mapping[str, Any]
    weights: str
    layers: int

    @property
    def transformer(self) -> Any:
        return self.pipe.transformer

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def grid(self) -> TokenGrid:
        grid = describe(self.transformer).grid(self.transformer.config, self.arguments)
        if grid is None:
            raise InputError(f"{self.name}: the visual tokens form no boxes of frames, height and width")
        return grid

    def twin(self) -> Subject:
        """A copy with modules of its own, so that attention can be exchanged and compiled, and the same weights."""
        transformers = Pipeline(self.pipe).transformers
        shared = (tensor for item in transformers for tensor in (*item.parameters(), *item.buffers()))
        copies = copy.deepcopy(transformers, {id(tensor): tensor for tensor in shared})
        return Subject(self.name, pipeline_of(copies), self.arguments, self.weights, self.layers)

    def at(self, level: float) -> Subject:
        """The same at another noise level."""
        timestep = self.arguments["timestep"]
        changed = torch.full_like(timestep, describe(self.transformer).timestep(level))
        return replace(self, arguments={**self.arguments, "timestep": changed})

    def step(self) -> Tensor:
        """Run the transformer once."""
        with torch.no_grad():
            return self.transformer(**self.arguments, return_dict=False)[0]


def pipeline_of(transformers: list[nn.Module]) -> Any:
    """The least that paroattn takes for a pipeline."""
    named = dict(zip(TRANSFORMERS, transformers, strict=False))
    return SimpleNamespace(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **named)


def random_subject(
    config: str,
    size: tuple[int, int, int] | None = None,
    *,
    layers: int | None = None,
    batch: int = 1,
    text_tokens: int | None = None,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
) -> Subject:
    """A transformer of a published size with random weights, which are made on the device itself.

    Args:
        config: a name in `PRESETS`, or the path of a diffusers transformer's config.json.
        size: frames, height and width in pixels; default: the preset's.
        layers: take only about so many self-attention layers; default: all. Blocks of several kinds keep their
            proportion, so that the number found may differ by one or two.
        batch: videos or images at once.
        text_tokens: of the prompt; default: as many as the model's pipeline gives.
        device, dtype: of weights and arguments. Parts that diffusers keeps in float32 are in float32.
        seed: of weights and arguments.

    Raises:
        InputError: an unknown config or class, no size, or numbers that do not fit.

    Example:
        >>> cpu = {"device": torch.device("cpu"), "dtype": torch.float32}
        >>> subject = random_subject("wan-2.1-1.3b-480p", (9, 32, 64), layers=1, **cpu)  # doctest: +SKIP
        >>> subject.grid  # doctest: +SKIP
        TokenGrid(frames=3, height=2, width=4, text_tokens=0, text_position='suffix')
    """
    preset = PRESETS[config] if config in PRESETS else _read(Path(config), size)
    settings = dict(preset.config)
    model_class = getattr(diffusers, settings.pop("_class_name"))
    torch.manual_seed(seed)
    whole = _layer_count(model_class, settings)
    if layers is not None:
        settings = _shortened(settings, layers, whole)
    transformer = _build(model_class, settings, device, dtype)
    arguments = forward_arguments(transformer, size or preset.size, batch=batch, text_tokens=text_tokens)
    name = config if config in PRESETS else Path(config).stem
    return Subject(name, pipeline_of([transformer]), arguments, "random", whole)


def model_subject(model: GenerativeModel) -> Subject:
    """A loaded model's transformer, with the arguments that its pipeline gives it in the first step."""
    pipeline = Pipeline(model.pipe)
    transformers = pipeline.transformers
    names = list(inspect.signature(type(transformers[0]).forward).parameters)[1:]
    seen: list[dict[str, Any]] = []

    def note(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append({**dict(zip(names, args, strict=False)), **kwargs})

    hook = transformers[0].register_forward_pre_hook(note, with_kwargs=True)
    prompt = next(iter(model.calibration_prompts), "a cat")
    try:
        model.pipe(**{**model.call_arguments(prompt), "num_inference_steps": 1, "output_type": "latent"})
    finally:
        hook.remove()
    if not seen:
        raise InputError(f"model {model.name!r} did not call its first transformer in a generation of one step")
    seen[0].pop("return_dict", None)
    return Subject(model.name, pipeline_of(transformers), seen[0], "the model's", pipeline.identity.layers)


def _read(path: Path, size: tuple[int, int, int] | None) -> Preset:
    if not path.is_file():
        raise InputError(f"config {str(path)!r} is no file; expected one, or one of {', '.join(PRESETS)}")
    if size is None:
        raise InputError(f"size is missing; config {str(path)!r} does not say how many frames and pixels to make")
    try:
        config = json.loads(path.read_text())
        name = config.get("_class_name")
    except (ValueError, AttributeError) as error:
        raise InputError(f"config {str(path)!r} is not a JSON object: {error}") from error
    if name not in CALLS:
        timed = ", ".join(CALLS)
        raise InputError(f"config {str(path)!r} is of class {name!r}; without weights {timed} can be timed")
    return Preset(config, size)


def _layer_count(model_class: Any, settings: Mapping[str, Any]) -> int:
    """Self-attention layers of the whole model, which is not built for it."""
    return len(attention_modules(_build(model_class, settings, torch.device("meta"), torch.float32)))


def _build(model_class: Any, settings: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            transformer = model_class.from_config(settings)
    except (TypeError, RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise InputError(f"config: {model_class.__name__} cannot be made of it: {error}") from error
    finally:
        torch.set_default_dtype(before)
    kept = set(getattr(transformer, "_keep_in_fp32_modules", None) or ())
    for name, tensor in (*transformer.named_parameters(), *transformer.named_buffers()):
        if kept & set(name.split(".")) and tensor.dtype in (torch.float16, torch.bfloat16):
            tensor.data = tensor.data.float()
    return transformer.eval().requires_grad_(False)


def _shortened(settings: Mapping[str, Any], layers: int, whole: int) -> dict[str, Any]:
    """A config with fewer blocks, at least one of each kind."""
    if not 0 < layers <= whole:
        raise InputError(f"layers is {layers}; expected 1 to {whole}")
    short = dict(settings)
    for name in _LAYER_COUNTS:
        if settings.get(name):
            short[name] = max(1, round(settings[name] * layers / whole))
    for name in _LAYER_LISTS:
        if settings.get(name):
            short[name] = [number for number in settings[name] if number < short["num_layers"]]
    return short
