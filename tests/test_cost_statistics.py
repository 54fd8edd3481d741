"""Statistics of a calibration that are kept: saved, merged, and what plans and other calibrations are made of them."""

import json
from dataclasses import fields, replace

import pytest
import safetensors.torch
import tiny
import torch
from click.testing import CliRunner
from torch import Tensor

import paroattn
from paroattn import InputError, PlanError
from paroattn.calibration.budget import select_by_cost, select_like
from paroattn.calibration.calibrate import collect_costs
from paroattn.calibration.cost_statistics import CostStatistics, statistics_path
from paroattn.cli.group import command_line
from paroattn.plan import Plan

CALL = tiny.call_arguments(height=160)  # five rows of blocks
OTHER = {**CALL, "prompt_embeds": -tiny.TEXT}


@pytest.fixture(scope="module")
def pipe():
    return tiny.tiny_wan()


@pytest.fixture(scope="module")
def kept(pipe, tmp_path_factory):
    """A plan's file with its statistics beside it."""
    path = tmp_path_factory.mktemp("kept") / "plan.safetensors"
    plan = paroattn.calibrate(
        pipe, [CALL], density=0.75, precision="int8", dense_layers=1,
        keep_statistics=statistics_path(path), prompt_texts=["a cat"], progress=False,
    )  # fmt: skip
    plan.save(path)
    return path


def masks(plan):
    return plan.mask_table[plan.mask_index.long()]


def run(*arguments):
    return CliRunner().invoke(command_line, [str(argument) for argument in arguments])


@pytest.mark.parametrize("settings", [{}, {"thorough": True, "block_sums": True}])
def test_statistics_are_the_same_after_saving(pipe, tmp_path, settings):
    measured = collect_costs(pipe, [CALL], progress=False, **settings)
    measured.save(tmp_path / "statistics")
    loaded = CostStatistics.load(tmp_path / "statistics")
    for field in fields(measured):
        one, two = getattr(measured, field.name), getattr(loaded, field.name)
        assert type(one) is type(two)
        assert torch.equal(one, two) if isinstance(one, Tensor) else one == two
    assert (measured.tops is None) == bool(settings)


def test_a_plan_of_another_density_comes_from_the_file_alone(pipe, kept, tmp_path):
    result = run("plan", "adapt", kept, "--density", "0.65", "--output", tmp_path / "sparse.safetensors")
    assert result.exit_code == 0, result.output
    made = Plan.load(tmp_path / "sparse.safetensors")
    expected = paroattn.calibrate(pipe, [CALL], density=0.65, precision="int8", dense_layers=1, progress=False)
    assert made.density() == pytest.approx(0.65, abs=1 / 32)
    assert made.precisions == expected.precisions
    assert made.densities()[:, 0].min() == 1
    same = select_like(Plan.load(kept), CostStatistics.load(statistics_path(kept)))
    assert torch.equal(masks(same), masks(Plan.load(kept)))
    path = tmp_path / "both.safetensors"
    result = run("plan", "adapt", kept, "--density", "0.65", "--grid", "6x12x5", "--output", path)
    assert result.exit_code == 0, result.output
    assert Plan.load(path).grid.height == 12


