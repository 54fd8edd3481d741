"""The cache of plans: what is found again, what is deleted, and several processes at once."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import struct
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import cache_user
import pytest
import tiny
import torch
from click.testing import CliRunner
from plan_files import masks_of
from safetensors import SafetensorError, safe_open

from paroattn import InputError, Plan, Precision
from paroattn.cli.group import command_line
from paroattn.plan_cache import FOLDER_VARIABLE, CachedPlan, PlanCache, PlanWish
from paroattn.plan_file import read_header

WISH = PlanWish(0.3, Precision.parse("int8"))
NAME = r"WanTransformer3DModel-6x4x5-0\.3-int8-[0-9a-f]{12}"


def run(*arguments):
    return CliRunner().invoke(command_line, ["plans", *(str(argument) for argument in arguments)])


def wish(density):
    return dataclasses.replace(WISH, density=density)


def kept(cache):
    """Densities that were asked for of the plans that are there, most recently used first."""
    return [entry.density for entry in cache.entries()]


def set_used(path, seconds_ago):
    """Let a file be last used so long ago."""
    os.utime(path, (time.time() - seconds_ago,) * 2)


@pytest.fixture(scope="module")
def plan():
    made = tiny.make_plan(tiny.tiny_wan())
    return dataclasses.replace(made, provenance={"method": "paroattn", "prompts": ["é"]})


@pytest.fixture
def cache(tmp_path):
    return PlanCache(tmp_path / "new" / "cache")


def test_a_plan_is_found_again(cache, plan):
    assert cache.find(plan.model, plan.grid, WISH) is None
    assert not cache.folder.parent.exists()  # until a plan is put
    path = cache.put(plan, WISH)
    found = cache.find(plan.model, plan.grid, WISH)
    assert torch.equal(masks_of(found), masks_of(plan))
    assert found.provenance == {**plan.provenance, "wish": {"density": 0.3, "precision": "int8"}}
    assert list(cache.folder.iterdir()) == [path]
    assert Plan.load(path).model == plan.model


def test_the_key_is_what_the_plan_is_for(cache, plan):
    path = cache.put(plan, WISH)
    others = [(plan.model, plan.grid, wish(0.31)), (plan.model, plan.grid, PlanWish(0.3, Precision("int8", "bf16")))]
    for field in dataclasses.fields(plan.model):
        value = getattr(plan.model, field.name)
        changed = value + 1 if isinstance(value, int) else f"{value}x"
        others.append((dataclasses.replace(plan.model, **{field.name: changed}), plan.grid, WISH))
    for changes in ({"frames": 7}, {"height": 5}, {"width": 6}, {"text_tokens": 3}):
        others.append((plan.model, dataclasses.replace(plan.grid, **changes), WISH))
    for other in others:
        assert cache.find(*other) is None
    hashes = {name.split("-")[-1] for name in (path.name, *(name_of(cache, *other) for other in others))}
    assert len(hashes) == len(others) + 1
    assert cache.find(plan.model, plan.grid, PlanWish(0.3, Precision("int8", "int8"))) is not None


def name_of(cache, model, grid, wish):
    """The file that a plan for another model, grid or wish is put into."""
    return cache.put(tiny.make_plan(tiny.tiny_wan(model.layers, model.heads), grid=grid, **vars(model)), wish).name


def test_the_format_version_is_part_of_the_key(cache, plan, monkeypatch):
    cache.put(plan, WISH)
    monkeypatch.setattr("paroattn.plan_summary.FORMAT_VERSION", 99)
    assert cache.find(plan.model, plan.grid, WISH) is None
    assert len(cache.entries()) == 1  # it is not broken


def test_the_number_of_text_tokens_does_not_matter_but_their_place_does(cache):
    grid = dataclasses.replace(tiny.GRID, text_tokens=3, text_position="prefix")
    plan = tiny.make_plan(tiny.tiny_wan(), grid=grid)
    cache.put(plan, WISH)
    assert cache.find(plan.model, dataclasses.replace(grid, text_tokens=40), WISH).grid == grid
    assert cache.find(plan.model, dataclasses.replace(grid, text_position="suffix"), WISH) is None
    assert cache.find(plan.model, dataclasses.replace(grid, text_tokens=0), WISH) is None


def test_numbers_are_compared_by_value(cache, plan):
    cache.put(plan, PlanWish(1, WISH.precision))
    assert cache.find(plan.model, plan.grid, PlanWish(1.0, WISH.precision)) is not None


def test_names_of_files_are_plain(cache, plan):
    strange = dataclasses.replace(plan, model=dataclasses.replace(plan.model, class_name="../../a b/c"))
    path = cache.put(strange, PlanWish(0.25, Precision.parse("int8/bf16")))
    assert path.parent == cache.folder
    assert path.name.startswith("abc-6x4x5-0.25-int8-bf16-")
    assert cache.find(strange.model, strange.grid, PlanWish(0.25, Precision.parse("int8/bf16"))) is not None


def test_the_least_recently_used_plans_are_deleted(cache, plan):
    size = cache.put(plan, wish(0.1)).stat().st_size
    cache.limit_gb = 3.5 * size / 1e9
    for age, density in ((300, 0.1), (200, 0.2), (100, 0.3)):
        set_used(cache.put(plan, wish(density)), age)
    assert cache.find(plan.model, plan.grid, wish(0.1)) is not None  # used just now
    cache.put(plan, wish(0.4))
    assert sorted(kept(cache)) == [0.1, 0.3, 0.4]
    assert kept(cache)[-1] == 0.3


def test_the_plan_just_written_stays_whatever_the_limit(cache, plan):
    for sizes in (0, 1.5):
        earlier = cache.put(plan, wish(0.1))
        set_used(earlier, -1000)  # used in the future, by a clock that is wrong
        cache.limit_gb = sizes * earlier.stat().st_size / 1e9
        path = cache.put(plan, wish(0.2))
        assert list(cache.folder.iterdir()) == [path]


def test_a_limit_is_a_number(tmp_path):
    for limit in (-1, float("nan")):
        with pytest.raises(InputError, match="limit_gb is .*expected a number of at least 0"):
            PlanCache(tmp_path, limit)


def test_leftovers_are_cleaned_and_other_files_stay(cache, plan):
    cache.limit_gb = 0
    leftovers = [cache.folder / ".paroattn-old", cache.folder / ".paroattn-new"]
    others = [cache.folder / name for name in ("weights.safetensors", ".hidden", "notes.txt")]
    for folder in leftovers:
        folder.mkdir(parents=True)
        (folder / "half.safetensors").write_bytes(b"half")
    for path in others:
        path.write_text("of somebody else")
        set_used(path, 1e7)
    set_used(leftovers[0], 25 * 3600)
    path = cache.put(plan, WISH)
    assert sorted(cache.folder.iterdir()) == sorted([path, leftovers[1], *others])
    assert cache.clear() == [path.stem]
    assert sorted(cache.folder.iterdir()) == sorted([leftovers[1], *others])


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [truncate, flip, empty])
def test_a_broken_file_is_removed_with_a_warning(cache, plan, harm):
    path = cache.put(plan, WISH)
    harm(path)
    with pytest.warns(UserWarning, match="a cached plan cannot be used and is deleted: .*Wan") as caught:
        assert cache.find(plan.model, plan.grid, WISH) is None
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert caught[0].filename == __file__
    assert not path.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.find(plan.model, plan.grid, WISH) is None


@pytest.mark.parametrize("difference", ["model", "wish"])
def test_a_file_that_holds_another_plan_is_removed_with_a_warning(cache, plan, difference):
    path = cache.put(plan, WISH)
    model = dataclasses.replace(plan.model, config_hash="another")
    other = (dataclasses.replace(plan, model=model), WISH) if difference == "model" else (plan, wish(0.9))
    cache.put(*other).replace(path)
    with pytest.warns(UserWarning, match="holds a plan for another model, grid or wish"):
        assert cache.find(plan.model, plan.grid, WISH) is None
    assert not path.exists()


def test_files_that_vanish_are_no_error(cache, plan, monkeypatch):
    """Another process deletes them between listing and use."""
    warnings.simplefilter("error")
    gone, path = (cache.put(plan, wish(density)) for density in (0.1, 0.2))
    files = cache._files()
    gone.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(PlanCache, "_files", lambda self: files)
        assert [entry.path for entry in cache.entries()] == [path]
        with pytest.raises(InputError, match="does not exist"):
            cache.export(gone.name, cache.folder / "copy")
        assert list(cache.folder.iterdir()) == [path]
        assert sorted(cache.remove(gone.name, path.name)) == [gone.stem, path.stem]
        assert len(cache.clear()) == 2
    assert cache.entries() == []


def test_files_that_vanish_while_others_are_pruned_are_no_error(cache, plan, monkeypatch):
    for age, density in ((300, 0.1), (200, 0.2), (100, 0.3)):
        set_used(cache.put(plan, wish(density)), age)
    files = cache._files()
    files[0][0].unlink()
    monkeypatch.setattr(PlanCache, "_files", lambda self: files)
    cache.limit_gb = 0
    path = cache.put(plan, wish(0.4))
    assert list(cache.folder.iterdir()) == [path]


def test_files_that_vanish_while_they_are_listed_are_no_error(cache, plan, monkeypatch):
    class DeletingTheFirst:
        deleted = False

        def fullmatch(self, name):
            if not self.deleted:
                (cache.folder / name).unlink()
                self.deleted = True
            return True

    for density in (0.1, 0.2):
        cache.put(plan, wish(density))
    monkeypatch.setattr("paroattn.plan_cache._PLAN_FILE", DeletingTheFirst())
    assert len(cache.entries()) == 1


@pytest.mark.parametrize("replaced", [True, False])
def test_a_file_that_another_process_changes_is_read_again(cache, plan, monkeypatch, replaced):
    """It vanishes as it is opened, and may be there again when that is noticed."""
    warnings.simplefilter("error")

    def failing_once(read):
        turns = iter((True, False))

        def read_file(path):
            if not next(turns):
                return read(path)
            path.unlink()
            try:
                return read(path)
            finally:
                if replaced:
                    cache.put(plan, WISH)

        return read_file

    cache.put(plan, WISH)
    monkeypatch.setattr(Plan, "load", failing_once(Plan.load))
    assert (cache.find(plan.model, plan.grid, WISH) is not None) == replaced
    monkeypatch.undo()
    path = cache.put(plan, WISH)
    monkeypatch.setattr("paroattn.plan_cache.read_header", failing_once(read_header))
    assert [(entry.path, entry.note) for entry in cache.entries()] == ([(path, "")] if replaced else [])


def test_a_plan_that_vanishes_once_read_is_found(cache, plan, monkeypatch):
    path = cache.put(plan, WISH)
    load = Plan.load

    def load_and_delete(path):
        plan = load(path)
        path.unlink()
        return plan

    monkeypatch.setattr(Plan, "load", load_and_delete)
    assert cache.find(plan.model, plan.grid, WISH) is not None
    assert not path.exists()


def test_processes_share_a_folder(cache, plan, tmp_path):
    plan.save(tmp_path / "plan.safetensors")
    limit_gb = 2.5e-9 * (tmp_path / "plan.safetensors").stat().st_size
    context = multiprocessing.get_context("spawn")
    start, failures = context.Barrier(3), context.SimpleQueue()
    users = [(cache.folder, limit_gb, tmp_path / "plan.safetensors", WISH, i, start, failures) for i in range(3)]
    processes = [context.Process(target=cache_user.use, args=user) for user in users[1:]]
    for process in processes:
        process.start()
    cache_user.use(*users[0])
    for process in processes:
        process.join()
    assert failures.empty(), failures.get()
    assert [process.exitcode for process in processes] == [0, 0]
    assert all(path.suffix == ".safetensors" for path in cache.folder.iterdir())
    assert 1 <= len(cache.entries()) <= 4


def test_threads_share_a_cache(cache, plan):
    def turn(number):
        cache.put(plan, wish(number % 3 / 10))
        return cache.find(plan.model, plan.grid, wish(number % 3 / 10)), cache.entries()

    with warnings.catch_warnings(), ThreadPoolExecutor(8) as pool:
        warnings.simplefilter("error")
        found = list(pool.map(turn, range(60)))
    assert all(plan is not None and not any(entry.note for entry in entries) for plan, entries in found)
    assert sorted(kept(cache)) == [0.0, 0.1, 0.2]


def test_a_folder_that_cannot_be_written_is_one_line(plan, tmp_path):
    (tmp_path / "file").write_text("no folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        cache = PlanCache(folder)
        assert cache.find(plan.model, plan.grid, WISH) is None
        with pytest.raises(
            InputError, match=f"plan cache '{folder}' cannot be written .*set {FOLDER_VARIABLE}"
        ) as caught:
            cache.put(plan, WISH)
        assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "no folder"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_is_only_for_reading_gives_its_plans(cache, plan):
    cache.put(plan, WISH)
    cache.folder.chmod(0o500)
    try:
        assert cache.find(plan.model, plan.grid, WISH) is not None
        with pytest.raises(InputError, match="cannot be written"):
            cache.put(plan, WISH)
    finally:
        cache.folder.chmod(0o700)


def test_a_failing_write_keeps_the_old_plan(cache, plan, monkeypatch):
    path = cache.put(plan, WISH)
    before = path.read_bytes()

    def fill_the_disk(*_, **__):
        raise SafetensorError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fill_the_disk)
    with pytest.raises(InputError, match="disk full"):
        cache.put(plan, WISH)
    assert path.read_bytes() == before
    assert list(cache.folder.iterdir()) == [path]


def test_the_folder_is_the_users_or_that_of_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in (None, ""):
        monkeypatch.setenv(FOLDER_VARIABLE, value) if value is not None else monkeypatch.delenv(FOLDER_VARIABLE, False)
        folder = PlanCache().folder
        assert folder.parts[-1] == "plans"
        assert "paroattn" in folder.parts[:-1]
        assert folder.is_relative_to(tmp_path)
    monkeypatch.setenv(FOLDER_VARIABLE, "~/mine")
    assert PlanCache().folder == tmp_path / "mine"
    assert PlanCache(tmp_path / "given").folder == tmp_path / "given"
    assert list(tmp_path.iterdir()) == []


def test_entries_say_what_was_asked_for(cache, plan):
    path = cache.put(plan, PlanWish(0.25, Precision.parse("int8/bf16")))
    broken = cache.put(plan, wish(0.2))
    truncate(broken)
    foreign = cache.folder / "copied-0123456789ab.safetensors"
    plan.save(foreign)
    for age, file in enumerate((path, broken, foreign)):
        set_used(file, age * 60)
    first, second, third = cache.entries()
    assert first == CachedPlan(
        name=path.stem,
        path=path,
        bytes=path.stat().st_size,
        used=path.stat().st_mtime,
        model="WanTransformer3DModel",
        grid=tiny.GRID,
        density=0.25,
        precision=Precision("int8", "bf16"),
    )
    assert (second.name, second.bytes, second.grid) == (broken.stem, broken.stat().st_size, None)
    assert "may be truncated" in second.note
    assert "does not say what it is for: KeyError('wish')" in third.note


def test_entries_read_no_tensors(cache, plan, monkeypatch):
    class HeaderOnly:
        def __init__(self, path, framework):
            self.file = safe_open(path, framework)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def keys(self):
            return self.file.keys()

        def metadata(self):
            return self.file.metadata()

    cache.put(plan, WISH)
    monkeypatch.setattr("paroattn.plan_file.safe_open", HeaderOnly)
    assert cache.entries()[0].note == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"grid": [1, 2]},
        {"grid": {"frames": 0, "height": 1, "width": 1}},
        {"model": "name"},
        {"provenance": {"wish": {"density": "much", "precision": "int8"}}},
        {"provenance": {"wish": {"density": 0.3, "precision": "int3"}}},
        {"provenance": None},
        {"version": 7},
    ],
)
def test_a_header_that_is_wrong_is_a_note(cache, plan, changes):
    path = cache.put(plan, WISH)
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    entry = {**json.loads(header["__metadata__"]["paroattn_plan"]), **changes}
    header["__metadata__"]["paroattn_plan"] = json.dumps(entry)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    (found,) = cache.entries()
    assert found.note
    assert found.grid is None
    assert "\n" not in found.note
    assert run("list", "--folder", cache.folder).exit_code == 0


def test_plans_are_named_by_a_beginning_too(cache, plan):
    one, two = (cache.put(plan, wish(density)) for density in (0.3, 0.35))
    with pytest.raises(InputError, match=f"'Wan' begins several names in .*there are: {one.stem}, {two.stem}$"):
        cache.remove(two.stem, "Wan")
    for name in ("bogus", "", ".safetensors", "../x"):
        with pytest.raises(InputError, match=f"{name!r} is no plan in .*there are: {one.stem}, {two.stem}$"):
            cache.remove(name)
    assert len(cache.entries()) == 2
    assert cache.remove("WanTransformer3DModel-6x4x5-0.3-", one.name) == [one.stem, one.stem]
    assert cache.remove(two.stem) == [two.stem]
    with pytest.raises(InputError, match="there are: no plans"):
        cache.remove(two.stem)


def test_a_whole_name_wins_over_a_beginning(cache, plan):
    path = cache.put(plan, WISH)
    longer = path.with_name(f"{path.stem}-0123456789ab.safetensors")
    shutil.copy(path, longer)
    assert cache.remove(path.stem) == [path.stem]
    assert [entry.name for entry in cache.entries()] == [longer.stem]


def test_export_copies_whole_plans(cache, plan, tmp_path):
    path = cache.put(plan, WISH)
    target = tmp_path / "out" / "plan.safetensors"
    cache.export("Wan", target)
    assert target.read_bytes() == path.read_bytes()
    target.write_text("an older plan")
    cache.export(path.name, target)
    assert target.read_bytes() == path.read_bytes()
    assert list(target.parent.iterdir()) == [target]


def test_export_refuses_what_would_do_harm(cache, plan, tmp_path, monkeypatch):
    path = cache.put(plan, WISH)
    target = tmp_path / "plan.safetensors"
    target.write_text("an older plan")
    with pytest.raises(InputError, match="is also an input"):
        cache.export("Wan", path)
    with pytest.raises(InputError, match="is a directory"):
        cache.export("Wan", tmp_path)
    with pytest.raises(InputError, match="is no plan"):
        cache.export("bogus", target)
    with monkeypatch.context() as patch:
        patch.setattr("paroattn.plan_cache.shutil.copyfile", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            cache.export("Wan", target)
    truncate(path)
    with pytest.raises(InputError, match="may be truncated"):
        cache.export("Wan", target)
    assert target.read_text() == "an older plan"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["new", "plan.safetensors"]


def test_list_shows_the_plans(cache, plan):
    path = cache.put(plan, PlanWish(0.25, Precision.parse("int8/bf16")))
    broken = cache.put(dataclasses.replace(plan, model=dataclasses.replace(plan.model, class_name="Other")), WISH)
    truncate(broken)
    shown = run("list", "--folder", cache.folder)
    assert shown.exit_code == 0
    row = next(line for line in shown.output.splitlines() if path.stem in line)
    for text in ("WanTransformer3DModel", "6x4x5", "0.25", "int8/bf16", "0.0", time.strftime("%Y-")):
        assert text in row
    assert shown.output.splitlines()[-2].startswith(f"{broken.stem} is broken: '{broken}' is not a readable")
    assert shown.output.splitlines()[-1] == f"{cache.folder}: 2 plans, 0.0 MB"


def test_list_prints_json(cache, plan):
    path = cache.put(plan, WISH)
    found = json.loads(run("list", "--json", "--folder", cache.folder).output)
    assert (found["folder"], found["bytes"]) == (str(cache.folder), path.stat().st_size)
    (entry,) = found["plans"]
    assert entry == {
        "name": path.stem,
        "path": str(path),
        "bytes": path.stat().st_size,
        "used": path.stat().st_mtime,
        "model": "WanTransformer3DModel",
        "grid": tiny.GRID.as_json(),
        "density": 0.3,
        "precision": "int8",
        "note": "",
    }


def test_nothing_there_is_said(tmp_path):
    folder = tmp_path / "cache"
    assert run("list", "--folder", folder).output == f"no plans in {folder}\n"
    assert run("remove", "--all", "--folder", folder).output == f"no plans in {folder}\n"
    assert json.loads(run("list", "--json", "--folder", folder).output)["plans"] == []
    assert not folder.exists()


def test_remove_and_export_on_the_command_line(plan, tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "cache"))  # the user's
    cache = PlanCache()
    one, two, three = (cache.put(plan, wish(density)) for density in (0.1, 0.2, 0.3))
    result = run("export", one.stem, tmp_path / "copy")
    assert result.output == f"wrote {tmp_path / 'copy'}\n"
    assert Plan.load(tmp_path / "copy").grid == plan.grid
    assert run("remove", one.name, two.stem).output == f"removed {one.stem}\nremoved {two.stem}\n"
    assert kept(cache) == [0.3]
    assert run("remove", "--all").output == f"removed {three.stem}\n"
    assert kept(cache) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "--folder", "FILE"], "is a file"),
        (["remove"], "expected either names of plans or --all"),
        (["remove", "Wan", "--all"], "got both"),
        (["remove", "Wan"], "'Wan' begins several names in "),
        (["remove", "bogus"], "'bogus' is no plan in "),
        (["export", "Wan"], "Missing argument 'OUTPUT'"),
        (["export", "bogus", "x.safetensors"], "'bogus' is no plan in "),
        (["export", "WanTransformer3DModel-6x4x5-0.1", "."], "is a directory"),
        (["bogus"], "No such command"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(cache, plan, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "FILE").write_text("no folder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(FOLDER_VARIABLE, str(cache.folder))
    for density in (0.1, 0.2):
        cache.put(plan, wish(density))
    result = run(*arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: ")
    assert message in line
    assert sorted(kept(cache)) == [0.1, 0.2]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["FILE", "new"]


@pytest.mark.parametrize("command", ["list", "remove", "export"])
def test_every_command_shows_examples(command):
    assert f"paroattn plans {command}" in run(command, "--help").output.split("Examples:")[1]
