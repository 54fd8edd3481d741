"""Dynamic baselines: each call has the masks of its rule, at exactly the wanted density."""

import math
from dataclasses import replace

import oracles
import pytest
import tiny
import torch
from paroattn_lab.baselines import DYNAMIC_BASELINES, apply_dynamic, dynamic
from paroattn_lab.baselines.scores import mean_similarity, vertical_slash

from paroattn import PlanError, TokenGrid
from paroattn.block_mask import block_count, text_blocks
from paroattn.integrations.descriptors import DESCRIPTORS
from paroattn.order import token_order


def planted(q_codes, k_codes, noise=0.05):
    """Queries and keys [64 * blocks, D] whose blocks are the given codes [blocks, D] with a little noise."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        codes.repeat_interleave(64, 0) + noise * torch.randn(64 * len(codes), codes.shape[1], generator=generator)
        for codes in (q_codes, k_codes)
    )


def best(scores, blocks):
    """The `blocks` best blocks, as bool like scores."""
    kept = torch.zeros(scores.numel(), dtype=torch.bool)
    kept[scores.flatten().topk(blocks).indices] = True
    return kept.view_as(scores)


def test_mean_similarity_finds_planted_blocks():
    partner = torch.tensor([3, 0, 5, 1, 4, 2])
    q, k = planted(3 * torch.eye(6)[partner], 3 * torch.eye(6))
    assert torch.equal(best(mean_similarity(q, k, 1.0), 6), torch.eye(6, dtype=torch.bool)[partner])
    tail = mean_similarity(q[:-40], k[:-40], 1.0)  # a partial block has the mean of its own tokens
    assert torch.equal(best(tail, 6), torch.eye(6, dtype=torch.bool)[partner])


def test_mean_similarity_keeps_the_fewest_blocks_of_each_row_with_one_share():
    logits = torch.tensor([[9.0, 1.0, 0.5, 0.0], [3.0, 2.9, 2.8, 0.0], [0.4, 0.3, 0.2, 0.1], [6.0, 5.0, 1.0, 1.0]])
    scores = mean_similarity(*planted(logits, torch.eye(4), noise=0), 1.0)
    p = logits.double().softmax(-1)
    for share in (0.5, 0.8, 0.95):
        for row in range(4):
            fewest = next(count for count in range(1, 5) if p[row].topk(count).values.sum() >= share)
            assert (scores[row] > 1 - share).sum() == fewest


def test_unpredictable_blocks_come_first_the_more_expected_before_the_less():
    q, k = planted(3 * torch.eye(6), 3 * torch.eye(6))
    q[128:192] *= torch.tensor([1.0, -1.0]).repeat(32).unsqueeze(1)  # block 2 of the queries cancels out
    k[256:320] *= torch.tensor([1.0, -1.0]).repeat(32).unsqueeze(1)  # block 4 of the keys
    unpredictable = torch.zeros(6, 6, dtype=torch.bool)
    unpredictable[2] = unpredictable[:, 4] = True
    scores = mean_similarity(q, k, 1.0)
    assert torch.equal(best(scores, 11), unpredictable)
    kept = best(scores, 16)  # and one for each of the five other rows
    assert kept[unpredictable].all()
    assert (kept & ~unpredictable).sum(1).tolist() == [1, 1, 0, 1, 1, 1]
    assert kept[[0, 1, 3, 5], [0, 1, 3, 5]].all()
    means = q.view(6, 64, 6).mean(1) @ k.view(6, 64, 6).mean(1).T
    assert torch.equal(scores[2].argsort(), means[2].argsort())


def test_columns_that_cannot_be_judged_do_not_count_in_the_shares_of_others():
    q, k = planted(torch.eye(7)[:6], torch.eye(7)[:6])
    k[256:320, 0] = 5  # the mean of block 4 is what block 0 looks for, but its tokens are far from it
    k[256:320, 6] = torch.tensor([50.0, -50.0]).repeat(32)
    scores = mean_similarity(q, k, 1.0)
    assert (scores[:, 4] > 2).all()
    assert scores[0, 0] == pytest.approx(1)  # the best of those judged, so that these hold no more
    k[:, 6] = torch.tensor([50.0, -50.0]).repeat(192)
    assert (mean_similarity(q, k, 1.0) > 2).all()  # no column can be judged


def codes(tokens, seed=0):
    return torch.nn.functional.normalize(torch.randn(tokens, 64, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("tokens", [640, 600])
def test_vertical_slash_finds_a_planted_column(tokens):
    key = codes(tokens)
    query = codes(tokens, seed=1) + key[200]  # everything looks at token 200, in block 3
    expected = torch.zeros(10, 10, dtype=torch.bool)
    expected[:, 3] = True
    assert torch.equal(best(vertical_slash(query, key, 30.0), 10), expected)


@pytest.mark.parametrize(("distance", "diagonals"), [(128, [2]), (160, [2, 3]), (0, [0]), (20, [0, 1])])
def test_vertical_slash_finds_planted_diagonals(distance, diagonals):
    tokens = 640
    key = codes(tokens)
    query = key.roll(distance, 0)  # token i looks at token i - distance
    block = torch.arange(10)
    gap = (block.unsqueeze(1) - block).abs()
    expected = torch.isin(gap, torch.tensor(diagonals))
    scores = vertical_slash(query, key, 30.0)
    # The end of each diagonal is also a column that the last queries look at.
    columns = torch.zeros(10, 10, dtype=torch.bool)
    columns[:, sorted({(tokens - 64 - distance) // 64, (tokens - 1 - distance) // 64})] = True
    assert scores[expected].min() > scores[~expected & ~columns].max() + 0.1


def test_vertical_slash_expects_what_the_last_queries_see():
    generator = torch.Generator().manual_seed(0)
    key, query = torch.randn(640, 8, generator=generator), torch.ones(640, 8)
    p = (query[0] @ key.T * 0.3).softmax(-1).double()  # of every query
    columns = p.view(10, 64).sum(1)
    distances = torch.zeros(10, dtype=torch.float64)  # by hand: mean at each distance times its pairs in the block
    for gap in range(10):
        for distance in range(640):
            seen = [
                p[q - distance * side] for q in range(576, 640) for side in (1, -1) if 0 <= q - distance * side < 640
            ]
            seen = seen[::2] if distance == 0 else seen  # one pair, not two
            pairs = max(0, 64 - abs(distance - 64 * gap)) * (2 if gap == 0 and distance else 1)
            distances[gap] += torch.stack(seen).mean() * pairs / 64
    block = torch.arange(10)
    expected = torch.maximum(columns.expand(10, 10), distances[(block.unsqueeze(1) - block).abs()])
    assert torch.allclose(vertical_slash(query, key, 0.3), expected, atol=1e-5)


@pytest.fixture(scope="module")
def pipe():
    return tiny.tiny_wan()


LATENTS = {"height": 128, "steps": 2}  # 6 x 8 x 5 tokens: 4 blocks, the last one partial
GRID = TokenGrid(6, 8, 5)


@pytest.fixture(scope="module")
def full(pipe):
    return tiny.latents(pipe, **LATENTS)


def orders_for(name, grid=GRID, layers=2):
    """Another order for each head, for the baseline that takes them."""
    if name != "mean similarity + orders":
        return None
    names = ("WHF", "HWF", "FWH", "WFH")[: 2 * layers]
    return torch.stack([token_order(order, grid) for order in names]).view(layers, 2, -1)


def record_calls(monkeypatch):
    """Every call of the operator: inputs [1, N, H, D], keywords, output."""
    calls, original = [], dynamic.attention

    def recording(query, key, value, **options):
        output = original(query, key, value, **options)
        calls.append(((query, key, value), options, output))
        return output

    monkeypatch.setattr(dynamic, "attention", recording)
    return calls


def check_calls(calls, name, grid, density, orders):
    """Each output is masked attention with the mask that the call had, which keeps what the rule's scores say."""
    blocks = block_count(grid.tokens, 64)
    for number, (tensors, options, output) in enumerate(calls):
        mask, permutation = options["block_mask"], options["permutation"]
        query, key, value = (x.transpose(1, 2) for x in tensors)
        expected = oracles.masked_attention(query, key, value, mask, permutation)
        assert oracles.relative_error(output.transpose(1, 2), expected) < 1e-6
        assert (mask.sum((-2, -1)) == round(density * blocks**2)).all()
        assert mask[:, text_blocks(grid)].all()
        if orders is not None:
            assert torch.equal(permutation, orders[number % 2])
        rule = vertical_slash if name == "vertical-slash" else mean_similarity
        whole = grid.visual_tokens // 64  # blocks without text
        for head in range(2):
            own = permutation[head, : grid.visual_tokens]
            scores = rule(query[0, head, own], key[0, head, own], query.shape[-1] ** -0.5)[:whole, :whole]
            kept = mask[head, :whole, :whole]
            chosen = kept & (scores < scores.amax(-1, keepdim=True))
            if chosen.any() and not kept.all():
                assert scores[chosen].min() >= scores[~kept].max()


