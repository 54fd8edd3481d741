"""Plan files and plans that are wrong on purpose, with a checksum that is right: each is a one-line `PlanError`."""

import pytest
import torch
from plan_files import forge, small_plan

from paroattn import Plan, PlanError, TokenGrid
from paroattn.plan import ModelIdentity

TENSORS = (
    "order_index", "precision_index", "mask_stacks", "mask_data", "mask_index", "compensate", "usage",
)  # fmt: skip


def refused(path):
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_the_forger_without_changes_writes_a_good_plan(tmp_path):
    forge(tmp_path / "plan")
    small_plan().save(tmp_path / "saved")
    assert (tmp_path / "plan").read_bytes() == (tmp_path / "saved").read_bytes()
    assert Plan.load(tmp_path / "plan").density() == small_plan().density()


@pytest.mark.parametrize(
    "key", ["model", "grid", "order_names", "precisions", "schedule", "bucket_edges", "block_q", "provenance"]
)
def test_a_header_without_one_of_its_keys(tmp_path, key):
    forge(tmp_path / "plan", lambda header, tensors: header.pop(key))
    assert key in refused(tmp_path / "plan")


HEADERS = {
    "grid": [{}, None, [2, 8, 8], {"frames": 0, "height": 8, "width": 8}, {"frames": 10**9, "height": 8, "width": 8}],
    "model": [
        {},
        [],
        None,
        {"class_name": "Model"},
        {"class_name": "M", "config_hash": "", "layers": "1", "heads": 2, "head_dim": 8},
    ],
    "order_names": [[], None, "FHW", [1, 2], ["FHW", "XYZ"]],
    "precisions": [[], ["int3"], None, [7]],
    "bucket_edges": [[0.5, 0.0], [0.0, 0.0], [0.0, 1.0], [0.1, 0.5], [0.0], None, ["0", "1"]],
    "schedule": [[], [1.0], [0.5, 1.0], [2.0, 1.0], [0.5, -0.5], [0.5, 0.5], None, ["1", "0"], "10", 1.0],
    "block_q": [32, 0, "64", None],
    "block_kv": [128],
    "version": [None, 2, "0", -1, True],
    "quality": [None, {"psnr": "high"}, {"psnr": float("nan")}],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in HEADERS.items() for value in values])
def test_wrong_header_values_with_a_right_checksum(tmp_path, key, value):
    forge(tmp_path / "plan", lambda header, tensors: header.update({key: value}))
    refused(tmp_path / "plan")


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("change", ["dtype", "shape", "empty", "scalar"])
def test_wrong_tensors_with_a_right_checksum(tmp_path, name, change):
    changes = {
        "dtype": lambda x: x.double(),
        "shape": lambda x: x.unsqueeze(0),
        "empty": lambda x: x[:0],
        "scalar": lambda x: x.flatten()[0].clone(),
    }
    forge(tmp_path / "plan", lambda header, tensors: tensors.update({name: changes[change](tensors[name])}))
    assert name in refused(tmp_path / "plan")


@pytest.mark.parametrize("header", ["[]", '"text"', "3", "null", "{}", "[" * 100_000, '{"version":' * 100_000])
def test_header_that_is_no_object(tmp_path, header):
    forge(tmp_path / "plan", lambda *_: header)
    refused(tmp_path / "plan")


def test_a_header_is_read_up_to_a_mebibyte(tmp_path):
    forge(tmp_path / "plan")
    content = (tmp_path / "plan").read_bytes()
    length = int.from_bytes(content[:8], "little")
    for new in (2**20, 2**20 + 8):
        padded = content[8 : 8 + length] + b" " * (new - length) + content[8 + length :]
        (tmp_path / "plan").write_bytes(new.to_bytes(8, "little") + padded)
        if new == 2**20:
            Plan.load(tmp_path / "plan")
    assert "has a header of 1,048,584 bytes; expected at most 1,048,576" in refused(tmp_path / "plan")


def test_every_truncation_and_every_flipped_byte(tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    small_plan().save(good)
    content = good.read_bytes()
    for length in range(0, len(content), 17):
        bad.write_bytes(content[:length])
        refused(bad)
    for position in range(len(content)):
        bad.write_bytes(content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :])
        refused(bad)


@pytest.mark.parametrize("folder", ["missing", "."])
def test_a_path_that_is_no_file(tmp_path, folder):
    refused(tmp_path / folder)


@pytest.mark.parametrize("edges", [(), (0.0, float("nan"))])
def test_bucket_edges_must_be_an_ascending_list(edges):
    buckets = len(edges)
    with pytest.raises(PlanError, match="bucket"):
        small_plan(
            bucket_edges=edges,
            mask_index=torch.zeros(buckets, 1, 2, dtype=torch.int32),
            compensate=torch.zeros(buckets, 1, 2, dtype=torch.bool),
        )


def test_a_model_without_layers():
    with pytest.raises(PlanError):
        small_plan(
            model=ModelIdentity("Model", "abc", 0, 2, 8),
            order_index=torch.zeros(0, 2, dtype=torch.uint8),
            precision_index=torch.zeros(0, 2, dtype=torch.uint8),
            mask_index=torch.zeros(2, 0, 2, dtype=torch.int32),
            compensate=torch.zeros(2, 0, 2, dtype=torch.bool),
        )


@pytest.mark.parametrize(
    "provenance", [{9: "a", 10: "b"}, {"share": float("nan")}, {"steps": (1, 2)}, {"prompt": "é\n"}]
)
def test_what_was_saved_can_be_loaded(tmp_path, provenance):
    small_plan(provenance=provenance).save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").provenance.keys() == {str(key) for key in provenance}


def test_provenance_that_json_cannot_hold_leaves_no_file(tmp_path):
    with pytest.raises((TypeError, ValueError)):
        small_plan(provenance={"model": object()}).save(tmp_path / "plan")
    assert list(tmp_path.iterdir()) == []


def test_visual_density_of_a_grid_whose_blocks_all_touch_text_is_a_number():
    plan = small_plan(
        grid=TokenGrid(2, 4, 4, 96),
        order_names=("FHW",) * 3,
        mask_table=torch.full((3, 2, 1), 3, dtype=torch.uint8),
    )
    assert plan.density() == 1
    assert 0 <= plan.density(visual_only=True) <= 1
