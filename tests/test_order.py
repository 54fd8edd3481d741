"""Token orders: permutations of the grid, their inverses, and where text goes."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paroattn import TokenGrid
from paroattn.order import AXIS_ORDERS, check_permutation, inverse_order, token_order

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


def test_model_order_without_prefix_text_is_the_identity():
    assert token_order("FHW", TokenGrid(2, 3, 4, 5, "suffix")).tolist() == list(range(29))


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
