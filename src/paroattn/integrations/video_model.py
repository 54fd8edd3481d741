"""Loading a video model by name or folder, and generating frames from a prompt and a seed."""

from __future__ import annotations

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

from paroattn.models import BUNDLED, folder_of
from paroattn.models.pixels import FOLD, latents_to_frames
from paroattn.models.vocabulary import PromptVocabulary

VOCABULARY_FILE = "vocabulary.safetensors"
GENERATION_FILE = "generation.json"
_PIPELINES = ("WanPipeline",)
_DTYPE_ARGUMENT = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"


@dataclass(frozen=True)
class GenerationSettings:
    """Size and sampling of the generated videos; sizes in pixels, fps for playback."""

    height: int = 480
    width: int = 832
    num_frames: int = 81
    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    fps: int = 16

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                raise ValueError(f"{item.name} is {value!r}; expected a number above 0")

    def changed(self, changes: Mapping[str, Any]) -> GenerationSettings:
        """These settings with the given ones that are not None."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})


@dataclass
class VideoModel:
    """A diffusers pipeline with what is needed to call it.

    Attributes:
        name: as the user gave it.
        pipe: the pipeline.
        settings: size and sampling.
        vocabulary: word vectors of a bundled model, which has no text encoder and no VAE; None for other models.
        examples: the bundled model's prompts for calibration and prompt/seed pairs for evaluation.
    """

    name: str
    pipe: Any
    settings: GenerationSettings
    vocabulary: PromptVocabulary | None = None
    examples: Mapping[str, Any] | None = None

    def call_arguments(self, prompt: str) -> dict[str, Any]:
        """Keyword arguments of the pipeline for a prompt; raises `ValueError` for words the model does not know."""
        arguments = {key: value for key, value in asdict(self.settings).items() if key != "fps"}
        if self.vocabulary is None:
            return {**arguments, "prompt": prompt}
        # Without a VAE the pipeline takes 8 pixels and 4 frames per latent; folded latents have 4 pixels and 1 frame.
        sizes = {
            "height": self.settings.height // FOLD * 8,
            "width": self.settings.width // FOLD * 8,
            "num_frames": (self.settings.num_frames - 1) * 4 + 1,
        }
        embeds = {"prompt_embeds": self.vocabulary.encode(prompt)}
        if self.settings.guidance_scale > 1:
            embeds["negative_prompt_embeds"] = self.vocabulary.encode("")
        return {**arguments, **sizes, **embeds, "output_type": "latent"}

    def generate(self, prompt: str, seed: int) -> Tensor:
        """Frames float32 [F, 3, H, W] in [0, 1] on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        arguments = {"output_type": "pt", **self.call_arguments(prompt), "generator": generator}
        frames = self.pipe(**arguments).frames
        if self.vocabulary is not None:
            return latents_to_frames(frames.float().cpu())
        return frames[0].float().cpu()


def load_video_model(source: str, *, device: str | None = None, **changes: Any) -> VideoModel:
    """Load the bundled model, a diffusers pipeline folder, or a pipeline from the Hub.

    Args:
        source: "moving-digits", a folder with model_index.json, or a Hub name such as "owner/model".
        device: default "cuda" if there is one, else "cpu".
        **changes: fields of `GenerationSettings` to change; None leaves the model's own.

    Raises:
        ValueError: no such model, not a pipeline that paroattn knows, or a setting out of range.

    Example:
        >>> model = load_video_model("moving-digits")                        # doctest: +SKIP
        >>> frames = model.generate("a slow red two over the flower", seed=0)  # doctest: +SKIP
    """
    folder = folder_of(source) if source in BUNDLED else Path(source)
    _check_source(source, folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    bundled = (folder / VOCABULARY_FILE).is_file()
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer")) if bundled else {}
    try:
        pipe = DiffusionPipeline.from_pretrained(
            str(folder) if folder.is_dir() else source, **{_DTYPE_ARGUMENT: dtype}, **absent
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model {source!r} cannot be loaded: {reason}") from error
    if type(pipe).__name__ not in _PIPELINES:
        raise ValueError(f"model {source!r} is a {type(pipe).__name__}; paroattn knows {', '.join(_PIPELINES)}")
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    settings, vocabulary, examples = GenerationSettings(), None, None
    if bundled:
        vocabulary = PromptVocabulary.load(folder / VOCABULARY_FILE)
        examples = json.loads((folder / GENERATION_FILE).read_text())
        settings = GenerationSettings(**examples["settings"])
    return VideoModel(source, pipe, settings.changed(changes), vocabulary, examples)


def _check_source(source: str, folder: Path) -> None:
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ValueError(f"model {source!r} is a folder without model_index.json; expected a diffusers pipeline folder")
    looks_local = folder.is_file() or source.startswith((".", "/", "~")) or source.count("/") > 1
    if not folder.is_dir() and (looks_local or "/" not in source):
        raise ValueError(
            f"model {source!r} does not exist; expected {', '.join(BUNDLED)}, a diffusers pipeline folder, "
            "or a Hub name such as owner/model"
        )
