"""Train the bundled image models: small FluxTransformer2DModels, rectified flow, on one GPU.

    python lab/training/train_painted_digits.py --model painted-digits-large --folder checkpoints/painted_digits_large

Small pictures first, then whole ones; the learning rate falls over the time that is given. At the end the folder holds
`checkpoint.pt`, weights averaged over the last steps, and `loss.csv`. `export_painted_digits.py` turns it into the
pipeline folder that the package ships.
"""

from __future__ import annotations

from functools import partial

import torch
from diffusers import FluxTransformer2DModel
from painted_digits import PROMPT_LENGTH, WORDS, PaintedDigits
from paroattn_lab.models import IMAGE, IMAGE_LARGE
from paroattn_lab.models.pixels import FOLD, fold_pixels
from rectified_flow import noise_levels, some_without_prompt
from timed_training import Stage, command_line, train
from torch import Tensor, nn

SEED = 20261125
TEXT_DIM = 64
PEAK_RATE = 1e-3
STAGES = (Stage(128, 1, 96, 0.4), Stage(256, 1, 32, 1.0))
SHAPES = {
    IMAGE: {"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 4},
    IMAGE_LARGE: {"num_layers": 1, "num_single_layers": 5, "num_attention_heads": 6},
}


def build_transformer(model: str) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=3 * FOLD**2,
        attention_head_dim=64,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        guidance_embeds=False,
        axes_dims_rope=(16, 24, 24),
        **SHAPES[model],
    )


def position_ids(height: int, width: int) -> Tensor:
    """As FluxPipeline makes them: [height * width, 3], image number, row and column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((torch.zeros_like(rows), rows, columns), -1).flatten(0, 1).float()


class PromptedTransformer(nn.Module):
    """The transformer with the word vectors it is conditioned on, trained together."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.transformer = build_transformer(model)
        self.words = nn.Embedding(len(WORDS), TEXT_DIM)

    def forward(self, tokens: Tensor, level: Tensor, words: Tensor, side: int) -> Tensor:
        embeds = self.words(words)
        return self.transformer(
            hidden_states=tokens,
            timestep=level,
            encoder_hidden_states=embeds,
            pooled_projections=embeds.mean(1),
            img_ids=position_ids(side, side).to(tokens.device),
            txt_ids=torch.zeros(PROMPT_LENGTH, 3, device=tokens.device),
        ).sample


def loss_of(model: PromptedTransformer, data: PaintedDigits, stage: Stage, generator: torch.Generator) -> Tensor:
    """The network predicts the velocity."""
    pictures, prompts = data.batch(stage.batch, stage.size, generator)
    clean, words = fold_pixels(pictures), data.indices(some_without_prompt(prompts, generator))
    noise, level = torch.randn_like(clean), noise_levels(stage.batch, clean.device)
    mix = level.view(-1, 1, 1)
    predicted = model((1 - mix) * clean + mix * noise, level, words, stage.size // FOLD)
    return (predicted.float() - (noise - clean)).square().mean()


if __name__ == "__main__":
    parser = command_line(__doc__, seconds=420.0)
    parser.add_argument("--model", choices=tuple(SHAPES), default=IMAGE_LARGE, help="which bundled model")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    model = PromptedTransformer(given.model).to(given.device)
    draw = partial(loss_of, model, PaintedDigits(torch.device(given.device)))
    settings = {"folder": given.folder, "seconds": given.seconds, "rate": PEAK_RATE, "seed": SEED}
    train(model, draw, STAGES, **settings)
