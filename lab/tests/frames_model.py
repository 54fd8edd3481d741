"""A model that generates the tiny pipeline's latents as if they were frames."""

import tiny
import torch

from paroattn.cli.models import GenerationSettings, GenerativeModel


class FramesModel(GenerativeModel):
    """Frames of 32 x 40 pixels, 6 of them."""

    def __init__(self, name="tiny", fps=16):
        super().__init__(name, tiny.tiny_wan(), GenerationSettings(height=32, width=40, num_frames=6, fps=fps))

    def generate(self, prompt, seed):
        frames = self.pipe(**tiny.call_arguments(seed=seed)).frames[0].transpose(0, 1)[:, :3]
        return torch.nn.functional.interpolate(frames.sigmoid(), scale_factor=4)
