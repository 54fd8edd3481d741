"""Plan files: what comes back, and what is refused."""

import json
import struct
from dataclasses import replace

import pytest
import tiny
import torch
from plan_files import apart, masks_of
from safetensors import SafetensorError
from safetensors.torch import save_file

import paroattn
from paroattn import PlanError
from paroattn.block_mask import block_count, pack_bits
from paroattn.order import token_order
from paroattn.plan import Plan, first_steps
from paroattn.plan_file import read_header

TENSORS = ("order_index", "precision_index", "compensate", "usage")


@pytest.fixture(scope="module")
def plan():
    blocks = block_count(tiny.GRID.tokens, 64)
    masks = torch.rand(2, 2, 2, blocks, blocks, generator=torch.Generator().manual_seed(2)) < 0.5
    masks |= torch.eye(blocks, dtype=torch.bool)
    made = tiny.make_plan(tiny.tiny_wan(), masks, edges=(0.0, 0.25), precision="int8/bf16")
    return replace(made, provenance={"prompts": ["é"], "seed": 1})


@pytest.fixture
def path(plan, tmp_path):
    plan.save(tmp_path / "plan.safetensors")
    return tmp_path / "plan.safetensors"


def rewrite(path, change_header=None, **change_tensors):
    """Save a plan file again with another header or other tensors, under the checksum it had."""
    header, tensors = apart(path)
    tensors.update(change_tensors)
    if change_header:
        change_header(header)
    save_file(tensors, path, metadata={"paroattn_plan": json.dumps(header, sort_keys=True)})


def test_a_plan_comes_back_as_it_was(plan, path, tmp_path):
    loaded = Plan.load(path)
    for name in TENSORS:
        assert torch.equal(getattr(loaded, name), getattr(plan, name))
    assert torch.equal(masks_of(loaded), masks_of(plan))
    for name in (
        "model",
        "grid",
        "order_names",
        "precisions",
        "schedule",
        "bucket_edges",
        "provenance",
        "block_q",
        "block_kv",
    ):
        assert getattr(loaded, name) == getattr(plan, name)
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["again", "plan.safetensors"]


def test_a_failing_save_keeps_the_old_file(plan, path, monkeypatch):
    before = path.read_bytes()

    def fill_the_disk(*_, **__):
        raise SafetensorError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fill_the_disk)
    with pytest.raises(OSError, match="disk full"):
        plan.save(path)
    assert path.read_bytes() == before
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_every_truncation_is_refused(path):
    content = path.read_bytes()
    for length in (0, 1, 7, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(PlanError, match="not a readable safetensors file") as error:
            Plan.load(path)
        assert "\n" not in str(error.value)


def test_every_flipped_bit_of_the_tensors_is_refused(path):
    content = path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    for position in range(start, len(content), max(1, (len(content) - start) // 40)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        with pytest.raises(PlanError):
            Plan.load(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 2, "plan format version is 2; this paroattn reads up to 1. Install a newer paroattn"),
        ("grid", {"frames": 4, "height": 6, "width": 5, "text_tokens": 0, "text_position": "suffix"}, "checksum"),
        ("bucket_edges", [0.0, 0.5], "checksum"),
        ("sigmas", [1.0, 0.5], "checksum"),
    ],
)
def test_an_edited_header_is_refused(path, key, value, message):
    rewrite(path, lambda header: header.update({key: value}))
    with pytest.raises(PlanError, match=message):
        Plan.load(path)


def test_a_file_that_is_deleted_while_it_is_opened_is_refused(path, monkeypatch):
    def opened(*_, **__):
        raise RuntimeError("unable to open file")  # torch's error

    monkeypatch.setattr("paroattn.plan_file.safe_open", opened)
    with pytest.raises(PlanError, match="unable to open file"):
        Plan.load(path)


def test_a_header_is_read_without_the_tensors(plan, path):
    header = read_header(path)
    assert header["model"] == vars(plan.model)
    assert header["provenance"] == plan.provenance
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PlanError, match="copy or make it anew"):
        read_header(path)


def test_other_files_are_refused(path, tmp_path):
    with pytest.raises(PlanError, match="does not exist; make one with `paroattn calibrate`"):
        Plan.load(tmp_path / "missing")
    save_file({"weight": torch.zeros(1)}, tmp_path / "weights")
    with pytest.raises(PlanError, match="some other safetensors file"):
        Plan.load(tmp_path / "weights")
    save_file({"weight": torch.zeros(1)}, tmp_path / "broken", metadata={"paroattn_plan": "{"})
    with pytest.raises(PlanError, match="header cannot be read"):
        Plan.load(tmp_path / "broken")
    rewrite(path, extra=torch.zeros(1))
    with pytest.raises(PlanError, match="tensors are"):
        Plan.load(path)


