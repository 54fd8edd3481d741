"""Baselines: each rule keeps what its paper says, at exactly the wanted density."""

import math
from dataclasses import replace

import oracles
import pytest
import tiny
import torch
from paroattn_lab.baselines import (
    DYNAMIC_BASELINES,
    STATIC_BASELINES,
    apply_dynamic,
    dynamic,
    static_baseline,
)
from paroattn_lab.baselines.scores import mean_similarity, vertical_slash

from paroattn import PlanError, TokenGrid
from paroattn.block_mask import block_count, text_blocks, unpack_bits
from paroattn.calibration.paper import CalibrationStatistics
from paroattn.calibration.statistics import block_sums
from paroattn.integrations.apply import apply
from paroattn.integrations.descriptors import DESCRIPTORS
from paroattn.order import token_order
from paroattn.plan import ModelIdentity

EDGES = (0.0, 0.25)
GRIDS = [
    TokenGrid(6, 8, 16),
    TokenGrid(9, 7, 11),  # nothing divides anything
    TokenGrid(4, 12, 13, 20, "prefix"),
    TokenGrid(5, 13, 12, 100, "suffix"),
    TokenGrid(1, 24, 24, 7),  # an image
    TokenGrid(2, 3, 90),  # no tile fits
]


def statistics(grid, order="FHW", sums=None, layers=2, heads=3):
    blocks = block_count(grid.tokens, 64)
    if sums is None:
        sums = torch.rand(len(EDGES), layers, heads, blocks, blocks, generator=torch.Generator().manual_seed(0))
    return CalibrationStatistics(
        model=ModelIdentity("Model", "abc", *sums.shape[1:3], 8),
        grid=grid,
        order_names=(order,),
        order_index=torch.zeros(sums.shape[1:3], dtype=torch.uint8),
        schedule=tuple(1 - step / 100 for step in range(100)),
        bucket_edges=EDGES,
        block_sums=sums,
        usage=torch.ones(sums.shape[:2]),
        provenance={"prompts": ["a cat"]},
    )


def static_masks(name, grid, density, **options):
    """Bool [buckets, layers, heads, blocks, blocks] and the plan."""
    plan = static_baseline(name, statistics(grid), density, temporal=statistics(grid, "HWF"), **options)
    return unpack_bits(plan.mask_table, block_count(grid.tokens, 64))[plan.mask_index.long()], plan


def one_mask(name, grid, density):
    """The mask of a rule that has the same one everywhere."""
    masks, plan = static_masks(name, grid, density)
    assert plan.mask_table.shape[0] == 1
    return masks[0, 0, 0]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", STATIC_BASELINES)
def test_every_head_has_the_wanted_density_and_all_text(name, grid):
    blocks = block_count(grid.tokens, 64)
    for density in (0.55, 0.8, 1.0):
        masks, plan = static_masks(name, grid, density)
        assert (masks.sum((-2, -1)) == round(density * blocks**2)).all()
        assert masks[..., text_blocks(grid)].all()
        assert masks.any(-1).all()
        assert plan.grid == grid
        assert plan.bucket_edges == EDGES
        assert plan.provenance["method"] == name
        assert plan.provenance["prompts"] == ["a cat"]


def test_sliding_window_is_a_band():
    block = torch.arange(12)
    band = (block.unsqueeze(1) - block).abs() <= 2
    assert torch.equal(one_mask("sliding window", TokenGrid(6, 8, 16), float(band.double().mean())), band)


def test_a_density_between_two_bands_is_spread_over_the_rows():
    block = torch.arange(32)
    distance = (block.unsqueeze(1) - block).abs()
    kept = one_mask("sliding window", TokenGrid(16, 8, 16), float(((distance <= 2).sum() + 29) / 32**2))
    assert kept[distance <= 2].all()
    rows = kept[distance == 3].nonzero()  # 29 of these 58
    assert len(rows) == 29
    assert (kept & (distance == 3))[:16].sum() == pytest.approx(14.5, abs=2.5)


