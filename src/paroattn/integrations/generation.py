"""Loading a model by name or folder, and generating frames from a prompt and a seed."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from packaging.version import Version
from torch import Tensor

from paroattn.integrations.descriptors import describe, transformers_of
from paroattn.models import BUNDLED, folder_of
from paroattn.models.pixels import FOLD, latents_to_frames, unfold_pixels
from paroattn.models.vocabulary import PromptVocabulary

VOCABULARY_FILE = "vocabulary.safetensors"
GENERATION_FILE = "generation.json"
_DTYPE_ARGUMENT = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"


@dataclass(frozen=True)
class GenerationSettings:
    """Size and sampling of what is generated; None leaves a value to the pipeline.

    Attributes:
        height, width: in pixels.
        num_frames: of a video; None for images.
        num_inference_steps: denoising steps.
        guidance_scale: 1 for none.
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
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0):
                raise ValueError(f"{item.name} is {value!r}; expected a number above 0")

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
        vocabulary: word vectors of a bundled model, which has no text encoder and no VAE; None for other models.
        examples: a bundled model's prompts for calibration and prompt/seed pairs for evaluation.
    """

    name: str
    pipe: Any
    settings: GenerationSettings
    vocabulary: PromptVocabulary | None = None
    examples: Mapping[str, Any] | None = None

    @property
    def makes_images(self) -> bool:
        """Whether the pipeline makes single images, not videos."""
        return "num_frames" not in inspect.signature(self.pipe.__call__).parameters

    def call_arguments(self, prompt: str) -> dict[str, Any]:
        """Keyword arguments of the pipeline for a prompt; raises `ValueError` for words the model does not know."""
        arguments = {key: value for key, value in asdict(self.settings).items() if key != "fps" and value is not None}
        if self.makes_images:
            arguments.pop("num_frames", None)
        if self.vocabulary is None:
            return {**arguments, "prompt": prompt}
        return {**arguments, **(self._image if self.makes_images else self._video)(self.vocabulary, prompt)}

    def generate(self, prompt: str, seed: int) -> Tensor:
        """Frames float32 [F, 3, H, W] in [0, 1] on the CPU; one for an image."""
        generator = torch.Generator().manual_seed(seed)
        arguments = {"output_type": "pt", **self.call_arguments(prompt), "generator": generator}
        result = self.pipe(**arguments)[0].float().cpu()
        if self.vocabulary is None:
            return result[0] if result.ndim == 5 else result
        return (
            unfold_pixels(result, arguments["height"] // 16 * FOLD) if self.makes_images else latents_to_frames(result)
        )

    def _video(self, vocabulary: PromptVocabulary, prompt: str) -> dict[str, Any]:
        """Of a bundled video model; raises if its settings lack a size."""
        height, width, frames = self._sizes("height", "width", "num_frames")
        embeds = {"prompt_embeds": self._encoded(vocabulary, prompt)}
        if (self.settings.guidance_scale or 1) > 1:
            embeds["negative_prompt_embeds"] = self._encoded(vocabulary, "")
        # Without a VAE the pipeline takes 8 pixels and 4 frames per latent; folded latents have 4 pixels and 1 frame.
        sizes = {"height": height // FOLD * 8, "width": width // FOLD * 8, "num_frames": (frames - 1) * 4 + 1}
        return {**sizes, **embeds, "output_type": "latent"}

    def _image(self, vocabulary: PromptVocabulary, prompt: str) -> dict[str, Any]:
        """Of a bundled image model."""
        height, width = self._sizes("height", "width")
        embeds = self._encoded(vocabulary, prompt)
        arguments: dict[str, Any] = {"prompt_embeds": embeds, "pooled_prompt_embeds": embeds.mean(1)}
        if (self.settings.guidance_scale or 1) > 1:
            empty = self._encoded(vocabulary, "")
            arguments |= {"negative_prompt_embeds": empty, "negative_pooled_prompt_embeds": empty.mean(1)}
            arguments["true_cfg_scale"] = self.settings.guidance_scale
        # Without a VAE the pipeline takes 16 pixels per token; folded pixels have 4.
        return {**arguments, "height": height // FOLD * 16, "width": width // FOLD * 16, "output_type": "latent"}

    def _encoded(self, vocabulary: PromptVocabulary, prompt: str) -> Tensor:
        """As a text encoder leaves it: where the transformer runs, in its dtype, which some pipelines take over."""
        return vocabulary.encode(prompt).to(self.pipe._execution_device, self.pipe.dtype)

    def _sizes(self, *names: str) -> list[int]:
        sizes = [getattr(self.settings, name) for name in names]
        assert all(sizes), "bundled models bring their sizes"
        return sizes


def load_model(source: str, *, device: str | None = None, **changes: Any) -> GenerativeModel:
    """Load a bundled model, a diffusers pipeline folder, or a pipeline from the Hub.

    Args:
        source: a bundled model ("moving-digits" or "moving-digits-large" for videos, "painted-digits" or
            "painted-digits-large" for images), a folder with model_index.json, or a Hub name such as "owner/model".
        device: default "cuda" if there is one, else "cpu".
        **changes: fields of `GenerationSettings` to change; None leaves the model's own.

    Raises:
        ValueError: no such model, not a pipeline that paroattn knows, or a setting out of range.

    Example:
        >>> model = load_model("moving-digits")                        # doctest: +SKIP
        >>> frames = model.generate("a slow red two over the flower", seed=0)  # doctest: +SKIP
    """
    folder = folder_of(source) if source in BUNDLED else Path(source)
    _check_source(source, folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    bundled = (folder / VOCABULARY_FILE).is_file()
    absent = _absent_components(folder) if bundled else {}
    try:
        pipe = DiffusionPipeline.from_pretrained(
            str(folder) if folder.is_dir() else source, **{_DTYPE_ARGUMENT: dtype}, **absent
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model {source!r} cannot be loaded: {reason}") from error
    try:
        describe(transformers_of(pipe)[0])
    except ValueError as error:
        raise ValueError(f"model {source!r} cannot be used: {error}") from error
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    settings, vocabulary, examples = GenerationSettings(), None, None
    if bundled:
        vocabulary = PromptVocabulary.load(folder / VOCABULARY_FILE)
        examples = json.loads((folder / GENERATION_FILE).read_text())
        settings = GenerationSettings(**examples["settings"])
    return GenerativeModel(source, pipe, settings.changed(changes), vocabulary, examples)


def _absent_components(folder: Path) -> dict[str, None]:
    """Components that a pipeline was saved without: diffusers asks to be told so."""
    index = json.loads((folder / "model_index.json").read_text())
    return {name: None for name, entry in index.items() if entry == [None, None]}


def _check_source(source: str, folder: Path) -> None:
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ValueError(f"model {source!r} is a folder without model_index.json; expected a diffusers pipeline folder")
    looks_local = folder.is_file() or source.startswith((".", "/", "~")) or source.count("/") > 1
    if not folder.is_dir() and (looks_local or "/" not in source):
        raise ValueError(
            f"model {source!r} does not exist; expected {', '.join(BUNDLED)}, a diffusers pipeline folder, "
            "or a Hub name such as owner/model"
        )