def test_merged_calibrations_are_those_of_all_prompts(pipe):
    settings = {"thorough": True, "effects": False, "progress": False}
    first = collect_costs(pipe, [CALL], **settings)
    both = collect_costs(pipe, [CALL, CALL], start=first, **settings)
    second = collect_costs(pipe, [CALL], start=first, seed=1, **settings)
    found, skipped = first.merged([second])
    assert skipped == 0
    assert torch.equal(found.samples, both.samples)
    torch.testing.assert_close(found.errors, both.errors, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(found.norms, both.norms)
    torch.testing.assert_close(found.costs, both.costs, rtol=2**-7, atol=1e-30)
    plans = [select_by_cost(each, density=0.5) for each in (found, both, first)]
    agreement = [float((masks(plan) == masks(plans[1])).double().mean()) for plan in plans]
    assert agreement[0] > 0.98 > agreement[2]


def test_codes_of_two_calibrations_are_added_whatever_they_are_relative_to(pipe):
    first = collect_costs(pipe, [CALL], progress=False)
    scaled = replace(first, tops=first.tops * 16)  # 17 times as much in all
    found, _ = first.merged([scaled])
    seen = (first.costs > 40) & (first.costs < 200)
    assert (found.costs[seen].int() - first.costs[seen].int() - 8 * torch.tensor(17.0).log2()).abs().max() <= 1
    unseen = replace(first, tops=torch.zeros_like(first.tops), costs=torch.zeros_like(first.costs))
    found, _ = unseen.merged([first])
    assert (found.costs.int() - first.costs.int()).abs().max() <= 1
    assert torch.equal(found.tops > 0, first.tops > 0)


def test_heads_with_another_order_keep_what_the_first_plan_knows(pipe):
    settings = {"effects": False, "progress": False}
    first = collect_costs(pipe, [CALL], order_names=("FHW",), **settings)
    other = collect_costs(pipe, [OTHER], order_names=("HWF",), **settings)
    found, skipped = first.merged([other])
    assert skipped == first.order_index.numel()
    assert torch.equal(found.costs, first.costs)
    assert torch.equal(found.errors, first.errors)


def test_a_calibration_that_starts_from_a_plan_takes_its_orders(pipe, kept, monkeypatch, tmp_path):
    """Also at another size; with its statistics it does not measure effects, either."""
    for place in ("OrderErrors.add", "measure_effects"):
        monkeypatch.setattr(f"paroattn.calibration.calibrate.{place}", lambda *_, **__: pytest.fail("measured again"))
    plan = paroattn.calibrate(pipe, [OTHER], density=0.75, start=kept, progress=False)
    assert torch.equal(plan.order_index, Plan.load(kept).order_index)
    assert plan.order_names == Plan.load(kept).order_names
    large = paroattn.calibrate(pipe, [tiny.call_arguments(height=192)], density=0.75, start=kept, progress=False)
    assert large.grid.height == 12
    assert large.density() == pytest.approx(0.75, abs=1 / 32)
    more_steps = paroattn.calibrate(
        pipe, [{**CALL, "num_inference_steps": 6}], density=0.75, start=kept, step_buckets=5, progress=False
    )
    assert more_steps.buckets == 5
    paroattn.calibrate(pipe, [OTHER], density=0.75, start=kept, progress=False, work_dir=tmp_path / "work")
    monkeypatch.undo()
    monkeypatch.setattr("paroattn.calibration.calibrate.OrderErrors.add", lambda *_: pytest.fail("measured again"))
    with_effects = paroattn.calibrate(pipe, [OTHER], density=0.75, start=Plan.load(kept), progress=False)
    assert torch.equal(with_effects.order_index, plan.order_index)
    with pytest.raises(InputError, match="start is for another model: WanTransformer3DModel of 2 layers of 2 heads"):
        paroattn.calibrate(tiny.tiny_wan(layers=3), [OTHER], start=kept, progress=False)


def test_statistics_that_cannot_be_kept_are_refused_before_anything_is_measured(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr("paroattn.calibration.calibrate.collect_costs", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(InputError, match="is a directory; expected a file name"):
        paroattn.calibrate(pipe, [CALL], keep_statistics=tmp_path, progress=False)


def test_plans_of_two_prompts_are_merged_by_one_command(pipe, kept, tmp_path):
    second = tmp_path / "second.safetensors"
    paroattn.calibrate(
        pipe, [OTHER], density=0.75, start=kept, keep_statistics=statistics_path(second), prompt_texts=["a dog"],
        progress=False,
    ).save(second)  # fmt: skip
    result = run("plan", "merge", kept, second, "--density", "0.65", "--output", tmp_path / "both.safetensors")
    assert result.exit_code == 0, result.output
    assert "left out" not in result.output
    merged = Plan.load(tmp_path / "both.safetensors")
    assert merged.provenance["prompts"] == ["a cat", "a dog"]
    assert "int8" in map(str, merged.precisions)
    assert merged.density() == pytest.approx(0.65, abs=1 / 32)
    ones = [select_like(Plan.load(kept), CostStatistics.load(statistics_path(path)), 0.65) for path in (kept, second)]
    assert not any(torch.equal(masks(merged), masks(one)) for one in ones)
    assert float(CostStatistics.load(statistics_path(tmp_path / "both.safetensors")).samples.max()) == 2


@pytest.mark.parametrize("form", ["flex", "bsr", "coo"])
def test_exported_masks_keep_the_same_blocks(kept, tmp_path, form):
    path = tmp_path / "masks.safetensors"
    result = run("plan", "export", kept, path, "--layer", 1, "--bucket", 2, "--form", form)
    assert result.exit_code == 0, result.output
    found, plan = safetensors.torch.load_file(path), Plan.load(kept)
    dense = plan.mask(2, 1).to_dense()
    assert not dense.all()
    assert torch.equal(found["order"].int(), plan.layer(1).permutation)
    seen = torch.zeros_like(dense)
    for head in range(len(dense)):
        if form == "coo":
            seen[tuple(found["blocks"])] = True
        for row in range(dense.shape[1]):
            if form == "flex":
                seen[head, row, found["kv_indices"][head, row, : found["kv_num_blocks"][head, row]].long()] = True
            if form == "bsr":
                start, end = found[f"indptr.{head}"][row : row + 2].tolist()
                seen[head, row, found[f"indices.{head}"][start:end].long()] = True
    assert torch.equal(seen, dense)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapt", "PLAN"], "Missing option '--output'"),
        (["adapt", "PLAN", "--output", "x"], "expected --grid, --density or both"),
        (["adapt", "PLAN", "--grid", "6x4", "--output", "x"], "--grid is '6x4'; expected frames, height and width"),
        (["adapt", "PLAN", "--density", "0.001", "--output", "x"], "density 0.001 cannot be reached"),
        (["adapt", "PLAN", "--density", "0.5", "--output", "PLAN"], "is also an input"),
        (["adapt", "BARE", "--density", "0.5", "--output", "x"], "keep them by `paroattn calibrate --keep-statistics`"),
        (["merge", "PLAN", "--output", "x"], "Missing argument"),
        (["merge", "PLAN", "BARE", "--output", "x"], "keep them by `paroattn calibrate --keep-statistics`"),
        (["export", "PLAN", "x", "--layer", "2"], "--layer is 2; the plan has 2, counted from 0"),
        (["export", "PLAN", "x", "--bucket", "9"], "--bucket is 9; the plan has 4, counted from 0"),
    ],
)
def test_bad_input_is_one_clear_line(kept, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    names = {"PLAN": kept, "BARE": tmp_path / "bare.safetensors"}
    Plan.load(kept).save(names["BARE"])
    before = kept.read_bytes()
    result = run("plan", *(names.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1]
    assert result.stderr.startswith("Error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["bare.safetensors"]
    assert kept.read_bytes() == before


def test_statistics_that_are_not_finite_are_refused(kept):
    costs = CostStatistics.load(statistics_path(kept))
    for name in ("weights", "errors"):
        with pytest.raises(InputError, match=f"{name} of the calibration are not finite"):
            replace(costs, **{name: getattr(costs, name) * torch.nan})


def test_statistics_that_do_not_belong_together_are_refused(kept, tmp_path, monkeypatch):
    own = CostStatistics.load(statistics_path(kept))
    for change, message in (
        ({"grid": replace(own.grid, height=2)}, "the grid of the first is 6x10x5"),
        ({"schedule": (1.0,)}, "the schedule of the first is"),
        ({"costs": own.costs.bfloat16()}, "the kind of costs of the first is torch.uint8"),
    ):
        with pytest.raises(InputError, match=message):
            own.merged([replace(own, **change)])
    with pytest.raises(InputError, match="the plan is for WanTransformer3DModel at 6x6x5"):
        select_like(Plan.load(kept).adapt(replace(own.grid, height=6)), own)
    plan = Plan.load(kept)
    with pytest.raises(PlanError, match="does not say how its blocks were chosen"):
        select_like(replace(plan, provenance={**plan.provenance, "selection": {"luck": 1}}), own)
    monkeypatch.setattr("paroattn.calibration.cost_statistics._VERSION", 2)
    with pytest.raises(InputError, match="^statistics .* are of another version of paroattn"):
        CostStatistics.load(statistics_path(kept))
    for name, content in (("other", json.dumps({}).encode()), ("plan", kept.read_bytes())):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="holds no readable statistics"):
            CostStatistics.load(tmp_path / name)