@pytest.mark.parametrize("name", DYNAMIC_BASELINES)
def test_dynamic_baselines_are_masked_attention_with_their_masks(pipe, full, name, monkeypatch):
    calls, orders = record_calls(monkeypatch), orders_for(name)
    with apply_dynamic(pipe, name, 0.5, orders=orders) as handle:
        assert math.isnan(handle.density)
        sparse = tiny.latents(pipe, **LATENTS)
    assert len(calls) == 4  # 2 steps of 2 layers
    check_calls(calls, name, GRID, 0.5, orders)
    assert handle.density == 0.5
    assert 1e-3 < torch.linalg.norm(sparse - full) / torch.linalg.norm(full) < 1


@pytest.mark.parametrize("position", ["prefix", "suffix"])
@pytest.mark.parametrize("name", DYNAMIC_BASELINES)
def test_dynamic_baselines_keep_text(pipe, name, position, monkeypatch):
    grid = TokenGrid(7, 5, 6, 30, position)  # 240 tokens: rows and columns 3 of 4 touch text
    descriptor = replace(
        DESCRIPTORS["WanTransformer3DModel"], boxes=lambda config, arguments: ((7, 5, 6),), text=position
    )
    monkeypatch.setitem(DESCRIPTORS, "WanTransformer3DModel", descriptor)
    calls, orders = record_calls(monkeypatch), orders_for(name, grid)
    with apply_dynamic(pipe, name, 0.75, orders=orders):
        tiny.latents(pipe, **LATENTS)
    check_calls(calls, name, grid, 0.75, orders)
    text = slice(0, 30) if position == "prefix" else slice(210, 240)
    assert calls[0][1]["permutation"][0, 210:].tolist() == list(range(text.start, text.stop))


