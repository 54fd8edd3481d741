"""Statistics of attention maps, against full maps in float64."""

import oracles
import pytest
import torch

from paroattn.calibration.statistics import OrderCriterion, block_sums, order_metrics


def queries_and_keys(tokens, seed=0):
    return 2 * torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tokens", [1, 64, 65, 333])
def test_block_sums_equal_those_of_the_full_map(tokens):
    q, k = queries_and_keys(tokens)
    orders = [torch.randperm(tokens, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    sums = block_sums(q, k, orders, scale=0.25)
    for order, measured in zip(orders, sums, strict=True):
        torch.testing.assert_close(measured.double(), oracles.block_sums(q, k, order), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [64, 100, 333])
@pytest.mark.parametrize("criterion", [OrderCriterion(), OrderCriterion(epsilon=1e-3, sigma=0.7)])
def test_order_metrics_equal_those_of_the_full_map(tokens, criterion):
    q, k = queries_and_keys(tokens)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
    p = (q.double() @ k.double().T * 0.25).softmax(-1)[order][:, order]
    epsilon = criterion.epsilon or 1 / tokens
    sparse, incoherence = [], []
    for row in p.split(64, 0):
        for block in row.split(64, 1):
            sparse.append(float((block < epsilon).double().mean() >= criterion.sigma))
            incoherence.append(float(block.max() / block.mean()))
    measured = order_metrics(q, k, order, 0.25, criterion)
    assert measured[0] == pytest.approx(sum(sparse) / len(sparse))
    assert measured[1] == pytest.approx(sum(incoherence) / len(incoherence), rel=1e-4)
