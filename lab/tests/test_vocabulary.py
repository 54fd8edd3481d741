"""Prompts of the bundled models: words to vectors, and clear words about unknown ones."""

import pytest
import torch
from paroattn_lab.models.vocabulary import PromptVocabulary

WORDS = ["<pad>", "red", "seven", "left"]


def vocabulary(length=4):
    return PromptVocabulary(WORDS, torch.arange(12.0).view(4, 3), length)


def test_words_become_their_rows_and_padding_fills_the_rest():
    assert vocabulary().indices("Red, SEVEN.").tolist() == [1, 2, 0, 0]
    encoded = vocabulary().encode("seven left")
    assert encoded.tolist() == [[[6, 7, 8], [9, 10, 11], [0, 1, 2], [0, 1, 2]]]


def test_order_and_repetition_count():
    assert vocabulary().indices("left red left").tolist() == [3, 1, 3, 0]


def test_the_empty_prompt_is_all_padding():
    assert vocabulary().indices(" ").tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("prompt", ["red green", "<pad>", "red <PAD>"])
def test_unknown_words_are_named_with_the_known_ones(prompt):
    with pytest.raises(ValueError, match=r"unknown words: (green|<pad>)\. This model knows: red, seven, left"):
        vocabulary().indices(prompt)


def test_too_many_words_are_refused():
    assert vocabulary().indices("red red red red").tolist() == [1] * 4
    with pytest.raises(ValueError, match="5 words; this model takes at most 4"):
        vocabulary().indices("red red red red red")


@pytest.mark.parametrize("words", [[], ["red"], ["<pad>", "red"]])
def test_words_must_match_the_embedding_and_start_with_padding(words):
    with pytest.raises(ValueError, match="words must start with '<pad>'"):
        PromptVocabulary(words, torch.zeros(1, 3), 4)


def test_save_and_load_give_the_same_vocabulary(tmp_path):
    path = tmp_path / "vocabulary.safetensors"
    vocabulary(length=6).save(path)
    loaded = PromptVocabulary.load(path)
    assert (loaded.words, loaded.length) == (WORDS, 6)
    assert torch.equal(loaded.embedding, vocabulary().embedding)
    assert list(tmp_path.iterdir()) == [path]
