"""Metrics that need networks: used where their weights are installed, named as missing elsewhere; never downloaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from paroattn.errors import InputError

LPIPS_WEIGHTS = "alexnet-owt-7be5be79.pth"  # torchvision's AlexNet, as torch.hub names it
CLIP_NAME = "openai/clip-vit-base-patch16"
_CHUNK = 16  # frames that go through a network at once


@dataclass
class LearnedMetrics:
    """The learned metrics that can be computed here.

    Attributes:
        missing: by name, what the others lack.
    """

    missing: dict[str, str] = field(default_factory=dict)
    _lpips: Callable[[Tensor, Tensor], Tensor] | None = None
    _clip: _Clip | None = None
    _video_features: Callable[..., Tensor] | None = None

    @torch.no_grad()
    def compare(self, frames: Tensor, reference: Tensor, prompt: str) -> dict[str, float]:
        """Figures of a video [F, 3, H, W] in [0, 1]; those that need no reference also as the change against it."""
        found: dict[str, float] = {}
        if self._lpips is not None:
            chunks = zip(frames.split(_CHUNK), reference.split(_CHUNK), strict=True)
            found["lpips"] = sum(float(self._lpips(a, b)) * len(a) for a, b in chunks) / len(frames)
        if len(frames) > 1:
            found["temporal_flickering"] = temporal_flickering(frames)
            found["temporal_flickering_change"] = found["temporal_flickering"] - temporal_flickering(reference)
        if self._clip is not None:
            own, full = self._clip.images(frames), self._clip.images(reference)
            text = self._clip.text(prompt)
            found["clip_score"] = _clip_score(own, text)
            found["clip_score_change"] = found["clip_score"] - _clip_score(full, text)
            if len(frames) > 1:
                found["background_consistency"] = _consistency(own)
                found["background_consistency_change"] = found["background_consistency"] - _consistency(full)
        return found

    @torch.no_grad()
    def features(self, frames: Tensor) -> list[float] | None:
        """Features of a video for its Fréchet distance, or None where there is no network for it."""
        if self._video_features is None:
            return None
        video = (frames * 255).transpose(0, 1).unsqueeze(0)  # [1, 3, F, H, W]
        return self._video_features(video, rescale=True, resize=True, return_features=True)[0].float().tolist()


def find_learned_metrics(clip_model: Path | None = None, fvd_model: Path | None = None) -> LearnedMetrics:
    """Look for networks.

    Args:
        clip_model: folder of a CLIP model as transformers saves it; default: openai/clip-vit-base-patch16, if it is in
            the Hugging Face cache.
        fvd_model: TorchScript file of a video network called as StyleGAN-V's I3D is; default: none.

    Returns:
        The metrics: LPIPS where torchvision is installed and AlexNet's weights are in torch.hub's folder; the CLIP
        score and VBench's background consistency where there is CLIP; features for FVD; VBench's temporal flickering.

    Raises:
        InputError: a path that was given holds no such network.
    """
    found = LearnedMetrics()
    found._lpips = _find_lpips(found.missing)
    found._clip = _find_clip(clip_model, found.missing)
    if fvd_model is None:
        found.missing["fvd"] = "a TorchScript I3D, given as --fvd-model"
    else:
        try:
            found._video_features = torch.jit.load(str(fvd_model), map_location="cpu").eval()
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise InputError(f"fvd-model {str(fvd_model)!r} is no TorchScript file: {reason}") from error
    found.missing["vbench"] = (
        "its own package and networks, but for two dimensions; it takes the videos that are written"
    )
    return found


def temporal_flickering(frames: Tensor) -> float:
    """VBench's figure of how little pixels change from frame to frame: 1 for a still video."""
    pixels = (frames * 255).round()
    return float((255 - (pixels[1:] - pixels[:-1]).abs().mean()) / 255)


def frechet_distance(features: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> float | None:
    """Fréchet distance of two sets of features (FVD for I3D's); None for fewer than two of each."""
    if min(len(features), len(reference)) < 2:
        return None
    distance = FrechetInceptionDistance(feature=_Given(len(features[0])), normalize=True).set_dtype(torch.float64)
    distance.update(torch.tensor(reference, dtype=torch.float64), real=True)
    distance.update(torch.tensor(features, dtype=torch.float64), real=False)
    return float(distance.compute())


class _Given(torch.nn.Identity):
    """In place of a network where features are there already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


@dataclass(frozen=True)
class _Clip:
    """A CLIP model; features are unit vectors."""

    model: Any
    processor: Any

    def images(self, frames: Tensor) -> Tensor:
        chunks = []
        for chunk in frames.split(_CHUNK):
            pixels = (chunk * 255).round().byte()
            inputs = self.processor(images=list(pixels), return_tensors="pt")
            chunks.append(_features(self.model.get_image_features(pixel_values=inputs["pixel_values"])))
        return torch.cat(chunks)

    def text(self, prompt: str) -> Tensor:
        inputs = self.processor(text=[prompt], return_tensors="pt", truncation=True)
        return _features(self.model.get_text_features(inputs["input_ids"], inputs["attention_mask"]))


def _features(output: Any) -> Tensor:
    features = output if isinstance(output, Tensor) else output.pooler_output  # transformers before 5, and since
    return torch.nn.functional.normalize(features.float(), dim=-1)


def _clip_score(images: Tensor, text: Tensor) -> float:
    return 100 * max(float((images @ text.T).mean()), 0.0)


def _consistency(images: Tensor) -> float:
    """VBench's background consistency: mean similarity of each frame to the first and to the one before it."""
    to_first, to_previous = images[1:] @ images[0], (images[1:] * images[:-1]).sum(-1)
    return float(((to_first.clamp(min=0) + to_previous.clamp(min=0)) / 2).mean())


def _find_lpips(missing: dict[str, str]) -> Callable[[Tensor, Tensor], Tensor] | None:
    weights = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_WEIGHTS
    if importlib.util.find_spec("torchvision") is None:
        missing["lpips"] = "package torchvision"
        return None
    if not weights.is_file():
        missing["lpips"] = f"{LPIPS_WEIGHTS} in torch.hub's folder of checkpoints"
        return None
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)


def _find_clip(folder: Path | None, missing: dict[str, str]) -> _Clip | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from transformers import CLIPModel, CLIPProcessor

    try:
        source = snapshot_download(CLIP_NAME, local_files_only=True) if folder is None else str(folder)
        model = CLIPModel.from_pretrained(source, local_files_only=True).eval()
        return _Clip(model, CLIPProcessor.from_pretrained(source, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError, KeyError) as error:
        if folder is not None:
            reason = " ".join(str(error).split())
            raise InputError(f"clip-model {str(folder)!r} holds no CLIP model: {reason}") from error
        missing["clip_score"] = f"{CLIP_NAME} in the Hugging Face cache, or a folder given as --clip-model"
        return None
