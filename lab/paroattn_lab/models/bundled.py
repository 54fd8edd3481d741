"""Loading the bundled models, and calling them: they have word vectors instead of a text encoder, and no VAE."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from paroattn.cli.models import GenerationSettings, GenerativeModel, load_pipeline
from paroattn.errors import require
from paroattn_lab.models.pixels import FOLD, latents_to_frames, unfold_pixels
from paroattn_lab.models.vocabulary import PromptVocabulary

VIDEO, IMAGE = "moving-digits", "painted-digits"
VIDEO_LARGE, IMAGE_LARGE = f"{VIDEO}-large", f"{IMAGE}-large"
TINY, LARGE = "tiny", "large"  # for CPUs and for GPUs; short names on the command line
VOCABULARY_FILE = "vocabulary.safetensors"
GENERATION_FILE = "generation.json"


@dataclass
class BundledModel(GenerativeModel):
    """A bundled model.

    Attributes:
        vocabulary: its word vectors.
    """

    vocabulary: PromptVocabulary | None = None

    def call_arguments(self, prompt: str) -> dict[str, Any]:
        """Keyword arguments of the pipeline for a prompt; raises `InputError` for words the model does not know."""
        arguments = super().call_arguments(prompt)
        del arguments["prompt"]
        return {**arguments, **(self._image if self.makes_images else self._video)(prompt)}

    def frames_of(self, output: Tensor) -> Tensor:
        """Frames of the final latents, which are folded pixels."""
        if not self.makes_images:
            return latents_to_frames(output)
        (height,) = self._sizes("height")
        return unfold_pixels(output, height // FOLD * FOLD)

    def _video(self, prompt: str) -> dict[str, Any]:
        height, width, frames = self._sizes("height", "width", "num_frames")
        embeds = {"prompt_embeds": self._encoded(prompt)}
        if (self.settings.guidance_scale or 1) > 1:
            embeds["negative_prompt_embeds"] = self._encoded("")
        # Without a VAE the pipeline takes 8 pixels and 4 frames per latent; folded latents have 4 pixels and 1 frame.
        sizes = {"height": height // FOLD * 8, "width": width // FOLD * 8, "num_frames": (frames - 1) * 4 + 1}
        return {**sizes, **embeds, "output_type": "latent"}

    def _image(self, prompt: str) -> dict[str, Any]:
        height, width = self._sizes("height", "width")
        embeds = self._encoded(prompt)
        arguments: dict[str, Any] = {"prompt_embeds": embeds, "pooled_prompt_embeds": embeds.mean(1)}
        if (self.settings.guidance_scale or 1) > 1:
            empty = self._encoded("")
            arguments |= {"negative_prompt_embeds": empty, "negative_pooled_prompt_embeds": empty.mean(1)}
            arguments["true_cfg_scale"] = self.settings.guidance_scale
        # Without a VAE the pipeline takes 16 pixels per token; folded pixels have 4.
        return {**arguments, "height": height // FOLD * 16, "width": width // FOLD * 16, "output_type": "latent"}

    def _encoded(self, prompt: str) -> Tensor:
        """As a text encoder leaves it: where the transformer runs, in its dtype, which some pipelines take over."""
        assert self.vocabulary is not None
        return self.vocabulary.encode(prompt).to(self.pipe._execution_device, self.pipe.dtype)

    def _sizes(self, *names: str) -> list[int]:
        sizes = [getattr(self.settings, name) for name in names]
        assert all(sizes), "bundled models bring their sizes"
        return sizes


def load_bundled(name: str | Path, *, device: str | None = None, **changes: Any) -> BundledModel:
    """Load a bundled model, or one like it from a folder.

    Args:
        name: "moving-digits" or "moving-digits-large" for videos, "painted-digits" or "painted-digits-large" for
            images; "tiny" and "large" are the video models; or a folder.
        device: default "cuda" if there is one, else "cpu".
        **changes: fields of `GenerationSettings` to change; None leaves the model's own.

    Raises:
        MissingPartError: the models are not installed.

    Example:
        >>> model = load_bundled("moving-digits")  # doctest: +SKIP
        >>> frames = model.generate("a slow red two over the flower", seed=0)  # doctest: +SKIP
    """
    if name in (TINY, LARGE):
        name = bundled_name(str(name), image=False)
    folder = name if isinstance(name, Path) else folder_of(name)
    # Components that a pipeline was saved without: diffusers asks to be told so.
    index = json.loads((folder / "model_index.json").read_text())
    absent = {component: None for component, entry in index.items() if entry == [None, None]}
    pipe = load_pipeline(folder, device, **absent)
    own = json.loads((folder / GENERATION_FILE).read_text())
    return BundledModel(
        name=str(name),
        pipe=pipe,
        settings=GenerationSettings(**own["settings"]).changed(changes),
        calibration_prompts=tuple(own["calibration_prompts"]),
        evaluation_pairs=tuple((prompt, seed) for prompt, seed in own["evaluation_pairs"]),
        vocabulary=PromptVocabulary.load(folder / VOCABULARY_FILE),
    )


def bundled_name(size: str, *, image: bool) -> str:
    """The bundled model of a size, `TINY` or `LARGE`."""
    return {TINY: (VIDEO, IMAGE), LARGE: (VIDEO_LARGE, IMAGE_LARGE)}[size][image]


def folder_of(name: str) -> Path:
    """The folder of a bundled model, in diffusers' pipeline format."""
    require("paroattn-lab[models]", "paroattn_models")
    import paroattn_models

    return paroattn_models.folder_of(name)


BUNDLED_MODELS: dict[str, Callable[..., GenerativeModel]] = dict.fromkeys(
    (VIDEO, IMAGE, VIDEO_LARGE, IMAGE_LARGE, TINY, LARGE), load_bundled
)
"""What the library's command line finds by the entry point "paroattn.models"; the first is its default."""
