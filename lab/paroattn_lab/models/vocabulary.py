"""Prompts of the bundled models: a small table of words, one learned vector each."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from paroattn.errors import InputError
from paroattn.files import save_tensors

PADDING = "<pad>"


class PromptVocabulary:
    """Turns a prompt into `prompt_embeds` by looking up its words.

    Args:
        words: the known words in lower case; the first is the padding word.
        embedding: [len(words), D] float32, one row per word.
        length: number of words of every encoded prompt; shorter prompts are padded.

    Example:
        >>> vocabulary = PromptVocabulary(["<pad>", "red", "seven"], torch.zeros(3, 8), length=4)
        >>> vocabulary.encode("Red seven").shape
        torch.Size([1, 4, 8])
    """

    def __init__(self, words: list[str], embedding: Tensor, length: int):
        if not words or words[0] != PADDING or embedding.shape[0] != len(words):
            raise InputError(
                f"words must start with {PADDING!r} and match the rows of embedding; "
                f"got {len(words)} words and {embedding.shape[0]} rows"
            )
        self.words = list(words)
        self.embedding = embedding
        self.length = length
        self._index = {word: index for index, word in enumerate(words)}

    def indices(self, prompt: str) -> Tensor:
        """Word indices [length] int64 of a prompt; raises `InputError` for unknown words or too many."""
        found = re.findall(r"[^\s,.;:!?]+", prompt.lower())
        unknown = sorted({word for word in found if word not in self._index or word == PADDING})
        if unknown:
            raise InputError(
                f"prompt has unknown words: {', '.join(unknown)}. This model knows: {', '.join(self.words[1:])}"
            )
        if len(found) > self.length:
            raise InputError(f"prompt has {len(found)} words; this model takes at most {self.length}. Shorten it.")
        numbers = [self._index[word] for word in found]
        return torch.tensor(numbers + [0] * (self.length - len(numbers)))

    def encode(self, prompt: str) -> Tensor:
        """Prompt embeddings [1, length, D] float32."""
        return self.embedding[self.indices(prompt)].unsqueeze(0)

    def save(self, path: Path) -> None:
        """Write words and vectors to one safetensors file."""
        header = {"words": json.dumps(self.words), "length": str(self.length)}
        tensors = {"embedding": self.embedding.contiguous()}
        save_tensors(path, tensors, header)

    @classmethod
    def load(cls, path: Path) -> PromptVocabulary:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
            return cls(json.loads(header["words"]), file.get_tensor("embedding"), int(header["length"]))
