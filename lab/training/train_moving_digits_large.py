"""Train the larger bundled video model, moving-digits-large, on one GPU: 16,384 visual tokens, sharp photographs.

    python lab/training/train_moving_digits_large.py --folder checkpoints/moving_digits_large --seconds 500

Single frames first, then ever longer clips. As for the small model, the network predicts the clean video and the loss
is that of the velocity. `export_moving_digits.py --model moving-digits-large` turns the checkpoint into the pipeline
folder that the package ships.
"""

from __future__ import annotations

from functools import partial

import torch
from moving_digits import PROMPT_LENGTH, WORDS, MovingDigits
from paroattn_lab.models.pixels import frames_to_latents
from paroattn_lab.models.vocabulary import PromptVocabulary
from rectified_flow import noise_levels, some_without_prompt
from timed_training import Stage, command_line, train
from torch import Tensor
from train_moving_digits import LEAST_LEVEL, PromptedTransformer

SEED = 20261125
PEAK_RATE = 8e-4
SIZE = 256
STAGES = (Stage(SIZE, 1, 64, 0.3), Stage(SIZE, 4, 16, 0.6), Stage(SIZE, 8, 8, 0.75), Stage(SIZE, 16, 4, 1.0))
HEADS, LAYERS = 6, 6


def loss_of(model: PromptedTransformer, data: MovingDigits, stage: Stage, generator: torch.Generator) -> Tensor:
    clips, prompts = data.batch(stage.batch, stage.frames, generator)
    clean = torch.cat([frames_to_latents(clip) for clip in clips])
    vocabulary = PromptVocabulary(WORDS, torch.zeros(len(WORDS), 1), PROMPT_LENGTH)
    words = [vocabulary.indices(prompt) for prompt in some_without_prompt(prompts, generator)]
    noise, level = torch.randn_like(clean), noise_levels(stage.batch, clean.device)
    mix = level.view(-1, 1, 1, 1, 1)
    predicted = model((1 - mix) * clean + mix * noise, level * 1000, torch.stack(words).to(clean.device))
    return ((predicted.float() - clean) / mix.clamp(min=LEAST_LEVEL)).square().mean()


if __name__ == "__main__":
    given = command_line(__doc__, seconds=500.0).parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    model = PromptedTransformer(HEADS, LAYERS).to(given.device)
    draw = partial(loss_of, model, MovingDigits(SIZE, device=given.device))
    settings = {"folder": given.folder, "seconds": given.seconds, "rate": PEAK_RATE, "seed": SEED}
    train(model, draw, STAGES, **settings)