@pytest.mark.parametrize("window", [0.5, 1, 2, 3, 4])  # in blocks, of the 4 that a frame has
def test_radial_halves_the_window_when_the_distance_in_time_doubles(window):
    frames, per_frame = 17, 4
    grid = TokenGrid(frames, 16, 16)
    expected = torch.zeros(frames, per_frame, frames, per_frame, dtype=torch.bool)
    share = {}  # of the blocks at distances from 2^n to below 2^(n + 1)
    for i in range(frames):
        for j in range(frames):
            distance = abs(i - j)
            halvings = int(math.log2(max(distance, 1)))
            width = max(window, 1) / 2**halvings
            for a in range(per_frame):
                for b in range(per_frame):
                    if width >= 1:
                        expected[i, a, j, b] = abs(a - b) + 1 <= width
                    else:
                        expected[i, a, j, b] = a == b and distance % 2 ** math.ceil(-math.log2(width)) == 0
            if distance:
                share.setdefault(halvings, []).append(expected[i, :, j].double().mean())
    expected = expected.view(frames * per_frame, -1)
    assert torch.equal(one_mask("radial", grid, float(expected.double().mean())), expected)
    shares = [float(torch.stack(share[halvings]).mean()) for halvings in range(4)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 2 * shares[3]


def test_radial_with_one_block_per_frame_sees_fewer_frames_further_away():
    kept = one_mask("radial", TokenGrid(16, 8, 8), 168 / 256)
    assert kept[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 6, 8, 12]


def tile_mask(grid, density):
    """Kept blocks, and the coordinates of each block's first token [blocks, 3]."""
    masks, plan = static_masks("sliding tile", grid, density)
    order = token_order(plan.order_names[0], grid)[: grid.visual_tokens : 64] - grid.visual_start
    frame = grid.height * grid.width
    corner = torch.stack([order // frame, order % frame // grid.width, order % grid.width], 1)
    return masks[0, 0, 0], corner, plan


def test_sliding_tiles_of_an_inner_tile_form_a_box():
    grid = TokenGrid(20, 20, 20)
    tile = torch.cartesian_prod(*(torch.arange(5),) * 3)
    near = (tile.unsqueeze(1) - tile).abs().amax(-1) <= 1
    kept, corner, plan = tile_mask(grid, float(near.double().mean()))
    assert plan.order_names == ("4x4x4",)
    inner = int((corner == 8).all(1).nonzero())
    assert sorted(corner[kept[inner]].tolist()) == (4 * torch.cartesian_prod(*(torch.arange(1, 4),) * 3)).tolist()


def test_sliding_windows_have_the_proportions_of_the_grid():
    grid = TokenGrid(40, 12, 12)
    tile = torch.cartesian_prod(torch.arange(10), torch.arange(3), torch.arange(3))
    near = ((tile.unsqueeze(1) - tile).abs() <= torch.tensor([3, 1, 1])).all(-1)  # 3.3 times as long as it is high
    kept, corner, _ = tile_mask(grid, float(near.double().mean()))
    inner = int((corner == torch.tensor([16, 4, 4])).all(1).nonzero())
    box = corner[kept[inner]]
    assert box.amin(0).tolist() == [4, 0, 0]
    assert box.amax(0).tolist() == [28, 8, 8]
    assert len(box) == 7 * 3 * 3


def test_images_have_flat_tiles_and_remainders_are_near_their_neighbours():
    grid = TokenGrid(1, 20, 24)
    kept, _, plan = tile_mask(grid, 0.5)
    assert plan.order_names == ("1x8x8",)
    last = block_count(grid.tokens, 64) - 1  # of the remainder: rows 16 to 19
    order = token_order("1x8x8", grid)
    assert (order[64 * last :] // 24 >= 16).all()
    seen = order.split(64)
    lowest = [float((seen[block] // 24).double().mean()) for block in kept[last].nonzero().flatten()]
    skipped = [float((seen[block] // 24).double().mean()) for block in (~kept[last]).nonzero().flatten()]
    assert sum(lowest) / len(lowest) > sum(skipped) / len(skipped)


def synthetic_sums(grid, order):
    """Block sums [buckets, 1, 2, blocks, blocks] of a head that sees its own frame and of one that sees its place."""
    token = torch.arange(grid.visual_tokens)
    frame, place = token // (grid.height * grid.width), token % (grid.height * grid.width)
    heads = []
    for coordinate in (frame, place):
        q = torch.eye(int(coordinate.max()) + 1)[coordinate] * 4
        q = torch.cat((q, torch.zeros(grid.text_tokens, q.shape[1])))
        heads.append(block_sums(q, q, [token_order(order, grid)], 1.0)[0])
    return torch.stack(heads).expand(len(EDGES), 1, -1, -1, -1)


@pytest.mark.parametrize("grid", [TokenGrid(16, 8, 8), TokenGrid(9, 10, 10, 30)], ids=str)
def test_heads_are_spatial_or_temporal_as_they_attend(grid):
    original = statistics(grid, sums=synthetic_sums(grid, "FHW"))
    temporal = statistics(grid, "HWF", synthetic_sums(grid, "HWF"))
    plan = static_baseline("spatial/temporal", original, 0.35, temporal=temporal)
    assert plan.order_names == ("FHW", "HWF")
    assert plan.order_index.tolist() == [[0, 1]]
    masks = unpack_bits(plan.mask_table, block_count(grid.tokens, 64))[plan.mask_index[0, 0].long()]
    block = torch.arange(masks.shape[-1])
    distance = (block.unsqueeze(1) - block).abs()
    whole = grid.visual_tokens // 64
    assert masks[0, :, : -(-grid.height * grid.width // 64)].all()  # the first frame
    assert masks[0].diagonal().all()
    skipped = ~masks[1, :whole, :whole]
    assert distance[:whole, :whole][skipped].min() >= distance[:whole, :whole][~skipped].max()


def test_the_kind_that_holds_more_over_the_whole_schedule_is_taken():
    grid = TokenGrid(16, 8, 8)
    near = torch.eye(16) + 0.01
    original = statistics(grid, sums=torch.stack((2 * near, near)).view(2, 1, 1, 16, 16))  # the first quarter, the rest
    temporal = statistics(grid, "HWF", torch.stack((near, 1.5 * near)).view(2, 1, 1, 16, 16))
    assert static_baseline("spatial/temporal", original, 0.1, temporal=temporal).order_index.item() == 1


def test_spatial_temporal_needs_both_orders():
    grid = TokenGrid(4, 8, 8)
    with pytest.raises(ValueError, match="needs `temporal`"):
        static_baseline("spatial/temporal", statistics(grid), 0.5)
    with pytest.raises(ValueError, match=r"temporal has block sums in the orders \['FHW'\]; expected 'HWF'"):
        static_baseline("spatial/temporal", statistics(grid), 0.5, temporal=statistics(grid))
    with pytest.raises(ValueError, match="different models or grids"):
        static_baseline("spatial/temporal", statistics(grid), 0.5, temporal=statistics(TokenGrid(8, 8, 4), "HWF"))


def test_random_masks_differ_everywhere_and_are_the_same_again():
    grid = TokenGrid(16, 8, 8)
    masks, plan = static_masks("random", grid, 0.3)
    assert plan.mask_table.shape[0] == masks.shape[:3].numel()  # all different
    assert masks.diagonal(dim1=-2, dim2=-1).all()
    assert torch.equal(masks, static_masks("random", grid, 0.3)[0])
    assert not torch.equal(masks, static_masks("random", grid, 0.3, seed=1)[0])


@pytest.mark.parametrize(
    ("name", "density", "error", "message"),
    [
        ("radical", 0.5, ValueError, "baseline 'radical' is unknown; expected one of 'sliding window'"),
        ("radial", 0, ValueError, "density is 0"),
        ("radial", 0.1, PlanError, "density 0.1 cannot be reached"),
    ],
)
def test_impossible_static_baselines_are_refused(name, density, error, message):
    with pytest.raises(error, match=message):
        static_baseline(name, statistics(TokenGrid(4, 8, 8)), density)


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
    descriptor = replace(DESCRIPTORS["WanTransformer3DModel"], box=lambda config, arguments: (7, 5, 6), text=position)
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


@pytest.mark.parametrize("name", STATIC_BASELINES)
def test_static_plans_run_and_at_density_1_change_nothing(pipe, full, name):
    model = tiny.make_plan(pipe).model
    given = {
        order: replace(statistics(GRID, order, heads=2), model=model, provenance={"order": order})
        for order in ("FHW", "HWF")
    }
    for density, low, high in ((1.0, 0, 1e-4), (0.5, 1e-3, 1)):
        plan = static_baseline(name, given["FHW"], density, temporal=given["HWF"])
        with apply(pipe, plan):
            applied = tiny.latents(pipe, **LATENTS)
        assert low <= torch.linalg.norm(applied - full) / torch.linalg.norm(full) <= high
    assert torch.equal(tiny.latents(pipe, **LATENTS), full)


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
