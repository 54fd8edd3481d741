"""The public file format: what docs/plan-format.md says of it, and that older files are read and newer keys kept."""

import importlib
import json
import os
import pickle
import pkgutil
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from plan_files import apart, forge, masks_of, small_plan
from test_budget import statistics as some_statistics

import paroattn
from paroattn import CostStatistics, Plan, PlanError, Precision, TokenGrid
from paroattn.block_mask import block_count, unpack_bits
from paroattn.calibration.checkpoint import Checkpoint
from paroattn.plan_cache import PlanCache, PlanWish
from paroattn.plan_file import HEADER_BYTES
from paroattn.plan_header import MOST

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "plan-format.md").read_text()
VERSION_0 = Path(__file__).parent / "data" / "plan_version_0.safetensors"


@pytest.fixture(scope="module")
def read_plan():
    """The reader of the page."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(code.splitlines()) <= 35
    assert {line.split()[1] for line in code.splitlines() if re.match(r"(import|from) ", line)} == {
        "hashlib",
        "json",
        "numpy",
        "safetensors",
        "zstandard",
    }
    names = {}
    exec(code, names)
    return names["read_plan"]


def many_masks(seed=0):
    """A plan of a tiny Wan with 20 step buckets, so that its heads need more than one stack."""
    blocks = block_count(tiny.GRID.tokens, 64)
    edges = tuple(bucket / 20 for bucket in range(20))
    masks = torch.rand(20, 2, 2, blocks, blocks, generator=torch.Generator().manual_seed(seed)) < 0.5
    schedule = tuple(1 - edge for edge in edges)
    return tiny.make_plan(tiny.tiny_wan(), masks | torch.eye(blocks, dtype=torch.bool), edges=edges, schedule=schedule)


def two_boxes():
    """A plan of three blocks, of which the last token of the second box and all of the third hold text."""
    return small_plan(
        grid=TokenGrid(1, 8, 8, 5, references=((2, 4, 8), (1, 1, 1))), order_names=("FHW", "WHF", "1x8x8")
    )


@pytest.mark.parametrize("make", [small_plan, many_masks, two_boxes])
def test_the_reader_of_the_page_reads_what_paroattn_writes(read_plan, make, tmp_path):
    plan = make()
    plan.save(tmp_path / "plan")
    header, tensors, masks = read_plan(tmp_path / "plan")
    assert TokenGrid(**header["grid"]) == plan.grid
    assert ("references" in header["grid"]) == bool(plan.grid.references)
    assert Plan.load(tmp_path / "plan").grid == plan.grid
    assert header["model"] == vars(plan.model)
    dense = unpack_bits(masks_of(plan), block_count(plan.grid.tokens, plan.block_kv)).numpy()
    assert np.array_equal(masks[tensors["mask_index"]], dense)
    for name in ("order_index", "precision_index", "compensate", "usage"):
        assert np.array_equal(tensors[name], getattr(plan, name).numpy())


def test_the_reader_of_the_page_sees_a_change(read_plan, tmp_path):
    forge(tmp_path / "plan")
    content = bytearray((tmp_path / "plan").read_bytes())
    content[content.index(b"seed")] ^= 1
    (tmp_path / "plan").write_bytes(content)
    with pytest.raises(ValueError, match="changed"):
        read_plan(tmp_path / "plan")


def test_the_page_names_every_key_and_tensor(tmp_path):
    replace(small_plan(), quality={"psnr": 31.2}).save(tmp_path / "plan")
    header, tensors = apart(tmp_path / "plan")
    head, body = PAGE.split("## Tensors")
    named = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", head, re.MULTILINE)))
    assert sorted(named) == sorted(header)
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \[(.*?)\]", body, re.MULTILINE)
    assert {name: (dtype, len(sizes.split(","))) for name, dtype, sizes in rows} == {
        name: (str(tensor.dtype).removeprefix("torch."), tensor.ndim) for name, tensor in tensors.items()
    }


def test_the_page_states_the_limits():
    for limit in {*MOST.values()} - {2**20}:
        assert f"{limit:,}" in PAGE
    assert MOST["tokens"] == HEADER_BYTES == 2**20  # "2^20 tokens", "1 MiB"


def test_equal_plans_are_equal_files_in_any_process(tmp_path):
    many_masks().save(tmp_path / "here")
    code = "import sys; from test_plan_format import many_masks; many_masks().save(sys.argv[1])"
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent),
        "PYTHONHASHSEED": "7",
        "OMP_NUM_THREADS": "2",
    }
    subprocess.run([sys.executable, "-c", code, tmp_path / "there"], env=environment, check=True)
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()
    many_masks(seed=1).save(tmp_path / "other")
    assert (tmp_path / "here").read_bytes() != (tmp_path / "other").read_bytes()


def test_files_do_not_depend_on_how_the_table_is_numbered(tmp_path):
    plan = small_plan()
    plan.save(tmp_path / "one")
    turned = replace(
        plan,
        mask_table=torch.cat((plan.mask_table[[2, 0]], plan.mask_table.flip(0))),  # the first two are not used
        mask_index=4 - plan.mask_index,
    )
    assert torch.equal(masks_of(turned), masks_of(plan))
    turned.save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert len(Plan.load(tmp_path / "two").mask_table) == 3


def test_version_0_is_read():
    assert apart(VERSION_0)[0]["version"] == 0
    plan = Plan.load(VERSION_0)
    assert plan.provenance == {"method": "by hand", "prompts": ["é"]}
    assert plan.schedule == (1.0, 0.5)
    assert plan.mask_index.tolist() == [[[0, 1]], [[1, 1]]]
    assert plan.mask_table.tolist() == [[[1], [2]], [[3], [3]]]
    assert plan.unknown == plan.quality == {}


def test_a_plan_of_version_0_is_saved_as_version_1(tmp_path):
    plan = Plan.load(VERSION_0)
    plan.save(tmp_path / "plan")
    again = Plan.load(tmp_path / "plan")
    assert apart(tmp_path / "plan")[0]["version"] == 1
    assert torch.equal(masks_of(again), masks_of(plan))
    assert again.density() == plan.density()


def test_a_changed_file_of_version_0_is_refused(tmp_path):
    content = bytearray(VERSION_0.read_bytes())
    content[-1] ^= 1
    (tmp_path / "plan").write_bytes(content)
    with pytest.raises(PlanError, match="does not match its checksum"):
        Plan.load(tmp_path / "plan")


def test_unknown_keys_are_kept_and_ignored(tmp_path):
    news = {"license": "CC0-1.0", "adapted_from": {"grid": [1, 2, 3]}}
    forge(tmp_path / "plan", lambda header, tensors: header.update(news))
    plan = Plan.load(tmp_path / "plan")
    assert plan.unknown == news
    assert torch.equal(masks_of(plan), masks_of(small_plan()))
    plan.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "plan").read_bytes()
    with pytest.raises(PlanError, match=r"unknown has the keys \['grid'\], which are known"):
        replace(plan, unknown={"grid": 1})


def test_a_newer_version_is_refused_whatever_it_holds(tmp_path):
    forge(tmp_path / "plan", lambda header, tensors: json.dumps({"version": 2, "all": "new"}))
    with pytest.raises(PlanError, match=r"^'.*plan': plan format version is 2; this paroattn reads up to 1\. Install"):
        Plan.load(tmp_path / "plan")


def test_quality_is_kept(tmp_path):
    replace(small_plan(), quality={"psnr": 31.25, "ssim": 1}).save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").quality == {"psnr": 31.25, "ssim": 1}


def test_a_provenance_too_large_for_a_header_leaves_no_file(tmp_path):
    with pytest.raises(PlanError, match=r"header takes 2,0\d\d,\d\d\d bytes; expected at most 1,048,576\. Shorten"):
        small_plan(provenance={"prompts": ['"' * 500_000]}).save(tmp_path / "plan")
    assert list(tmp_path.iterdir()) == []
    small_plan(provenance={"prompts": ["[{" * 200, "é" * 100_000]}).save(tmp_path / "plan")
    assert len(Plan.load(tmp_path / "plan").provenance["prompts"][0]) == 400


def test_what_is_too_large_to_be_loaded_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr("paroattn.plan_file.MASK_GIGABYTES", 8e-9)
    with pytest.raises(
        PlanError, match=r"its 3 masks of 3 x 1 bytes take 0\.0 GB; expected at most .* fewer step buckets"
    ):
        small_plan().save(tmp_path / "plan")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(PlanError, match="nested 65 deep; expected at most 64"):
        small_plan(provenance={"deep": json.loads("[" * 63 + "]" * 63)}).save(tmp_path / "plan")


def test_every_kind_of_file_is_saved_and_loaded_without_pickle(tmp_path, monkeypatch):
    for module in pkgutil.walk_packages(paroattn.__path__, "paroattn."):
        importlib.import_module(module.name)

    def refuse(*_, **__):
        raise AssertionError("pickled")

    for name in ("Pickler", "Unpickler", "dump", "dumps", "load", "loads"):
        monkeypatch.setattr(pickle, name, refuse)
    plan, statistics = small_plan(), some_statistics()
    plan.save(tmp_path / "plan")
    for path in (tmp_path / "plan", VERSION_0):
        Plan.load(path)
    plan.save_pretrained(tmp_path / "shared")
    Plan.from_pretrained(tmp_path / "shared")
    cache, wish = PlanCache(tmp_path / "cache"), PlanWish(0.5, Precision())
    cache.put(plan, wish)
    assert cache.find(plan.model, plan.grid, wish) is not None
    statistics.save(tmp_path / "statistics")
    CostStatistics.load(tmp_path / "statistics")
    checkpoint = Checkpoint(tmp_path / "work", "0")
    checkpoint.save("costs", {"costs": statistics.costs}, {"done": 1})
    assert checkpoint.load("costs") is not None
