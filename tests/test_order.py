"""Token orders: permutations of the grid, their inverses, and where text goes."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paroattn import TokenGrid
from paroattn.order import (
    AXIS_ORDERS,
    box_sizes,
    candidate_orders,
    check_permutation,
    fitting_order,
    inverse_order,
    token_order,
    token_places,
)

grids = st.builds(
    TokenGrid,
    st.integers(1, 7),
    st.integers(1, 7),
    st.integers(1, 7),
    st.integers(0, 5),
    st.sampled_from(("prefix", "suffix")),
)


def test_the_six_axis_orders_are_all_permutations_of_the_axes():
    assert set(AXIS_ORDERS) == {"".join(letters) for letters in itertools.permutations("FHW")}
    assert len(AXIS_ORDERS) == 6


@given(grids, st.sampled_from(AXIS_ORDERS))
def test_order_lists_the_box_with_the_last_letter_fastest_and_text_last(grid, name):
    sizes = {"F": grid.frames, "H": grid.height, "W": grid.width}
    expected = []
    for coordinates in itertools.product(*(range(sizes[axis]) for axis in name)):
        at = dict(zip(name, coordinates, strict=True))
        expected.append((at["F"] * grid.height + at["H"]) * grid.width + at["W"] + grid.visual_start)
    text_start = 0 if grid.text_position == "prefix" else grid.visual_tokens
    expected += range(text_start, text_start + grid.text_tokens)
    assert token_order(name, grid).tolist() == expected


@given(grids, st.sampled_from(AXIS_ORDERS))
def test_inverse_undoes_every_order(grid, name):
    order = token_order(name, grid)
    x = torch.arange(grid.tokens) * 3
    assert torch.equal(x[order][inverse_order(order)], x)
    assert torch.equal(order[inverse_order(order)], torch.arange(grid.tokens))


def test_inverse_works_head_by_head_and_for_int32():
    orders = torch.stack([torch.randperm(11) for _ in range(3)]).int()
    inverse = inverse_order(orders)
    assert inverse.dtype == torch.int64
    for order, undone in zip(orders, inverse, strict=True):
        assert order[undone].tolist() == list(range(11))


BOXES = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)), max_size=3).map(tuple)


@given(grids, BOXES, st.sampled_from(["before", "after"]))
def test_every_box_has_the_order_of_a_grid_of_its_own(grid, references, position):
    whole = replace(grid, references=references, references_position=position)
    boxes = [TokenGrid(*size) for size in whole.boxes]
    in_sequence = [*boxes[1:], boxes[0]] if position == "before" else boxes
    lengths = [box.tokens for box in in_sequence]
    starts = [whole.visual_start + sum(lengths[:number]) for number in range(len(boxes))]
    assert list(whole.starts) == ([starts[-1], *starts[:-1]] if position == "before" else starts)
    for name in candidate_orders(whole):
        expected = []
        for own, start in zip(boxes, whole.starts, strict=True):
            expected += (token_order(fitting_order(name, own), own) + start).tolist()
        order = token_order(name, whole)
        assert order[: whole.visual_tokens].tolist() == expected
        assert order.sort().values.tolist() == list(range(whole.tokens))
        places, sizes = token_places(name, whole), box_sizes(whole)
        places_of_model = places[inverse_order(order[: whole.visual_tokens] - whole.visual_start)]
        assert places_of_model.tolist() == [
            list(place) for box in in_sequence for place in itertools.product(*map(range, box.size))
        ]
        assert (places < sizes).all()


def test_model_order_without_prefix_text_is_the_identity():
    assert token_order("FHW", TokenGrid(2, 3, 4, 5, "suffix")).tolist() == list(range(29))


def extents(order, grid, length):
    """Token count of the smallest box around each run of `length` visual tokens."""
    token = order[: grid.visual_tokens] - grid.visual_start
    frame = grid.height * grid.width
    places = torch.stack((token // frame, token % frame // grid.width, token % grid.width), 1)
    runs = places[: len(places) // length * length].view(-1, length, 3)
    return (runs.amax(1) - runs.amin(1) + 1).prod(1)


@pytest.mark.parametrize("name", ["8x4x2", "4x4x4", "2x8x4", "1x8x8", "1x1x64", "4x1x16"])
@pytest.mark.parametrize("grid", [TokenGrid(8, 16, 64), TokenGrid(16, 8, 64, 5, "prefix"), TokenGrid(24, 40, 64)])
def test_every_block_is_the_tile_and_sub_blocks_and_pairs_are_boxes(name, grid):
    order = token_order(name, grid)
    assert order.sort().values.tolist() == list(range(grid.tokens))
    for length in (8, 16, 32, 64, 128):
        assert (extents(order, grid, length) == length).all()
    token = order[:64] - grid.visual_start
    frame = grid.height * grid.width
    sides = [
        int(axis.max() - axis.min()) + 1 for axis in (token // frame, token % frame // grid.width, token % grid.width)
    ]
    assert "x".join(map(str, sides)) == name


@given(grids)
def test_tiled_orders_are_permutations_of_any_grid(grid):
    for name in candidate_orders(grid):
        order = token_order(name, grid)
        assert order.sort().values.tolist() == list(range(grid.tokens))
        text = grid.tokens - grid.visual_tokens
        first = 0 if grid.text_position == "prefix" else grid.visual_tokens
        assert order[grid.visual_tokens :].tolist() == list(range(first, first + text))


@pytest.mark.parametrize(("grid", "whole"), [(TokenGrid(13, 30, 45), 0.98), (TokenGrid(21, 45, 80), 0.99)])
def test_what_a_tile_leaves_over_is_tiled_in_turn(grid, whole):
    for name in ("4x4x4", "1x8x8", "8x2x4"):
        assert (extents(token_order(name, grid), grid, 64) == 64).double().mean() >= whole


def test_candidates_cut_the_grid_into_different_blocks():
    assert candidate_orders(TokenGrid(1, 16, 16)) == ("FHW", "FWH", "1x8x8")
    names = candidate_orders(TokenGrid(16, 16, 16))
    assert names[:6] == AXIS_ORDERS
    assert "1x4x16" not in names  # the blocks of FHW
    assert {"4x4x4", "8x4x2", "1x8x8"} < set(names)


@pytest.mark.parametrize("name", ["4x4x5", "4x4", "64x1x1", "1x64x1", "0x8x8", "4X4X4"])
def test_tiles_that_are_none_or_do_not_fit_are_refused(name):
    with pytest.raises(ValueError, match=f"'{name}' is"):
        token_order(name, TokenGrid(8, 8, 64))


@pytest.mark.parametrize("name", ["fhw", "FHH", "", "FHWF"])
def test_unknown_order_lists_the_valid_ones(name):
    with pytest.raises(ValueError, match="FHW, FWH, HFW, HWF, WFH, WHF"):
        token_order(name, TokenGrid(1, 2, 3))


@pytest.mark.parametrize(
    ("permutation", "message"),
    [
        (torch.arange(5.0), "dtype"),
        (torch.arange(6), "shape"),
        (torch.arange(5).expand(3, 5), "shape"),
        (torch.tensor([0, 1, 2, 3, 3]), "once per head"),
        (torch.tensor([1, 2, 3, 4, 5]), "once per head"),
        (torch.tensor([[0, 1, 2, 3, 4], [-1, 1, 2, 3, 4]]), "once per head"),
    ],
)
def test_check_permutation_refuses(permutation, message):
    with pytest.raises(ValueError, match=message):
        check_permutation(permutation, heads=2, tokens=5)


def test_check_permutation_accepts_one_for_all_or_one_per_head():
    check_permutation(torch.tensor([4, 2, 0, 1, 3]), heads=2, tokens=5)
    check_permutation(torch.tensor([[4, 2, 0, 1, 3], [0, 1, 2, 3, 4]], dtype=torch.int32), heads=2, tokens=5)
