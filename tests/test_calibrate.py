"""Calibration of a running pipeline."""

import re

import oracles
import pytest
import tiny
import torch

import paroattn
from paroattn.calibration.paper import collect_block_sums
from paroattn.calibration.statistics import OrderCriterion
from paroattn.order import token_order
from paroattn.plan import bucket_of

PROMPTS = [tiny.call_arguments(), tiny.call_arguments()]


@pytest.fixture(scope="module")
def pipe():
    return tiny.tiny_wan()


def test_the_same_arguments_give_the_same_plan_file(pipe, tmp_path):
    for name in ("first", "second"):
        paroattn.calibrate(pipe, PROMPTS, density=0.75, seed=3, progress=False).save(tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    paroattn.calibrate(pipe, PROMPTS, density=0.75, seed=4, progress=False).save(tmp_path / "third")
    assert (tmp_path / "first").read_bytes() != (tmp_path / "third").read_bytes()


def test_the_plan_says_what_was_asked_for_and_fits_the_pipeline(pipe):
    plan = paroattn.calibrate(pipe, PROMPTS, density=0.75, precision="int8", prompt_texts=["a", "b"], progress=False)
    assert plan.grid == tiny.GRID
    assert plan.density() == pytest.approx(0.75, abs=1 / 32)  # to a block of one step
    assert [str(precision) for precision in plan.precisions] == ["int8"]
    assert plan.bucket_edges == (0.0, 0.25, 0.5, 0.75)
    assert plan.provenance["method"] == "paroattn"
    assert plan.provenance["prompts"] == ["a", "b"]
    assert plan.provenance["num_inference_steps"] == tiny.STEPS
    with paroattn.apply(pipe, plan):
        assert tiny.latents(pipe).isfinite().all()


def test_long_sequences_get_blocks_of_128_queries(pipe, tmp_path, monkeypatch):
    few, many = tiny.GRID.tokens + 1, tiny.GRID.tokens
    for least, block_q in ((few, 64), (many, 128)):
        monkeypatch.setattr("paroattn.block_mask._MANY_TOKENS", least)
        plans = [
            paroattn.calibrate(pipe, PROMPTS, density=0.9, progress=False),
            paroattn.Plan.default(paroattn.identify(pipe), tiny.GRID, 0.9),
        ]
        with paroattn.apply(pipe, density=0.9, requests=1, cache=tmp_path / str(block_q)) as handle:
            tiny.latents(pipe)
            plans.append(handle.plan)
        assert [plan.block_q for plan in plans] == [block_q] * 3
    plan = paroattn.calibrate(pipe, PROMPTS, density=0.9, block_q=64, progress=False)
    assert plan.block_q == 64
    with paroattn.apply(pipe, plans[0], strict=True):
        assert tiny.latents(pipe).isfinite().all()


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_block_sums_equal_the_mean_over_all_calls_of_a_bucket(pipe, guidance_scale, monkeypatch):
    """Against queries and keys kept by a second pass and full maps in float64."""
    arguments = tiny.call_arguments(guidance_scale=guidance_scale)
    statistics, original = collect_block_sums(pipe, [arguments], fixed_orders=("FHW",), progress=False)
    kept = []

    def keep(query, key, value, *args, backend=None, **kwargs):
        kept.append((query, key))
        return torch.nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        ).transpose(1, 2)

    import diffusers.models.transformers.transformer_wan as upstream

    monkeypatch.setattr(upstream, "dispatch_attention_fn", keep)
    pipe(**{**arguments, "generator": torch.Generator().manual_seed(0)})
    self_attention = [(q, k) for q, k in kept if q.shape == k.shape]
    calls_per_step = len(self_attention) // tiny.STEPS
    for measured in (statistics, original):
        expected = torch.zeros_like(measured.block_sums, dtype=torch.float64)
        calls = torch.zeros(len(measured.bucket_edges), 2, 1, 1, 1)
        for number, (q, k) in enumerate(self_attention):
            bucket = bucket_of(measured.bucket_edges, number // calls_per_step, tiny.STEPS)
            layer = number % 2
            for head in range(2):
                order = token_order(measured.order_names[int(measured.order_index[layer, head])], tiny.GRID)
                expected[bucket, layer, head] += oracles.block_sums(q[0, :, head], k[0, :, head], order)
            calls[bucket, layer] += 1
        torch.testing.assert_close(measured.block_sums.double(), expected / calls, rtol=1e-5, atol=1e-5)


def test_one_candidate_order_keeps_the_models_own(pipe):
    plan = paroattn.calibrate(pipe, PROMPTS[:1], density=0.75, order_names=("FHW",), progress=False)
    assert plan.order_names == ("FHW",)


def test_step_buckets_bound_the_number_of_masks_sets(pipe):
    plan = paroattn.calibrate(pipe, PROMPTS[:1], density=0.75, step_buckets=1, progress=False)
    assert plan.bucket_edges == (0.0,)


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        ([], {}, "expected a list of at least one prompt"),
        ("a cat", {}, "expected a list of at least one prompt"),
        (PROMPTS, {"density": 0}, r"density is 0; expected a number above 0, up to 1"),
        (PROMPTS, {"density": 1.5}, r"density is 1.5; expected a number above 0, up to 1"),
        (PROMPTS, {"precision": "int3"}, "int3"),
        (PROMPTS, {"order_names": ("FHW", "XYZ")}, "token order 'XYZ' is unknown"),
        (PROMPTS, {"step_buckets": 0}, "step_buckets is 0"),
        (PROMPTS, {"order_names": ("FHW",), "start": "a.safetensors"}, "order_names are given beside start"),
        (PROMPTS, {"density": 0.01}, "density 0.01 cannot be reached"),
        ([tiny.call_arguments(), tiny.call_arguments(height=48)], {}, "prompts give different token grids"),
    ],
)
def test_bad_arguments_are_refused_and_the_pipeline_stays_as_it_was(pipe, prompts, arguments, message):
    before = tiny.latents(pipe)
    with pytest.raises(ValueError, match=message):
        paroattn.calibrate(pipe, prompts, progress=False, **{"density": 0.75, **arguments})
    assert torch.equal(tiny.latents(pipe), before)


def test_criterion_parameters_are_checked():
    for changes in ({"alpha": 2}, {"sigma": 0}, {"epsilon": -1}, {"relative_epsilon": 0}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            OrderCriterion(**changes)


@pytest.mark.parametrize("calibrate", [paroattn.calibrate, paroattn.calibrate_paper])
def test_calibration_says_where_its_time_went(pipe, capsys, calibrate):
    calibrate(pipe, PROMPTS[:1], density=0.75)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("calibration measured")]
    assert re.match(r"calibration measured for [\d.]+ s: ", line)
    parts = [part.rpartition(" ") for part in line.partition(" s: ")[2].split(", ")]
    assert {"token orders"} < {name for name, _, _ in parts}
    seconds = [float(number) for _, _, number in parts]
    assert seconds == sorted(seconds, reverse=True)
    calibrate(pipe, PROMPTS[:1], density=0.75, progress=False)
    assert not capsys.readouterr().err
