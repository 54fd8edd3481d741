"""The measurement of plan files: what it makes, and that its codings are those of the same masks."""

import plan_sizes
import pytest
import torch

from paroattn.block_mask import block_count
from paroattn.grid import TokenGrid
from paroattn.plan import Plan

GRID = TokenGrid(4, 16, 32, 70)


@pytest.fixture
def workload(monkeypatch):
    monkeypatch.setattr(plan_sizes, "WORKLOADS", {"small": (2, 5, 64, GRID)})
    return "small"


def test_masks_have_the_density_and_change_little():
    masks = plan_sizes.structured_masks(GRID, "little", seed=1)
    blocks = block_count(GRID.tokens, 64)
    assert masks.shape == (10, blocks, blocks)
    assert masks.float().mean() == pytest.approx(0.3, abs=0.05)
    changed = (masks[1:] != masks[:-1]).float().mean()
    assert 0 < changed < 0.1
    noisy = plan_sizes.structured_masks(GRID, "as bundled", seed=1)
    assert (noisy[1:] != noisy[:-1]).float().mean() > changed


def test_a_whole_plan_repeats_heads_and_its_sizes_are_theirs(workload, tmp_path):
    plan, sizes = plan_sizes.whole_plan(workload, "little")
    assert plan.mask_index.shape == (10, 2, 5)
    heads = plan.mask_table.view(10, 10, *plan.mask_table.shape[1:])
    assert torch.equal(heads[0], heads[8])
    assert not torch.equal(heads[0], heads[1])
    saved = plan_sizes.save(plan, tmp_path / "plan")
    assert saved["file_bytes"] == pytest.approx(sizes["palette"], rel=0.3, abs=5000)
    assert torch.equal(Plan.load(tmp_path / "plan").mask_table, plan.mask_table)
    assert sizes["palette"] < sizes["single masks"] < sizes["bits"]
    assert plan_sizes.load(tmp_path / "plan")["load_seconds"] > 0