def test_inconsistent_parts_are_named(plan):
    cases = {
        "order_index ranges from 0 to 9": {"order_index": torch.tensor([[0, 9], [0, 0]], dtype=torch.uint8)},
        "precision_index ranges": {"precision_index": torch.full((2, 2), 1, dtype=torch.uint8)},
        "mask_index ranges from -1": {"mask_index": torch.full((2, 2, 2), -1, dtype=torch.int32)},
        "mask_index is torch.int64": {"mask_index": plan.mask_index.long()},
        r"compensate is torch.bool \[1, 2, 2\]": {"compensate": plan.compensate[:1]},
        r"usage is torch.float32 \[2\]": {"usage": plan.usage[:, 0]},
        r"usage holds numbers outside": {"usage": plan.usage * 2},
        r"no layer is ever called": {"usage": plan.usage * 0},
        r"mask_table is torch.uint8 \[8, 1, 1\]": {"mask_table": plan.mask_table[:, :1]},
        "keeps no block in row 1": {"mask_table": pack_bits(torch.tensor([[[1, 1], [0, 0]]]).bool().expand(8, 2, 2))},
        "bits beyond its 2 kv blocks": {"mask_table": plan.mask_table | 128},
        "bucket_edges are": {"bucket_edges": (0.0, 1.0)},
        "bucket_edges are .*0.1": {"bucket_edges": (0.1, 0.5)},
        "schedule is .*expected noise levels from 1 down to 0": {"schedule": (0.5, 1.0)},
        "the plan has 0 steps of the schedule": {"schedule": ()},
        "schedule is .*nan": {"schedule": (float("nan"),)},
        "a schedule of 2 steps each has to be one at which the noise level falls": {"schedule": (0.5, 0.5)},
        "token order 'ABC' is unknown": {"order_names": ("ABC",) * 6},
        "blocks are 32 x 64": {"block_q": 32},
        "touches text tokens": {"grid": replace(tiny.GRID, frames=5, text_tokens=20)},
    }
    for message, changes in cases.items():
        with pytest.raises(PlanError, match=message):
            replace(plan, **changes)


def test_a_bucket_begins_half_way_before_its_first_step(plan):
    thirds = replace(plan, schedule=(1.0, 0.8, 0.2), bucket_edges=(0.0, 1 / 3))
    assert thirds.bucket_levels == (0.9,)
    assert [thirds.bucket_of(level) for level in (1.0, 0.91, 0.9, 0.8, 0.5, 0.0)] == [0, 0, 1, 1, 1, 1]
    for steps in range(1, 101):
        edges = tuple(step / steps for step in range(steps))
        assert first_steps(edges, steps) == list(range(steps))


def test_steps_of_edges():
    for steps in range(1, 101):
        edges = tuple(step / steps for step in range(steps))
        assert [paroattn.plan.bucket_of(edges, step, steps) for step in range(steps)] == list(range(steps))


def test_density_weighs_buckets_by_their_length(plan):
    masks = plan.densities()
    assert masks.shape == (2, 2, 2)
    assert plan.density() == pytest.approx(float(0.25 * masks[0].mean() + 0.75 * masks[1].mean()))


def test_visual_density_leaves_text_blocks_out():
    pipe, grid = tiny.tiny_wan(), replace(tiny.GRID, text_tokens=50)  # blocks: visual, mixed, text
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 1]]).bool().expand(1, 2, 2, 3, 3)
    assert tiny.make_plan(pipe, mask, grid).density(visual_only=True) == 1


def test_a_layer_has_its_heads_orders_and_masks(plan):
    layer = plan.layer(1)
    names = [plan.order_names[index] for index in plan.order_index[1].tolist()]
    assert torch.equal(layer.permutation, torch.stack([token_order(name, tiny.GRID) for name in names]))
    masks = plan.mask_table[plan.mask_index[:, 1].long()]
    assert torch.equal(layer.mask_table[layer.mask_index.long()], masks)
    assert layer.mask_table is plan.layers()[0].mask_table  # layers share the plan's table
    assert [str(precision) for precision in layer.precisions] == ["int8/bf16"] * 2
