"""Which blocks are kept, and which densities are possible."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paroattn import PlanError, TokenGrid
from paroattn.block_mask import text_blocks
from paroattn.keep import check_reachable, keep_best, keep_levels, least_density

NONE = torch.zeros(4, 4, dtype=torch.bool)


@given(st.integers(0, 999), st.integers(1, 4), st.integers(1, 9), st.integers(0, 3), st.booleans(), st.floats(0.01, 1))
def test_kept_blocks_are_as_many_as_asked_and_the_best(seed, heads, blocks, text_rows, text_columns, density):
    score = torch.rand(heads, blocks, blocks, generator=torch.Generator().manual_seed(seed))
    required = torch.zeros(blocks, blocks, dtype=torch.bool)
    if text_rows:
        required[-text_rows:] = True
        required[:, -text_rows:] |= text_columns
    forced = required | (score == score.amax(-1, keepdim=True)) & ~required.any(-1, keepdim=True)
    kept = keep_best(score, density, required)
    assert kept.sum() == max(round(density * score.numel()), int(forced.sum()))
    assert kept[forced].all()
    if (kept & ~forced).any() and (~kept).any():
        assert score[kept & ~forced].min() >= score[~kept].max()


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 1), (torch.uint8, 254)])
@given(st.integers(0, 999), st.integers(1, 9), st.integers(0, 3), st.floats(0.01, 1), st.integers(0, 8))
def test_coarse_scores_keep_the_same_but_for_equal_ones(dtype, most, seed, blocks, text_rows, density, octaves):
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(2, blocks, blocks, generator=generator).pow(octaves).mul(most).to(dtype)
    score[torch.rand(score.shape, generator=generator) < 0.2] = 0
    required = torch.zeros(blocks, blocks, dtype=torch.bool)
    required[blocks - min(text_rows, blocks) :] = True
    kept, expected = keep_best(score, density, required), keep_best(score.float(), density, required)
    assert kept.sum() == expected.sum()
    assert torch.equal(score[kept].sort().values, score[expected].sort().values)
    assert kept[:, required].all()
    assert kept.any(-1).all()


@given(st.integers(0, 999), st.integers(1, 9), st.integers(0, 3))
def test_levels_keep_what_each_density_keeps_alone(seed, blocks, text_rows):
    score = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(seed))
    required = torch.zeros(blocks, blocks, dtype=torch.bool)
    required[blocks - min(text_rows, blocks) :] = True
    densities = (0.05, 0.3, 0.31, 0.8, 1.0)
    levels = keep_levels(score, densities, required)
    for number, density in enumerate(densities):
        assert torch.equal(levels <= number, keep_best(score, density, required))


def test_one_threshold_serves_all_heads_so_a_flat_head_keeps_fewer():
    score = torch.full((2, 4, 4), 0.1)
    score[1] = 10
    assert keep_best(score, 0.625, NONE).sum((1, 2)).tolist() == [4, 16]


def test_too_few_blocks_leave_one_in_every_row():
    assert keep_best(torch.rand(4, 4), 0.01, NONE).sum(1).tolist() == [1] * 4


@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("grid", [TokenGrid(4, 8, 8), TokenGrid(4, 8, 8, 70), TokenGrid(5, 7, 9, 1)])
def test_the_least_density_is_what_keep_best_reaches_and_the_message_says(grid, block_q):
    required = text_blocks(grid, block_q)
    least = least_density(grid, block_q)
    assert float(keep_best(torch.rand(required.shape), 1e-9, required).double().mean()) == least
    with pytest.raises(PlanError, match="cannot be reached") as caught:
        check_reachable(1e-9, grid, block_q)
    check_reachable(float(re.search(r"need (\d\.\d+)", str(caught.value)).group(1)), grid, block_q)
