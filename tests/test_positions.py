"""What is found in tensors of positions and masks, and how often they are read."""

import gc

import pytest
import torch

from paroattn.integrations.positions import box_of_positions, common_sum, count_at_end, images_of_positions


def positions(frames, height, width):
    return torch.cartesian_prod(*(torch.arange(size) for size in (frames, height, width)))


@pytest.fixture
def reads(monkeypatch):
    """Counts calls of `Tensor.unique`, one for each axis of a box that is looked at."""
    counted, unique = [], torch.Tensor.unique
    monkeypatch.setattr(torch.Tensor, "unique", lambda *a, **k: counted.append(1) or unique(*a, **k))
    return counted


def test_a_tensor_is_read_once_also_by_way_of_new_views_of_it(reads):
    ids = positions(2, 3, 4).unsqueeze(0)
    assert [box_of_positions(ids[0]) for _ in range(3)] == [(2, 3, 4)] * 3
    assert len(reads) == 3
    assert box_of_positions(ids[0, :12]) == (1, 3, 4)
    assert len(reads) == 6


def test_a_tensor_that_was_written_to_is_read_again():
    ids = positions(1, 3, 4)
    assert box_of_positions(ids) == (1, 3, 4)
    ids.copy_(positions(1, 4, 3))
    assert box_of_positions(ids) == (1, 4, 3)
    with torch.inference_mode():  # where nothing tells of it
        ids = positions(1, 3, 4)
        assert box_of_positions(ids) == (1, 3, 4)
        ids.copy_(positions(1, 4, 3))
        assert box_of_positions(ids) == (1, 4, 3)


def test_what_is_found_in_a_tensor_does_not_keep_it_nor_pass_to_the_next_one():
    for size in ((1, 2, 6), (1, 6, 2), (1, 3, 4), (1, 4, 3)) * 5:  # their memory is taken over
        ids = positions(*size)
        assert box_of_positions(ids) == size
        del ids
        gc.collect()


def test_images_follow_each_other_by_frame():
    second = positions(1, 2, 2) + torch.tensor([1, 0, 0])
    assert images_of_positions(torch.cat((positions(1, 3, 4), second))) == ((1, 3, 4), (1, 2, 2))
    assert images_of_positions(torch.cat((positions(1, 3, 4), second[:3]))) is None


def test_masks_and_kinds():
    assert common_sum(torch.tensor([[1, 1, 0], [0, 1, 1]])) == 2
    assert common_sum(torch.tensor([[1, 1, 0], [0, 1, 0]])) is None
    assert count_at_end(torch.tensor([[5, 2, 2], [5, 2, 2]])) == 2
    assert count_at_end(torch.tensor([[2, 5, 2]])) is None
    assert count_at_end(torch.tensor([[5, 2, 2], [5, 5, 2]])) is None
