"""The token grid: sizes, where visual tokens start, and what it refuses."""

import pytest

from paroattn import TokenGrid


def test_tokens_are_visual_tokens_plus_text():
    grid = TokenGrid(13, 30, 45, text_tokens=226, text_position="prefix")
    assert (grid.visual_tokens, grid.tokens) == (17550, 17776)


@pytest.mark.parametrize(("position", "start"), [("prefix", 5), ("suffix", 0)])
def test_visual_tokens_start_after_prefix_text_only(position, start):
    assert TokenGrid(2, 3, 4, text_tokens=5, text_position=position).visual_start == start


def test_grid_without_text_starts_at_zero():
    assert TokenGrid(2, 3, 4, text_position="prefix").visual_start == 0


def test_str_names_shape_and_text():
    assert str(TokenGrid(2, 30, 50)) == "2x30x50 (3,000 visual tokens)"
    assert str(TokenGrid(2, 3, 4, 5, "prefix")) == "2x3x4 (24 visual tokens) + 5 text tokens (prefix)"


def test_references_are_boxes_that_follow():
    grid = TokenGrid(1, 4, 6, 5, "prefix", references=[[1, 2, 3], (2, 2, 2)])
    assert grid == TokenGrid(1, 4, 6, 5, "prefix", ((1, 2, 3), (2, 2, 2)))
    assert (grid.size, grid.boxes) == ((1, 4, 6), ((1, 4, 6), (1, 2, 3), (2, 2, 2)))
    assert (grid.visual_tokens, grid.tokens, grid.visual_start) == (38, 43, 5)
    assert str(grid) == "1x4x6 and 1x2x3 and 2x2x2 (38 visual tokens) + 5 text tokens (prefix)"
    assert TokenGrid(**grid.as_json()) == grid
    assert not {"references", "references_position"} & set(TokenGrid(1, 4, 6).as_json())
    before = TokenGrid(1, 4, 6, 5, "prefix", grid.references, "before")
    assert (grid.starts, before.starts) == ((5, 29, 35), (19, 5, 11))
    assert TokenGrid(**before.as_json()) == before


@pytest.mark.parametrize("references", [3, "1x2x3", [3], [(1, 2)], [(1, 2, 0)], [(1, 2.0, 3)], [(1, 1, 1)] * 17])
def test_wrong_references_are_refused(references):
    with pytest.raises(ValueError, match="references"):
        TokenGrid(1, 1, 1, references=references)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "3", None])
@pytest.mark.parametrize("name", ["frames", "height", "width"])
def test_sizes_are_positive_integers(name, size):
    with pytest.raises(ValueError, match=name):
        TokenGrid(**{"frames": 1, "height": 1, "width": 1, name: size})


@pytest.mark.parametrize("text_tokens", [-1, 0.5, False])
def test_text_tokens_are_a_non_negative_integer(text_tokens):
    with pytest.raises(ValueError, match="text_tokens"):
        TokenGrid(1, 1, 1, text_tokens)


def test_unknown_position_of_references_is_refused():
    with pytest.raises(ValueError, match="references_position is 'between'; expected 'before' or 'after'"):
        TokenGrid(1, 1, 1, references=((1, 1, 1),), references_position="between")


def test_unknown_text_position_is_refused():
    with pytest.raises(ValueError, match="'middle'; expected 'prefix' or 'suffix'"):
        TokenGrid(1, 1, 1, 2, "middle")


def test_equal_grids_are_equal():
    assert TokenGrid(2, 3, 4) == TokenGrid(2, 3, 4)
    assert TokenGrid(2, 3, 4) != TokenGrid(2, 4, 3)