def test_each_sample_of_a_batch_has_masks_of_its_own(pipe, monkeypatch):
    calls = record_calls(monkeypatch)
    arguments = {**tiny.call_arguments(seed=7, **LATENTS), "prompt_embeds": torch.cat((tiny.TEXT, tiny.NEGATIVE))}
    with apply_dynamic(pipe, "vertical-slash", 0.5) as handle:
        batch = pipe(**arguments).frames
    assert len(batch) == 2
    assert len(calls) == 8
    check_calls(calls, "vertical-slash", GRID, 0.5, None)
    assert any(
        not torch.equal(first[1]["block_mask"], second[1]["block_mask"])
        for first, second in zip(calls[::2], calls[1::2], strict=True)
    )
    assert handle.density == 0.5
    full = pipe(**arguments | {"generator": torch.Generator().manual_seed(7)}).frames
    with apply_dynamic(pipe, "vertical-slash", 1.0):
        applied = pipe(**arguments | {"generator": torch.Generator().manual_seed(7)}).frames
    assert torch.linalg.norm(applied - full) <= 1e-4 * torch.linalg.norm(full)


def test_grouped_queries_share_keys():
    handle = apply_dynamic(tiny.tiny_wan(), "vertical-slash", 0.5)
    query, key = torch.randn(5, 320, 4, 16), torch.randn(5, 320, 2, 16)
    order = torch.arange(320).expand(4, -1)
    grouped = handle._masks(query[0], key[0], order, 0.25, TokenGrid(5, 8, 8))
    repeated = handle._masks(query[0], key[0].repeat_interleave(2, 1), order, 0.25, TokenGrid(5, 8, 8))
    assert torch.equal(grouped, repeated)


@pytest.mark.parametrize("name", DYNAMIC_BASELINES)
def test_at_density_1_the_latents_are_the_pipelines_own_and_remove_restores_it(pipe, full, name):
    processors = dict(pipe.transformer.attn_processors)
    handle = apply_dynamic(pipe, name, 1.0, orders=orders_for(name))
    applied = tiny.latents(pipe, **LATENTS)
    assert torch.linalg.norm(applied - full) <= 1e-4 * torch.linalg.norm(full)
    assert not torch.equal(applied, full)  # the operator did run
    assert handle.density == 1
    handle.remove()
    handle.remove()  # a second call does nothing
    assert torch.equal(tiny.latents(pipe, **LATENTS), full)
    assert all(pipe.transformer.attn_processors[key] is processor for key, processor in processors.items())


def test_an_error_inside_with_restores_the_pipeline(pipe, full):
    with pytest.raises(KeyError), apply_dynamic(pipe, "vertical-slash", 0.5):
        raise KeyError
    assert torch.equal(tiny.latents(pipe, **LATENTS), full)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "mean"}, "baseline 'mean' is unknown; expected one of 'mean similarity', "),
        ({"density": 0.0}, "density is 0"),
        ({"backend": "abacus"}, "backend 'abacus' is unknown"),
        ({"name": "mean similarity + orders"}, "which needs them"),
        ({"orders": orders_for("mean similarity + orders")}, "got name 'mean similarity'"),
        (
            {"name": "mean similarity + orders", "orders": torch.zeros(2, 3, 240, dtype=torch.long)},
            r"orders have shape \[2, 3, 240\]; expected \[layers, heads, N\], here \[2, 2, N\]",
        ),
    ],
)
def test_impossible_dynamic_baselines_are_refused(pipe, changes, message):
    with pytest.raises(ValueError, match=message):
        apply_dynamic(pipe, **{"name": "mean similarity", "density": 0.5, **changes})
    assert not any(hasattr(processor, "_paroattn_slot") for processor in pipe.transformer.attn_processors.values())


def test_what_does_not_fit_the_grid_is_refused(pipe):
    with (
        apply_dynamic(pipe, "mean similarity", 0.2),
        pytest.raises(PlanError, match=r"density 0\.2 cannot be reached"),
    ):
        tiny.latents(pipe, **LATENTS)
    orders = orders_for("mean similarity + orders", TokenGrid(2, 8, 8))
    with (
        apply_dynamic(pipe, "mean similarity + orders", 0.5, orders=orders),
        pytest.raises(PlanError, match="orders are for 128 tokens; the model produced 6x8x5"),
    ):
        tiny.latents(pipe, **LATENTS)
