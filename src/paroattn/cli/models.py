"""Loading a model by name or folder, and generating frames from a prompt and a seed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paroattn.errors import InputError
from paroattn.integrations.descriptors import describe
from paroattn.integrations.pipeline import Pipeline

MODELS_GROUP = "paroattn.models"
"""Entry points of other distributions, each a mapping of names to functions like `load_model`."""


@dataclass(frozen=True)
class GenerationSettings:
    """Size and sampling of what is generated; None leaves a value to the pipeline.

    Attributes:
        height, width: in pixels.
        num_frames: of a video; None for images.
        num_inference_steps: denoising steps.
        guidance_scale: 1 for none; some models want 0.
        fps: frames per second in playback.
    """

    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    fps: int = 16

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value is None or (value == 0 and item.name == "guidance_scale"):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise InputError(f"{item.name} is {value!r}; expected a number above 0")

    def differs_from(self, frames: Tensor) -> bool:
        """Whether frames [F, 3, H, W] have another size than is asked for here."""
        made = {"num_frames": frames.shape[0], "height": frames.shape[2], "width": frames.shape[3]}
        return any(getattr(self, name) not in (None, size) for name, size in made.items())

    def changed(self, changes: Mapping[str, Any]) -> GenerationSettings:
        """These settings with the given ones that are not None."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})


@dataclass
class GenerativeModel:
    """A diffusers pipeline with what is needed to call it.

    Attributes:
        name: as the user gave it.
        pipe: the pipeline.
        settings: size and sampling.
        calibration_prompts: the model's own, to calibrate on where the user gives none.
        evaluation_pairs: the model's own prompts and seeds to evaluate on.
    """

    name: str
    pipe: Any
    settings: GenerationSettings
    calibration_prompts: tuple[str, ...] = ()
    evaluation_pairs: tuple[tuple[str, int], ...] = ()

    @property
    def makes_images(self) -> bool:
        """Whether the pipeline makes single images, not videos."""
        return "num_frames" not in inspect.signature(self.pipe.__call__).parameters

    def call_arguments(self, prompt: str) -> dict[str, Any]:
        """Keyword arguments of the pipeline for a prompt."""
        arguments = {key: value for key, value in asdict(self.settings).items() if key != "fps" and value is not None}
        if self.makes_images:
            arguments.pop("num_frames", None)
        return {**arguments, "prompt": prompt}

    def generate(self, prompt: str, seed: int) -> Tensor:
        """Frames float32 [F, 3, H, W] in [0, 1] on the CPU; one for an image."""
        generator = torch.Generator().manual_seed(seed)
        arguments = {"output_type": "pt", **self.call_arguments(prompt), "generator": generator}
        return self.frames_of(Pipeline(self.pipe).generate(**arguments).float().cpu())

    def frames_of(self, output: Tensor) -> Tensor:
        """Frames [F, 3, H, W] of what the pipeline returned."""
        return output[0] if output.ndim == 5 else output


@cache
def provided_models() -> dict[str, Callable[..., GenerativeModel]]:
    """Models that other distributions bring, by name."""
    return {name: load for entry_point in entry_points(group=MODELS_GROUP) for name, load in entry_point.load().items()}


def load_model(source: str, *, device: str | None = None, **changes: Any) -> GenerativeModel:
    """Load a diffusers pipeline from a folder or the Hub, or a model that another distribution brings.

    Args:
        source: a folder with model_index.json, a Hub name such as "owner/model", or a name of `provided_models`
            ("moving-digits" of paroattn-lab, say).
        device: default "cuda" if there is one, else "cpu".
        **changes: fields of `GenerationSettings` to change; None leaves the model's own.

    Raises:
        InputError: no such model, not a pipeline that paroattn knows, or a setting out of range.

    Example:
        >>> model = load_model("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")  # doctest: +SKIP
        >>> frames = model.generate("a cat", seed=0)  # doctest: +SKIP
    """
    if source in provided_models():
        return provided_models()[source](source, device=device, **changes)
    folder = Path(source)
    _check_source(source, folder)
    pipe = load_pipeline(source, device)
    return GenerativeModel(source, pipe, GenerationSettings().changed(changes))


def load_pipeline(source: str | Path, device: str | None = None, **components: Any) -> Any:
    """A diffusers pipeline from a folder or the Hub on a device; bfloat16 on a GPU, float32 on a CPU.

    components: of the pipeline, in place of its own.
    """
    import diffusers
    from packaging.version import Version

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    dtype_argument = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"
    try:
        pipe: Any = diffusers.DiffusionPipeline.from_pretrained(str(source), **{dtype_argument: dtype}, **components)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"model {str(source)!r} cannot be loaded: {reason}") from error
    try:
        describe(Pipeline(pipe).transformers[0])
    except InputError as error:
        raise InputError(f"model {str(source)!r} cannot be used: {error}") from error
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _check_source(source: str, folder: Path) -> None:
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise InputError(f"model {source!r} is a folder without model_index.json; expected a diffusers pipeline folder")
    looks_local = folder.is_file() or source.startswith((".", "/", "~")) or source.count("/") > 1
    if not folder.is_dir() and (looks_local or "/" not in source):
        known = "".join(f"{name}, " for name in provided_models())
        raise InputError(
            f"model {source!r} does not exist; expected {known}a diffusers pipeline folder, or a Hub name such as "
            "owner/model"
        )
