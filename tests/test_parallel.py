"""Transformers that ranks share: two processes on the CPU give what one gives, whichever model, and say what is wrong.

By hand: torchrun --nproc-per-node 4 tests/ranks.py "eight heads"
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paroattn.ops import exchange
from paroattn.ops.exchange import Exchange, Part

RANKS = Path(__file__).parent / "ranks.py"
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def run(names, *settings, ranks=2, succeeds=True):
    """What rank 0 says of each model."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), str(RANKS)]
    command[3:3] = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # a free port
    result = subprocess.run(
        [*command, names, *settings], capture_output=True, text=True, timeout=500, env={**os.environ, **NO_GPU}
    )
    if succeeds:
        assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def check(found, names, tolerance):
    assert [item["model"] for item in found] == names.split(",")
    for item in found:
        assert item["error"] <= tolerance, item
        assert item["dense"] <= 1e-5, item
        assert item["sparsity"] > 10 * max(tolerance, 1e-4), item  # blocks that are left out show
        assert item["repeated"], item
        planned, _, total = item["report"].split()[:3]
        assert planned == total, item


# Those of diffusers, and those that paroattn splits: with text of any length, masks of keys and of pairs, and images.
@pytest.mark.parametrize(
    "names",
    [
        "wan2.2,wan2.2-i2v,flux,flux2,kontext,chronoedit,eight heads",
        "cogvideox,hunyuan,hunyuan1.5,mochi,sd3,minimax-h3 of 866",
    ],
)
def test_two_ranks_give_what_one_process_gives(names):
    check(run(names), names, 1e-5)


def test_heads_change_places_between_ranks():
    (found,) = run("eight heads", "int8")
    assert found["moved"]
    check([found], "eight heads", 1e-3)


def test_tokens_that_cannot_be_shared_evenly():
    check(run("qwen,qwen-edit,hunyuan", "anything"), "qwen,qwen-edit,hunyuan", 1e-5)


def test_a_plan_may_be_applied_before_ranks_share_the_transformer():
    check(run("wan2.2,cogvideox", "before"), "wan2.2,cogvideox", 1e-5)


@pytest.mark.parametrize("names", ["cogvideox", "eight heads"])
def test_compiled_blocks(names):
    check(run(names, "compiled", "int8"), names, 1e-3)


@pytest.mark.parametrize(
    ("names", "mistake", "message"),
    [
        ("wan2.2", "ring", "ring_degree is 2; expected 1: each head has an order of its own .* Use ulysses_degree=2"),
        ("cogvideox", "own attention", "its own attention does not exchange them: apply a plan"),
        ("wan2.2", "calibrating", "calibrate and observe before enable_parallelism"),
        ("eight heads", "a density", "ranks share the transformer, where no plan can be made beside requests"),
        ("wan2.2", "other plans", "ranks 1 have another plan or other settings than rank 0"),
    ],
)
def test_mistakes_get_one_line(names, mistake, message):
    (found,) = run(names, mistake, succeeds=False)
    assert re.match(f"InputError: .*{message}", found["message"])


def test_a_lost_rank_ends_the_others():
    """Within the time that `run` gives them; rank 0 says what it met, or is ended by torchrun before it can."""
    found = run("wan2.2", "a lost rank", succeeds=False)
    assert all("Error" in item["message"] for item in found)


@pytest.mark.parametrize(("batch", "ranks", "heads"), [(1, 4, 8), (2, 2, 6), (3, 3, 3)])
def test_what_is_packed_is_unpacked(batch, ranks, heads):
    x, order = torch.randn(batch, heads, 5, 4).transpose(1, 2), torch.randperm(heads)
    packed = exchange._packed(x, order, ranks)
    assert packed.shape == (ranks * 5, batch, heads // ranks, 4)
    assert torch.equal(packed[5 * (ranks - 1) + 2, -1, 0], x[-1, 2, order[-(heads // ranks)]])
    place = torch.zeros_like(x)
    exchange._unpack(packed, order, ranks, place)
    assert torch.equal(place, x)


def test_calls_with_other_tokens_than_the_split_says_are_refused():
    call = Exchange(torch.arange(4), (Part((3, 2)), Part((4, 4), is_whole=True)), "no group", 1)
    query = torch.randn(1, 7, 4, 8)
    with pytest.raises(ValueError, match="query of rank 1 has 7 tokens and 4 heads; expected 6 and 4"):
        call.to_heads(query, query, query)
    with pytest.raises(ValueError, match="key of rank 1 has 6 tokens and 2 heads; expected 6 and 4"):
        call.to_heads(query[:, :6], query[:, :6, :2], query[:, :6, :2])
