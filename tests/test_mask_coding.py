"""Masks as a plan file holds them: they come back, in little space and memory, and other masks than these do not."""

import subprocess
import sys
import time

import pytest
import torch

from paroattn import PlanError, TokenGrid
from paroattn.block_mask import pack_bits, text_blocks, unpack_bits
from paroattn.mask_coding import MaskRules, check_stacks, decode_masks, encode_masks

GRIDS = [TokenGrid(2, 9, 33, 11), TokenGrid(1, 16, 32), TokenGrid(1, 3, 3, 7, "prefix")]


def random_masks(rules, count, grid, density=0.4, seed=0):
    """Masks that obey, bool [count, q blocks, kv blocks]."""
    masks = torch.rand(count, rules.rows, rules.columns, generator=torch.Generator().manual_seed(seed)) < density
    rows = torch.arange(rules.rows)
    masks[:, rows, (rows * 5) % rules.columns] = True
    return masks if rules.rows < rules.columns else masks | text_blocks(grid)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("buckets", [1, 8, 9, 16, 17, 40])
def test_masks_come_back(grid, buckets, threads):
    rules = MaskRules(grid, 64, 64)
    table = pack_bits(random_masks(rules, buckets * 6, grid))
    index = torch.randint(len(table), (buckets, 2, 3), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        coded = encode_masks(table, index)
        masks = len(coded["mask_index"].unique())
        check_stacks(coded["mask_stacks"], len(coded["mask_data"]), masks)
        decoded = decode_masks(coded["mask_stacks"], coded["mask_data"], rules)
    finally:
        torch.set_num_threads(before)
    assert len(decoded) == masks == len(index.unique())
    assert torch.equal(decoded[coded["mask_index"].long()], table[index.long()])
    rules.check(decoded)


def test_rows_of_128_queries():
    grid = TokenGrid(1, 20, 33, 30)
    rules = MaskRules(grid, 128, 64)
    masks = random_masks(rules, 4, grid) | text_blocks(grid, 128)
    coded = encode_masks(pack_bits(masks), torch.arange(4, dtype=torch.int32).view(4, 1, 1))
    decoded = decode_masks(coded["mask_stacks"], coded["mask_data"], rules)
    assert torch.equal(unpack_bits(decoded, rules.columns), masks)


def test_masks_that_are_alike_take_the_space_of_their_differences():
    """Ten masks of a head, the last of which keep a little less each, take hardly more than one."""
    grid = TokenGrid(1, 128, 128)
    rules = MaskRules(grid, 64, 64)
    costs = torch.rand(rules.rows, rules.columns, generator=torch.Generator().manual_seed(0))
    costs.fill_diagonal_(9)
    masks = pack_bits(torch.stack([costs > 0.7 + 0.001 * step for step in range(10)]))
    index = torch.arange(10, dtype=torch.int32).view(10, 1, 1)
    together = len(encode_masks(masks, index)["mask_data"])
    alone = len(encode_masks(masks[:1], index[:1])["mask_data"])
    assert alone > 0.8 * rules.rows * rules.columns / 8  # random masks cannot be compressed much at density 0.3
    assert together < 1.35 * alone


@pytest.mark.parametrize("along_columns", [False, True])
def test_images_lie_along_what_is_alike(along_columns):
    """Heavy keys make columns, heavy queries rows; several strips of each, whose last one is smaller."""
    grid = TokenGrid(8, 64, 75)
    rules = MaskRules(grid, 64, 64)
    kept = torch.rand(3, 1, rules.columns, generator=torch.Generator().manual_seed(0)) < 0.4
    masks = kept.expand(3, rules.rows, rules.columns).clone()
    if not along_columns:
        masks = masks.transpose(1, 2).contiguous()
    masks[:, torch.arange(rules.rows), (torch.arange(rules.rows) * 7) % rules.columns] = True
    coded = encode_masks(pack_bits(masks), torch.arange(3, dtype=torch.int32).view(3, 1, 1))
    assert coded["mask_stacks"][:, 2].tolist() == [int(along_columns)]
    decoded = decode_masks(coded["mask_stacks"], coded["mask_data"], rules)
    assert torch.equal(unpack_bits(decoded, rules.columns), masks)


def test_heads_that_share_masks_share_their_stack():
    grid = TokenGrid(1, 16, 32)
    rules = MaskRules(grid, 64, 64)
    table = pack_bits(random_masks(rules, 4, grid))
    index = torch.tensor([[[2, 2]], [[0, 2]]], dtype=torch.int32)  # 2 buckets, 1 layer, 2 heads
    coded = encode_masks(table, index)
    assert coded["mask_index"].tolist() == [[[0, 0]], [[1, 0]]]
    assert coded["mask_stacks"][:, 0].tolist() == [2]


def check_refused(masks, grid, message):
    with pytest.raises(PlanError, match=message):
        MaskRules(grid, 64, 64).check(masks, first=5)


@pytest.mark.parametrize("grid", GRIDS)
def test_rules(grid):
    rules = MaskRules(grid, 64, 64)
    good = pack_bits(random_masks(rules, 3, grid))
    rules.check(good)
    empty = good.clone()
    empty[2, -1] = 0
    check_refused(empty, grid, f"mask 7 keeps no block in row {rules.rows - 1}; every row needs one")
    if rules.columns % 8:
        beyond = good.clone()
        beyond[1, 0, -1] |= 128
        check_refused(beyond, grid, f"mask 6 has bits beyond its {rules.columns} kv blocks")
    dense = random_masks(rules, 3, grid)
    for place in text_blocks(grid).nonzero().tolist():
        masks = dense.clone()
        masks[0, place[0], place[1]] = False
        if bool(masks.any(-1).all()):
            check_refused(pack_bits(masks), grid, "mask 5 skips a block that touches text tokens")


def test_decoding_takes_little_memory_beside_the_masks():
    """200 masks of 2 MB, in a process of its own: memory grows by them and a little."""
    code = """
import resource, torch
from paroattn import TokenGrid
from paroattn.mask_coding import MaskRules, decode_masks, encode_masks
torch.set_num_threads(2)
rules = MaskRules(TokenGrid(64, 64, 64), 64, 64)
table = torch.full((4, rules.rows, rules.row_bytes), 255, dtype=torch.uint8)
table[1:, ::3] = 1
table[2:, ::5] = 2
coded = encode_masks(table, torch.arange(4, dtype=torch.int32).view(4, 1, 1))
stacks, data = coded["mask_stacks"].repeat(50, 1), coded["mask_data"].repeat(50)
decode_masks(stacks[:1], data[: int(stacks[0, 3])], rules)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
masks = decode_masks(stacks, data, rules)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - masks.nbytes)
assert masks.nbytes == 200 * 4096 * 512 and torch.equal(masks[-4:], table)
"""
    beside = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert beside < 40e6


def test_a_wrong_stack_ends_decoding(monkeypatch):
    """Those that come after it are not decoded."""
    grid = TokenGrid(1, 16, 32)
    rules = MaskRules(grid, 64, 64)
    coded = encode_masks(pack_bits(random_masks(rules, 1, grid)), torch.zeros(1, 1, 1, dtype=torch.int32))
    stacks, data = coded["mask_stacks"].repeat(500, 1), coded["mask_data"].repeat(500)
    decoded = []

    def check_one(self, mask, number):
        decoded.append(number)
        if number == 0:
            raise PlanError("wrong")
        time.sleep(0.01)

    monkeypatch.setattr(MaskRules, "check_one", check_one)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(PlanError, match="wrong"):
            decode_masks(stacks, data, rules)
    finally:
        torch.set_num_threads(before)
    assert len(decoded) < 100
