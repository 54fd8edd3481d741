"""A plan at work without a host: layers and heads of one's own, noise levels, and answers why not."""

import threading
from dataclasses import replace

import oracles
import pytest
import tiny
import torch
from plan_files import masks_of

from paroattn.block_mask import block_count, unpack_bits
from paroattn.errors import InputError
from paroattn.grid import TokenGrid
from paroattn.ops import PreparedAttention
from paroattn.plan import Plan
from paroattn.quantize import Precision
from paroattn.runner import Dense, Runner, part_of

EDGES = (0.0, 0.25, 0.5, 0.75)
GRID = TokenGrid(6, 8, 10)


@pytest.fixture(scope="module")
def plan():
    blocks = block_count(GRID.tokens, 64)
    masks = torch.rand(4, 2, 2, blocks, blocks, generator=torch.Generator().manual_seed(5)) < 0.5
    return tiny.make_plan(tiny.tiny_wan(), masks | torch.eye(blocks, dtype=torch.bool), GRID, EDGES)


def tensors(heads=2, tokens=GRID.tokens, dtype=torch.float32):
    return torch.randn(3, 1, tokens, heads, 24, generator=torch.Generator().manual_seed(1)).to(dtype).unbind(0)


def expected(plan, layer, head, bucket, query, key, value):
    """One head in float64."""
    index = int(plan.mask_index[bucket, layer, head])
    mask = unpack_bits(plan.mask_table[index], block_count(GRID.tokens, 64))[None]
    order = plan.layer(layer).permutation[head][None]
    return oracles.sparse_attention(*(x.transpose(1, 2) for x in (query, key, value)), mask, order)[0][:, 0]


@pytest.mark.parametrize(("layers", "heads"), [(None, None), ([1], None), (None, [1, 0]), ([1, 0], [1])])
def test_layers_and_heads_are_those_of_the_plan_in_the_hosts_order(plan, layers, heads):
    runner = Runner(plan, "cpu", layers=layers, heads=heads)
    own_layers, own_heads = layers or range(2), heads or range(2)
    query, key, value = tensors(len(own_heads))
    differ = set()
    for bucket, level in enumerate(plan.schedule):
        for number, layer in enumerate(own_layers):
            output = runner.call(number, query, key, value, bucket=runner.bucket(level))
            for place, head in enumerate(own_heads):
                one = [x[:, :, place : place + 1] for x in (query, key, value)]
                exact = expected(plan, layer, head, bucket, *one)
                assert oracles.relative_error(output[:, :, place], exact) < 1e-5
                differ.add(round(float(exact.sum()), 6))
    assert len(differ) == 4 * len(own_layers) * len(own_heads)  # a wrong mask or order would show


@pytest.mark.parametrize("as_tensor", [False, True])
def test_levels_between_steps_and_beyond_have_a_bucket(plan, as_tensor):
    runner = Runner(plan, "cpu")
    for level in (1.0, *torch.linspace(0, 1, 50).tolist(), 1.5, -0.1):
        bucket = runner.bucket(torch.tensor(level, dtype=torch.float64) if as_tensor else level)
        assert bucket.ndim == 0
        assert int(bucket) == plan.bucket_of(level)


def test_a_call_that_cannot_be_planned_is_answered_with_the_reason(plan):
    runner = Runner(plan, "cpu")
    query, key, value = tensors()
    bucket = runner.bucket(1.0)
    cases = {
        "480 queries and 60 keys: it is cross-attention": (query, key[:, :60], value[:, :60]),
        "490 tokens; the plan has 480": tensors(tokens=490),
        "470 tokens; the plan has 480": tensors(tokens=470),
        "torch.float32, torch.float32 and torch.bfloat16": (query, key, value.bfloat16()),
    }
    for reason, given in cases.items():
        answer = runner.call(0, *given, bucket=bucket)
        assert isinstance(answer, Dense)
        assert reason in answer.reason


def test_grids_that_are_not_the_plans_are_refused_with_both_named(plan):
    runner = Runner(plan, "cpu")
    assert runner.refusal(GRID) is None
    assert runner.refusal(replace(GRID, text_tokens=7)) is None
    assert "this request has grid 6x10x8" in runner.refusal(TokenGrid(6, 10, 8))
    assert "tokens that form no boxes" in runner.refusal(None)
    assert Runner.of_precision(Precision(), plan.model, "cpu").refusal(None) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_precision_alone_computes_all_blocks_of_any_length(plan, dtype):
    runner = Runner.of_precision(Precision.parse("int8"), plan.model, "cpu")
    for tokens in (10, 130):
        given = tensors(tokens=tokens, dtype=dtype)
        output = runner.call(1, *given, bucket=runner.bucket(0.3))
        exact, _ = oracles.sparse_attention(*(x.transpose(1, 2) for x in given))
        assert 1e-5 < oracles.relative_error(output.transpose(1, 2), exact) < 0.05


def test_threads_share_a_runner(plan):
    runner = Runner(plan, "cpu")
    given = tensors()
    expected = [runner.call(0, *given, bucket=runner.bucket(level)) for level in plan.schedule]
    wrong = []

    def run(number):
        for _ in range(30):
            output = runner.call(0, *given, bucket=runner.bucket(plan.schedule[number]))
            if not torch.equal(output, expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [2]}, r"layers are \[2\]; expected numbers from 0 to 1"),
        ({"heads": [0, -1]}, r"heads are \[0, -1\]; expected numbers from 0 to 1"),
        ({"heads": []}, r"heads are \[\]"),
        ({"backend": "magic"}, "magic"),
    ],
)
def test_wrong_parts_are_one_line(plan, arguments, message):
    with pytest.raises(InputError, match=message):
        Runner(plan, "cpu", **arguments)


def test_a_part_is_a_plan_of_its_own(plan, tmp_path):
    part = part_of(plan, layers=[1], heads=[1])
    assert (part.model.layers, part.model.heads) == (1, 1)
    part.save(tmp_path / "part")
    assert torch.equal(masks_of(Plan.load(tmp_path / "part")), masks_of(plan)[:, 1:, 1:])
    assert part_of(plan) is plan


def test_kernels_are_built_once_for_each_kind_of_layer(plan, monkeypatch):
    """The operator of one layer attends; without kernels to build, or without memory, nothing happens."""
    attended = []

    def attend(operator, *tensors, bucket, key_mask=None):
        attended.append((tensors[0].shape, tensors[0].dtype, int(bucket)))

    monkeypatch.setattr(PreparedAttention, "__call__", attend)
    Runner(plan, "cpu").build(GRID.tokens, 24, torch.float32)
    assert not attended
    monkeypatch.setattr(PreparedAttention, "backend", property(lambda _: "triton", lambda *_: None), raising=False)
    Runner(plan, "cpu").build(GRID.tokens, 24, torch.float32)
    assert attended == [((1, GRID.tokens, 2, 24), torch.float32, 0)]

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(PreparedAttention, "__call__", out_of_memory)
    Runner(plan, "cpu").build(GRID.tokens, 24, torch.float32)
