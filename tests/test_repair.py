"""Repair by probes: outputs come closer to attention over all keys, and only where a plan leaves blocks out."""

import oracles
import pytest
import tiny
import torch
from click.testing import CliRunner

import paroattn
from paroattn import LayerPlan, Precision, TokenGrid, prepare
from paroattn.block_mask import block_count, pack_bits
from paroattn.cli.group import command_line
from paroattn.ops.repair import PROBES, probe_rows, repaired

TOKENS = 400


def smooth(tokens=TOKENS, heads=2, head_dim=16, seed=0):
    """Query, key and value [1, H, N, D] that change slowly from token to token, as those of videos."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.arange(tokens).view(-1, 1) / tokens
    waves = [torch.sin(position * 30 * torch.rand(heads, 1, head_dim, generator=generator)) for _ in range(3)]
    noise = torch.randn(3, 1, heads, tokens, head_dim, generator=generator)
    return [2 * wave + 0.3 * own for wave, own in zip(waves, noise, strict=True)]


def layer_of(tokens=TOKENS, heads=2, precision="exact", grid=None):
    """A layer that keeps blocks of the diagonal, more of them in the second head, and all blocks that touch text."""
    blocks = block_count(tokens, 64)
    away = (torch.arange(blocks) - torch.arange(blocks).view(-1, 1)).abs()
    mask = torch.stack([away <= head for head in range(heads)])
    if grid is not None and grid.text_tokens:
        last = grid.visual_tokens // 64
        mask[:, last:] = True
        mask[:, :, last:] = True
    return LayerPlan(
        precisions=(Precision.parse(precision),) * heads,
        mask_table=pack_bits(mask),
        mask_index=torch.arange(heads, dtype=torch.int32).unsqueeze(0),
        tokens=tokens,
        grid=grid,
    )


def exact(query, key, value, key_mask=None):
    logits = query.double() @ key.double().mT * query.shape[-1] ** -0.5
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None], float("-inf"))
    return logits.softmax(-1) @ value.double()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("precision", ["exact", "int8"])
def test_outputs_come_closer_to_all_keys(precision, backend):
    if paroattn.backends()[backend].startswith("it "):
        pytest.skip(paroattn.backends()[backend])
    tensors, bucket = smooth(), torch.tensor(0)
    settings = {"device": "cpu", "dtype": torch.float32, "backend": backend}
    errors = []
    for repair in (False, True):
        op = prepare(layer_of(precision=precision), repair=repair, **settings)
        errors.append(oracles.relative_error(op(*tensors, bucket=bucket), exact(*tensors)))
        again = op(*tensors, bucket=bucket)
        assert torch.equal(again, op(*tensors, bucket=bucket))
    assert errors[1] < 0.6 * errors[0]


def test_the_map_is_the_ridge_regression_of_what_probes_miss():
    """In float64 and by the 16 x 16 system of channels, where the code solves that of probes."""
    query, key, value = smooth(head_dim=16)
    output = exact(query, key, value).float() + 0.1 * torch.tanh(torch.roll(value, 1, 3))
    found = repaired(output.clone(), query, key, value, first=0, count=TOKENS)
    probes = probe_rows(TOKENS, query.device)
    rows, missed = output[:, :, probes].double(), (exact(query, key, value) - output.double())[:, :, probes]
    mean, mean_missed = rows.mean(2, keepdim=True), missed.mean(2, keepdim=True)
    deviation = rows.std(2, keepdim=True, unbiased=False)
    units = (rows - mean) / deviation
    system = units.mT @ units + 0.5 * PROBES * torch.eye(16, dtype=torch.float64)
    weights = torch.linalg.solve(system, units.mT @ (missed - mean_missed))
    expected = output.double() + mean_missed + ((output.double() - mean) / deviation) @ weights
    assert oracles.relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("position", ["prefix", "suffix"])
def test_text_stays_as_it_is(position):
    grid = TokenGrid(4, 8, 10, 40, position)
    text = slice(0, 40) if position == "prefix" else slice(320, 360)
    tensors, bucket = smooth(grid.tokens), torch.tensor(0)
    plain, mended = (
        prepare(layer_of(grid.tokens, grid=grid), device="cpu", dtype=torch.float32, repair=repair)(
            *tensors, bucket=bucket
        )
        for repair in (False, True)
    )
    assert torch.equal(plain[:, :, text], mended[:, :, text])
    changed = (plain != mended).any(-1)
    changed[:, :, text] = True
    assert changed.all()


def test_hidden_keys_stay_hidden_and_heads_may_share_keys():
    query, key, value = smooth(heads=4)
    key, value = key[:, :2], value[:, :2]
    shown = torch.ones(1, TOKENS, dtype=torch.bool)
    shown[:, ::7] = False
    output = 0.9 * exact(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), shown).float()
    found = repaired(output.clone(), query, key, value, first=0, count=TOKENS, key_mask=shown)
    far = value.clone()
    far[:, :, ::7] = 1e4
    assert torch.equal(found, repaired(output.clone(), query, key, far, first=0, count=TOKENS, key_mask=shown))
    expected = exact(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), shown)
    assert oracles.relative_error(found, expected) < 0.6 * oracles.relative_error(output, expected)


def test_few_rows_and_constant_outputs_do_no_harm():
    query, key, value = smooth(2 * PROBES - 1)
    output = torch.randn_like(query)
    assert repaired(output, query, key, value, first=0, count=query.shape[2]) is output
    query, key, _ = smooth()
    constant = torch.full_like(query, 3.0)
    assert torch.allclose(repaired(constant.clone(), query, key, constant, first=0, count=TOKENS), constant)


def test_probes_are_spread_over_any_grid():
    for count in (2 * PROBES, 4096, 16 * 32 * 32, 75_600):
        rows = probe_rows(count, torch.device("cpu"))
        assert len(rows.unique()) == PROBES
        gaps = torch.diff(torch.cat((torch.tensor([0]), rows.sort().values, torch.tensor([count]))))
        assert int(gaps.max()) < 3 * count / PROBES
        assert len((rows % 32).unique()) > 16  # not one column of a grid that is 32 wide


def test_a_pipeline_with_repair_comes_closer_and_is_restored():
    pipe, grid = tiny.tiny_wan(), TokenGrid(6, 8, 5)
    size = {"height": grid.height * 16}
    blocks = block_count(grid.tokens, 64)
    diagonal = torch.eye(blocks, dtype=torch.bool).expand(1, 2, 2, blocks, blocks)
    plan, full = tiny.make_plan(pipe, diagonal, grid), tiny.latents(pipe, **size)
    errors = []
    for repair in (False, True):
        with paroattn.apply(pipe, plan, repair=repair):
            errors.append(oracles.relative_error(tiny.latents(pipe, **size), full))
    assert errors[1] < 0.8 * errors[0]
    assert torch.equal(tiny.latents(pipe, **size), full)
    with pytest.raises(ValueError, match="repair is for the blocks that a plan leaves out"):
        paroattn.apply(pipe, precision="int8", repair=True)


def test_repair_is_part_of_one_graph():
    tensors, bucket = smooth(), torch.tensor(0)
    op = prepare(layer_of(), device="cpu", dtype=torch.float32, repair=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: op(*given, bucket=bucket), fullgraph=True, backend="aot_eager")
    assert oracles.relative_error(compiled(*tensors), op(*tensors, bucket=bucket)) < 1e-5


def test_the_command_line_wants_a_plan_for_it():
    result = CliRunner().invoke(command_line, ["generate", "--prompt", "a cat", "--repair"])
    assert result.exit_code == 2
    assert "--repair is for the blocks that a plan leaves out" in result.stderr
