"""Looking into plans: facts, differences, and the command that shows them."""

import dataclasses
import json

import pytest
import tiny
import torch
from click.testing import CliRunner

from paroattn.block_mask import pack_bits, unpack_bits
from paroattn.cli.group import command_line
from paroattn.plan_facts import plan_difference, plan_facts


def run(*arguments):
    return CliRunner().invoke(command_line, [str(argument) for argument in arguments])


def masks(*skipped):
    """All blocks but some, bool [2 buckets, 2 layers, 2 heads, 2, 2]."""
    found = torch.ones(2, 2, 2, 2, 2, dtype=torch.bool)
    for place in skipped:
        found[place] = False
    return found


@pytest.fixture(scope="module")
def pipe():
    return tiny.tiny_wan()


@pytest.fixture(scope="module")
def plan(pipe):
    return tiny.make_plan(pipe, masks((0, 1, 0, 0, 1), (0, 1, 0, 1, 0), (1, 0, 1, 0, 1)), edges=(0.0, 0.25))


@pytest.fixture
def path(plan, tmp_path):
    plan.save(tmp_path / "one [red].safetensors")
    return tmp_path / "one [red].safetensors"


def test_densities_are_weighted_by_the_steps(plan):
    assert plan.head_densities().tolist() == [[1.0, 1 - 0.25 * 0.75], [1 - 0.5 * 0.25, 1.0]]
    assert float(plan.head_densities().mean()) == pytest.approx(plan.density())
    facts = plan_facts(plan)
    assert facts["density of step buckets"] == [0.875, 0.9375]
    assert [layer["density"] for layer in facts["layers"]] == pytest.approx([0.90625, 0.9375])
    assert facts["layers"][0]["order counts"] == {"FWH": 1, "HFW": 1}


def test_a_plan_differs_from_itself_in_nothing(plan):
    found = plan_difference(plan, plan)
    assert (found["fields"], found["other orders"], found["other masks"]) == ({}, 0.0, 0.0)
    assert found["compared heads"] == 1.0


def test_differences_count_blocks_by_the_steps_they_serve(pipe, plan):
    """The other plan has other step buckets, one head in another order, and blocks that only one of them computes."""
    other = tiny.make_plan(pipe, masks((0, 1, 0, 0, 1), (1, 0, 1, 0, 1)), edges=(0.0, 0.5), precision="int8")
    order_index = other.order_index.clone()
    order_index[1, 1] = 0
    other = dataclasses.replace(other, order_index=order_index)
    found = plan_difference(plan, other)
    assert found["fields"]["precisions"] == [["exact"], ["int8"]]
    assert found["fields"]["step buckets start at"] == [[0.0, 0.25], [0.0, 0.5]]
    assert found["other orders"] == 0.25
    # Layer 1, head 0: (1, 0) in the first quarter, (0, 1) from there to the half; layer 0, head 1: (0, 1) in the second
    # quarter. Three heads of four blocks are compared.
    assert found["other masks"] == pytest.approx((0.25 + 0.25 + 0.25) / 12, abs=1e-6)
    assert found["layers"][0] == pytest.approx([0.90625, 0.9375])


def test_plans_of_other_sizes_have_fields_to_compare_only(pipe, plan):
    other = tiny.make_plan(tiny.tiny_wan(layers=1))
    found = plan_difference(plan, other)
    assert found["fields"]["model layers"] == [2, 1]
    assert found["layers"] is None
    assert found["other masks"] is None


def test_packed_masks_have_the_densities_of_their_blocks(plan):
    assert torch.equal(plan.densities(), unpack_bits(plan.mask_table, 2).double().mean((1, 2))[plan.mask_index.long()])
    assert pack_bits(torch.ones(9, dtype=torch.bool)).tolist() == [255, 1]


def test_show_prints_tables_and_json(path, plan):
    shown = run("plan", "show", path)
    assert shown.exit_code == 0
    for text in ("one [red].safetensors", "WanTransformer3DModel", "6x4x5", "FWH x1, HFW x1", "0.906"):
        assert text in shown.output
    facts = json.loads(run("plan", "show", path, "--json").output)
    assert facts["layers"][0]["orders"] == ["FWH", "HFW"]
    assert facts["size in bytes"] == path.stat().st_size


def test_show_compares_two_plans(path, pipe, tmp_path):
    tiny.make_plan(pipe).save(tmp_path / "two.safetensors")
    shown = run("plan", "show", path, "--diff", tmp_path / "two.safetensors")
    assert shown.exit_code == 0
    assert "step buckets start at" in shown.output
    assert "+0.094" in shown.output
    found = json.loads(run("plan", "show", path, "--diff", tmp_path / "two.safetensors", "--json").output)
    assert found["layers"][0] == pytest.approx([0.90625, 1.0])


def test_bad_input_is_one_line(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("plan", "show", path, "--diff", "missing.safetensors")
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: ")
    assert "'missing.safetensors' does not exist" in line
