"""Costs and errors of skipping blocks, against attention that skips them."""

import oracles
import pytest
import torch

from paroattn import TokenGrid
from paroattn.block_mask import block_count, text_blocks
from paroattn.calibration.costs import COMPENSATE, DROP, skip_costs
from paroattn.keep import keep_best

SCALE = 0.3


def head(tokens, seed=0, head_dim=8):
    return torch.randn(3, tokens, head_dim, generator=torch.Generator().manual_seed(seed))


def change(q, k, v, order, mask, way, block_q=64):
    """Squared change of each q block's output by skipping what the mask leaves out, float64 [q blocks]."""
    query, key, value = (x.view(1, 1, *x.shape) for x in (q, k, v))
    arguments = {"permutation": order.unsqueeze(0), "compensate": [way == COMPENSATE], "block_q": block_q}
    output, _ = oracles.sparse_attention(query, key, value, mask.unsqueeze(0), scale=SCALE, **arguments)
    dense, _ = oracles.dense_attention(query, key, value, scale=SCALE)
    moved = (output - dense)[0, 0, order].square().sum(1)
    return torch.stack([part.sum() for part in moved.split(block_q)])


@pytest.mark.parametrize("tokens", [192, 200])
@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("way", [DROP, COMPENSATE])
def test_errors_are_those_of_attention_with_the_costliest_blocks(tokens, block_q, way):
    q, k, v = head(tokens)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
    rows, columns = block_count(tokens, block_q), block_count(tokens, 64)
    required = torch.zeros(rows, columns, dtype=torch.bool)
    required[:, -1] = True
    levels = (0.5, 0.75, 1.0)
    found = skip_costs(q, k, v, order, SCALE, required, block_q=block_q, levels=levels)
    for density, error in zip(levels, found.errors[way].tolist(), strict=True):
        mask = keep_best(found.costs[way], density, required)
        assert mask[:, -1].all()
        expected = float(change(q, k, v, order, mask, way, block_q).sum())
        assert error == pytest.approx(expected, rel=1e-4, abs=1e-8)
    dense, _ = oracles.dense_attention(*(x.view(1, 1, *x.shape) for x in (q, k, v)), scale=SCALE)
    assert found.norm == pytest.approx(float(dense.square().sum()), rel=1e-5)
    torch.testing.assert_close(found.block_sums.sum(), torch.tensor(float(tokens)), rtol=1e-5, atol=0)


def test_the_cost_of_a_block_is_the_change_it_makes_alone_before_rows_are_normalised_again():
    q, k, v = head(130, seed=3)
    order = torch.arange(130)
    found = skip_costs(q, k, v, order, SCALE, torch.zeros(3, 3, dtype=torch.bool))
    q, k, v = q.double(), k.double(), v.double()
    p = (q @ k.T * SCALE).softmax(-1)
    output = p @ v
    for column in range(3):
        keys = slice(64 * column, min(64 * column + 64, 130))
        part, share = p[:, keys] @ v[keys], p[:, keys].sum(1, keepdim=True)
        count = k[keys].shape[0]
        row_sum = (q @ k.T * SCALE).exp().sum(1, keepdim=True)
        surrogate = count * (q @ k[keys].mean(0, keepdim=True).T * SCALE).exp() / row_sum
        expected = torch.stack(
            (part - share * output, part - surrogate * v[keys].mean(0) - (share - surrogate) * output)
        )
        by_row = expected.square().sum(-1)
        blocks = torch.stack([by_row[:, start : start + 64].sum(1) for start in (0, 64, 128)], 1)
        torch.testing.assert_close(found.costs[:, :, column].double(), blocks, rtol=1e-4, atol=1e-9)


def test_uniform_attention_costs_nothing_when_approximated():
    q, k, v = head(256)
    found = skip_costs(0 * q, k, v, torch.arange(256), SCALE, torch.zeros(4, 4, dtype=torch.bool))
    assert found.errors[COMPENSATE].max() < 1e-8 * found.norm
    assert found.errors[DROP, 0] > 0.01 * found.norm


def test_sampled_rows_and_chunks_are_the_same_rows(monkeypatch):
    q, k, v = head(333)
    order = torch.randperm(333, generator=torch.Generator().manual_seed(1))
    grid = TokenGrid(1, 15, 20, 33)
    required = text_blocks(grid)
    whole = skip_costs(q, k, v, order, SCALE, required)
    some = skip_costs(q, k, v, order, SCALE, required, q_blocks=torch.tensor([1, 5]))
    torch.testing.assert_close(some.costs, whole.costs[:, [1, 5]])
    monkeypatch.setattr("paroattn.calibration.costs._CHUNK_ENTRIES", 1)
    torch.testing.assert_close(skip_costs(q, k, v, order, SCALE, required).costs, whole.costs)


def test_some_rows_of_each_block_stand_for_all():
    q, k, v = head(256, seed=4)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(2))
    required = torch.zeros(4, 4, dtype=torch.bool)
    whole = skip_costs(q, k, v, order, SCALE, required, levels=())
    parts = [
        skip_costs(q, k, v, order, SCALE, required, rows=torch.arange(16) * 4 + first, levels=()) for first in range(4)
    ]
    torch.testing.assert_close(sum(part.costs for part in parts) / 4, whole.costs, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(sum(part.block_sums for part in parts) / 4, whole.block_sums, rtol=1e-5, atol=1e-6)
    assert sum(part.norm for part in parts) / 4 == pytest.approx(whole.norm, rel=1e-5)
    assert whole.errors.shape == (2, 0)
