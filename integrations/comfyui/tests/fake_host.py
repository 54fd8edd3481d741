"""The stand-in as a host of tests."""

from __future__ import annotations

import fake_comfy
import fake_models
import torch


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny_diffusers(family):
    """A tiny diffusers transformer of Wan or Flux."""
    import tiny_models

    torch.manual_seed(0)
    build = {"Wan": tiny_models._wan_transformer, "Flux": tiny_models._flux_transformer}[family]
    return fake_models.strong(build())


class FakeHost:
    """Tiny models of the stand-in.

    `cond` makes conditioning: text of `tokens` tokens, and by name what the traps are about: an `area` (height, width,
    y, x), a `mask` of the text [1, tokens], a `reference` latent.
    """

    name = "the stand-in"

    def __init__(self, models):
        fake_comfy.install(models)

    def patcher_of(self, family, transformer):
        """A model with the weights of a diffusers transformer of Wan or Flux."""
        return fake_comfy.ModelPatcher(fake_comfy.BaseModel(*self._around(family, transformer)))

    def _around(self, family, transformer):
        kinds = {"Wan": fake_models.WanModel, "Wan VACE": fake_models.VaceWanModel, "Flux": fake_models.Flux}
        return kinds[family](transformer), 1.0 if family == "Flux" else 1000.0

    def patcher(self, family):
        own = {
            "HunyuanVideo": (fake_models.HunyuanVideo, 1000.0),
            "HunyuanVideo, text first": (fake_models.HunyuanVideoTextFirst, 1000.0),
            "Qwen-Image": (fake_models.QwenImageTransformer2DModel, 1.0),
            "LTX-Video": (fake_models.LTXVModel, 1.0),
        }
        if family not in own:
            return self.patcher_of(family, tiny_diffusers("Flux" if family == "Flux" else "Wan"))
        kind, multiplier = own[family]
        return fake_comfy.ModelPatcher(fake_comfy.BaseModel(fake_models.strong(kind()), multiplier))

    def in_16_bits(self, family, dtype):
        patcher = self.patcher(family)
        patcher.model.diffusion_model.to(dtype)
        patcher.model.dtype = dtype
        return patcher

    def cond(self, family, seed=1, tokens=12, area=None, mask=None, reference=None):
        extra = {}
        if family == "Flux":
            extra |= {"y": random(seed + 50, 1, 32), "guidance": torch.tensor([3.5])}
        if area is not None:
            extra["area"] = area
        if mask is not None:
            extra["attention_mask"] = mask
        if reference is not None and family == "Wan":
            extra["reference_latent"] = reference
        elif reference is not None:
            extra["ref_latents"] = [reference]
        return [[random(seed, 1, tokens, 32), extra]]

    def text_side(self, family):
        """Where text stands in the model's sequence."""
        return {"HunyuanVideo": "suffix", "HunyuanVideo, text first": "prefix"}.get(family, "prefix")

    def sample(self, patcher, noise, sigmas, positive, negative=None, cfg=1.0, second_order=False, **how):
        return fake_comfy.sample(
            patcher, noise, torch.as_tensor(sigmas), positive, negative, cfg, second_order, fake_comfy.Sampling(**how)
        )
