"""Plans in folders and in repositories of a hub, which runs on this machine."""

import dataclasses
import json
import re
import socket
import sys
import warnings

import hub_server
import pytest
import torch
from huggingface_hub import ModelCard, constants
from PIL import Image
from plan_files import apart, forge, small_plan
from safetensors.torch import save_file

from paroattn import InputError, MissingPartError, Plan, PlanError, TokenGrid
from paroattn.plan_card import save_picture
from paroattn.plan_header import ModelIdentity

MODEL = ModelIdentity("WanTransformer3DModel", "abcdefghij", 1, 2, 8)
OTHER = dataclasses.replace(MODEL, layers=2)
GRID = TokenGrid(4, 8, 8)


def a_plan(grid=GRID, density=0.5, precision="int8", model=MODEL):
    return Plan.default(model, grid, density, precision)


def large_plan(seed):
    """Of some 300 kB, of which huggingface_hub reads the first 100 kB to get the header."""
    plan = a_plan(TokenGrid(16, 32, 32), model=dataclasses.replace(MODEL, heads=40))
    masks = torch.randint(1, 256, (40, 256, 32), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    index = torch.arange(40, dtype=torch.int32).view(1, 1, 40)
    return dataclasses.replace(plan, mask_table=masks, mask_index=index, provenance={"density": seed / 10})


def content_of(plan, folder):
    """The bytes of a plan's file."""
    plan.save(folder / "temporary")
    return (folder / "temporary").read_bytes()


def what(plan):
    return plan.grid.size, plan.provenance["density"], str(plan.precisions[0])


@pytest.fixture(autouse=True)
def _no_other_hub(monkeypatch, tmp_path):
    """No other machine is looked up, and nothing is read of the user's cache and login."""
    look_up = socket.getaddrinfo

    def look_up_this_machine(host, *arguments, **options):
        assert host in ("127.0.0.1", b"127.0.0.1"), f"{host} is asked for"
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up_this_machine)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the server speaks plain LFS
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "plans"
    made.mkdir()
    return made


@pytest.fixture
def hub():
    with hub_server.running() as server:
        yield server


WIDE, LONG = TokenGrid(4, 8, 16), TokenGrid(16, 8, 8)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"grid": WIDE, "density": 0.4}, (WIDE.size, 0.3, "int8")),  # size before density
        ({"grid": TokenGrid(4, 8, 9)}, (GRID.size, 0.3, "int8")),
        ({"grid": TokenGrid(4, 8, 12)}, (WIDE.size, 0.3, "int8")),  # by ratio: 12 is nearer to 16 than to 8
        ({"grid": TokenGrid(9, 8, 8)}, (LONG.size, 0.9, "exact")),
        ({"grid": TokenGrid(2, 8, 16)}, (WIDE.size, 0.3, "int8")),  # all sides together
        ({"grid": dataclasses.replace(GRID, text_tokens=7), "density": 1.0}, (GRID.size, 0.8, "int8")),
        ({"grid": GRID, "density": 0.48, "precision": "int8"}, (GRID.size, 0.3, "int8")),  # by ratio
        ({"grid": GRID, "density": 0.5, "precision": "int8"}, (GRID.size, 0.8, "int8")),
        ({"grid": GRID, "precision": "int8/fp8"}, (GRID.size, 0.4, "int8/fp8")),
        ({"density": 0.9}, (LONG.size, 0.9, "exact")),  # any size
        ({"precision": "exact"}, (LONG.size, 0.9, "exact")),
        ({}, (WIDE.size, 0.3, "int8")),  # 0.3, and the first by name: "4x8x16" before "4x8x8"
        ({"model": MODEL, "grid": GRID}, (GRID.size, 0.3, "int8")),
    ],
)
def test_the_nearest_plan_is_chosen(folder, asked, expected):
    for plan in (
        a_plan(density=0.3),
        a_plan(density=0.8),
        a_plan(density=0.4, precision="int8/fp8"),
        a_plan(WIDE, 0.3),
        a_plan(LONG, 0.9, "exact"),
    ):
        plan.save_pretrained(folder)
    assert what(Plan.from_pretrained(folder, **asked)) == expected


def test_ties_go_to_the_more_exact_plan_and_then_by_name(folder):
    for precision in ("int4", "int8/fp8", "int8", "bf16", "exact"):
        a_plan(precision=precision).save_pretrained(folder)
        assert str(Plan.from_pretrained(folder).precisions[0]) == precision
    a_plan(density=0.3).save(folder / "b.safetensors")
    assert what(Plan.from_pretrained(folder)) == (GRID.size, 0.3, "int8")
    dataclasses.replace(a_plan(density=0.3), provenance={"density": 0.3, "mine": True}).save(folder / "a.safetensors")
    assert "mine" in Plan.from_pretrained(folder).provenance


def test_a_plan_with_more_exact_heads_counts_as_what_was_asked_for(folder):
    plan = small_plan(precisions=tuple(a_plan(precision=name).precisions[0] for name in ("exact", "int4")))
    assert "-int4-" in plan.save_pretrained(folder).name
    assert Plan.from_pretrained(folder, precision="int4").precisions == plan.precisions
    with pytest.raises(PlanError, match="holds no plan of precision exact; it has plans of int4$"):
        Plan.from_pretrained(folder, precision="exact")


def test_any_plan_file_counts_and_no_other(folder):
    small_plan().save(folder / "paroattn_plan.safetensors")
    save_file({"weight": torch.ones(2)}, folder / "weights.safetensors")
    save_file({"weight": torch.ones(2)}, folder / "large.safetensors", metadata={"words": "x" * 2**20})
    (folder / "below").mkdir()
    a_plan().save(folder / "below" / "plan.safetensors")
    (folder / "notes.txt").write_text("plan")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Plan.from_pretrained(folder).grid == small_plan().grid
        a_plan(density=0.9, model=small_plan().model).save(folder / "sure.safetensors")
        assert what(Plan.from_pretrained(folder))[1] == 0.9  # the other does not say its density


def test_a_model_is_asked_for_where_there_are_several(folder):
    a_plan().save_pretrained(folder)
    a_plan(model=OTHER).save_pretrained(folder)
    assert Plan.from_pretrained(folder, model=OTHER).model == OTHER
    described = (
        r"WanTransformer3DModel \(1 layers of 2 heads, head_dim 8, config abcdefgh\); "
        r"WanTransformer3DModel \(2 layers of 2 heads, head_dim 8, config abcdefgh\)"
    )
    with pytest.raises(PlanError, match=f"holds plans for {described}: say which by model=paroattn.identify"):
        Plan.from_pretrained(folder)
    unknown = dataclasses.replace(MODEL, class_name="Unknown")
    with pytest.raises(PlanError, match=rf"holds no plan for Unknown \(.*it has plans for {described}$"):
        Plan.from_pretrained(folder, model=unknown)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"model": "Wan"}, "model is a str; expected what paroattn.identify"),
        ({"grid": (4, 8, 8)}, r"grid is \(4, 8, 8\); expected a TokenGrid"),
        ({"density": 30}, "density is 30"),
        ({"precision": "int3"}, "precision qk is 'int3'"),
    ],
)
def test_bad_arguments_are_one_line(folder, asked, message):
    with pytest.raises(InputError, match=message):
        Plan.from_pretrained(folder, **asked)


def test_a_folder_without_plans_says_so(folder):
    with pytest.raises(PlanError, match=f"^'{folder}' holds no plan$"):
        Plan.from_pretrained(folder)


def break_files(folder):
    """Plan files that cannot be read, by name, with what is said of them."""
    content = content_of(a_plan(), folder)
    (folder / "temporary").unlink()
    (folder / "cut.safetensors").write_bytes(content[:100])
    forge(folder / "newer.safetensors", lambda header, _: header.update(version=99))
    forge(folder / "wrong.safetensors", lambda header, _: header.update(grid=3))
    return {"cut": "not a readable safetensors", "newer": "Install a newer paroattn", "wrong": "grid is 3"}


def test_broken_files_are_named_and_left_out(folder):
    broken = break_files(folder)
    message = ".*".join(f"'{name}.safetensors': .*{problem}" for name, problem in broken.items())
    with pytest.raises(PlanError, match=f"holds no plan that can be read: {message}") as caught:
        Plan.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match=f"leaves out what cannot be read: {message}") as said:
        a_plan().save_pretrained(folder)
    assert said[0].filename == __file__
    with pytest.warns(UserWarning, match=f"cannot be read and are left out: {message}") as said:
        assert what(Plan.from_pretrained(folder)) == what(a_plan())
    assert said[0].filename == __file__


def test_a_chosen_file_that_was_changed_is_named(folder):
    path = a_plan().save_pretrained(folder)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(PlanError, match=f"'{path}': .*checksum"):
        Plan.from_pretrained(folder)
    path.write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert a_plan().save_pretrained(folder) == path  # in its place, so nothing is left out
    assert what(Plan.from_pretrained(folder)) == what(a_plan())


@pytest.mark.parametrize("relative", [True, False])
def test_links_lead_nowhere_out_of_a_folder(folder, relative):
    outside = folder.parent / "outside.safetensors"
    a_plan().save(outside)
    (folder / "link.safetensors").symlink_to("../outside.safetensors" if relative else outside)
    (folder / "endless.safetensors").symlink_to("endless.safetensors")
    with pytest.raises(PlanError, match=r"/link\.safetensors' is a link that leads out of the folder; copy the file"):
        Plan.from_pretrained(folder)
    (folder / "endless.safetensors").unlink()
    (folder / "link.safetensors").unlink()
    (folder / "below").mkdir()
    outside.rename(folder / "below" / "inside")
    (folder / "link.safetensors").symlink_to("below/inside")
    assert what(Plan.from_pretrained(folder)) == what(a_plan())


@pytest.mark.parametrize("name", ["../../a/b", "x" * 256, "\u3042" * 256, "."])
def test_any_class_can_be_part_of_a_name(folder, name):
    written = a_plan(model=dataclasses.replace(MODEL, class_name=name)).save_pretrained(folder)
    assert written.parent == folder
    assert Plan.from_pretrained(folder).model.class_name == name


def test_nothing_is_written_outside_a_folder(folder):
    """Neither by a name from a plan nor through a link that was there before."""
    plan = a_plan(model=dataclasses.replace(MODEL, class_name="../../a/b" + "x" * 200))
    written = plan.save_pretrained(folder)
    assert written.parent == folder
    assert written.name.startswith("abxxx")
    secret = folder.parent / "secret"
    secret.write_text("mine")
    for name in (written.name, written.with_suffix(".png").name, "README.md"):
        (folder / name).unlink()
        (folder / name).symlink_to(secret)
    with pytest.raises(PlanError, match=f"^'{folder / 'README.md'}' is a link that leads out of the folder"):
        plan.save_pretrained(folder)  # would have copied the secret into the card
    (folder / "README.md").unlink()
    assert plan.save_pretrained(folder) == written
    assert secret.read_text() == "mine"
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert sorted(path.name for path in folder.parent.iterdir()) == ["plans", "secret"]


def test_a_folder_gets_the_plan_its_picture_and_the_card(folder):
    first = a_plan().save_pretrained(folder / "new")
    content = {path.name: path.read_bytes() for path in first.parent.iterdir()}
    stem = first.name.removesuffix(".safetensors")
    assert stem.startswith("WanTransformer3DModel-4x8x8-0.5-int8-")
    assert sorted(content) == sorted([f"{stem}.safetensors", f"{stem}.png", "README.md"])
    assert Plan.from_pretrained(first.parent).save_pretrained(first.parent) == first
    assert {path.name: path.read_bytes() for path in first.parent.iterdir()} == content
    second = a_plan(density=0.8).save_pretrained(first.parent)
    card = (first.parent / "README.md").read_text()
    for path in (first, second):
        assert f"]({path.name})" in card
        assert f"![densities]({path.with_suffix('').name}.png)" in card


def test_the_density_is_noted_where_the_plan_does_not_say_it(folder):
    for density in (None, True, "0.3", 0, 1.5, float("nan")):
        path = small_plan(provenance={"density": density}).save_pretrained(folder)
        assert path.name.startswith("Model-2x8x8-0.8611-int8-")
        assert Plan.load(path).provenance["density"] == 0.8611 == round(small_plan().density(), 4)


def card_row(card):
    return [cell.strip() for cell in card.split("|---|\n")[1].splitlines()[0].strip("|").split(" | ")]


def test_the_card_lists_what_headers_say(folder):
    plan = small_plan(quality={"psnr": 31.25, "ssim": 0.9}, precision_index=torch.ones(1, 2, dtype=torch.uint8))
    plan.save_pretrained(folder, base_model="owner/model", license="apache-2.0")
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {
        "base_model": "owner/model",
        "library_name": "paroattn",
        "license": "apache-2.0",
        "tags": ["paroattn", "sparse-attention"],
    }
    name, *cells = card_row(card.text)
    assert name.startswith("[Model-2x8x8-0&#46;8611-int8-")
    assert cells == ["Model", "1 x 2", "2 x 8 x 8", "0.861", "int8", "psnr 31.25, ssim 0.9", "1", "2"]
    example = card.text.split("```python\n")[1].split("```")[0]
    compile(example, "card", "exec")
    assert "Plan.from_pretrained(" in example


def test_what_a_card_says_beside_the_plans_stays(folder):
    (folder / "README.md").write_bytes(
        b"---\r\nlicense: mit\r\ntags: [mine]\r\nfoo: bar\r\n---\r\n# Mine\r\n\\1 text\r\n"
    )
    a_plan().save_pretrained(folder)
    (folder / "README.md").write_bytes((folder / "README.md").read_bytes() + b"\nafter\n")
    a_plan(density=0.8).save_pretrained(folder)
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {"license": "mit", "tags": ["mine", "paroattn", "sparse-attention"], "foo": "bar"}
    assert card.text.startswith("# Mine\r\n\\1 text\n\n<!-- paroattn plans")
    assert card.text.endswith("<!-- end of paroattn plans -->\n\nafter\n")
    assert card.text.count("<!--") == 2
    assert card.text.count("![densities]") == 2


@pytest.mark.parametrize("card", [b"---\na: [\n---\n", b"---\n- a\n---\n", b"---\n1: 2\n---\n", b"\xff"])
def test_a_card_that_cannot_be_read_is_one_line_and_stays(folder, card):
    (folder / "README.md").write_bytes(card)
    with pytest.raises(
        InputError, match=r"README\.md, begins with metadata that cannot be read \(.*\); correct it$"
    ) as caught:
        a_plan().save_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert (folder / "README.md").read_bytes() == card
    assert len(list(folder.iterdir())) == 1


def test_what_strangers_write_is_no_markup(folder):
    harm = "a|b](http://x) <img src=x> `c` **d** _e_ --> \n# f \u202e \ud800 &amp; www.g.h"
    name = "x](y) <b>|.safetensors"

    def change(header, tensors):
        header["model"]["class_name"] = harm.replace("\n", "").replace("\u202e", "").replace("\ud800", "")
        header["quality"] = {harm: 1.0, "z" * 1000: 2.0}

    forge(folder / name, change)
    a_plan().save_pretrained(folder)
    card = (folder / "README.md").read_text()
    row = next(line for line in card.splitlines() if "img" in line)
    cells = row.strip("| ").split(" | ")
    assert len(cells) == 9
    assert cells[0] == "[x&#93;&#40;y&#41; &#60;b&#62;&#124;&#46;safetensors](x%5D%28y%29%20%3Cb%3E%7C.safetensors)"
    for cell in (cells[1], cells[5]):
        assert not set(cell) & set("<>[]()`*_|\\\n\u202e")
    assert not {"&#8238;", "&#10;"} & set(re.findall("&#[0-9]+;", card))  # these would be rendered
    assert "z" * 101 not in card
    assert card.count("![densities]") == 1  # the forged plan has no picture
    assert card.count("-->") == 2
    assert card.count("\n# ") == 1


def test_the_picture_has_a_colour_for_each_head(tmp_path):
    densities = torch.tensor([[0.0, 0.25, 0.5], [0.75, 1.0, 0.125]], dtype=torch.float64)
    save_picture(tmp_path / "p.png", densities)
    with Image.open(tmp_path / "p.png") as picture:
        at = [
            [picture.getpixel((40 + 24 * head + 12, 40 + 24 * layer + 12)) for head in range(3)] for layer in range(2)
        ]
        assert at[0] == [(68, 1, 84), (59, 82, 139), (33, 145, 140)]
        assert at[1] == [(94, 201, 98), (253, 231, 37), (64, 42, 112)]
    save_picture(tmp_path / "large.png", torch.rand(1024, 1024))
    with Image.open(tmp_path / "large.png") as picture:
        assert max(picture.size) < 1300


def test_missing_parts_are_named(folder, monkeypatch):
    a_plan().save(folder / "a.safetensors")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "huggingface_hub" else True)
    assert what(Plan.from_pretrained(folder)) == what(a_plan())
    line = r"huggingface_hub is not installed; run: pip install 'paroattn\[diffusers\]'"
    for share in (
        lambda: Plan.from_pretrained("owner/name"),
        lambda: a_plan().push_to_hub("owner/name"),
        lambda: a_plan().save_pretrained(folder),
    ):
        with pytest.raises(MissingPartError, match=line):
            share()
    assert len(list(folder.iterdir())) == 1


def test_only_headers_and_the_chosen_file_are_downloaded(hub, tmp_path):
    contents = {f"p{seed}__safetensors": content_of(large_plan(seed), tmp_path) for seed in range(1, 7)}
    size = len(contents["p4__safetensors"])
    assert size > 250_000
    hub.add("owner/name", **contents, README__md=b"# Mine", weights__bin=b"0" * 1000)
    plan = Plan.from_pretrained("owner/name", density=0.4, endpoint=hub.endpoint)
    assert plan.provenance == {"density": 0.4}
    served = {}
    for _, path, count in hub.log:
        served[path.split("/")[-1]] = served.get(path.split("/")[-1], 0) + count
    assert served.pop("name") < 1000
    assert served.pop("p4.safetensors") == 100_001 + size
    assert served == {f"p{seed}.safetensors": 100_001 for seed in (1, 2, 3, 5, 6)}
    hub.log.clear()
    with pytest.raises(PlanError, match="'owner/name' holds no plan of precision int4; it has plans of int8"):
        Plan.from_pretrained("owner/name", precision="int4", endpoint=hub.endpoint)
    assert sum(count for *_, count in hub.log) < 700_000


def test_a_revision_is_kept_to(hub, tmp_path):
    """In the list of files, the headers and the file itself."""
    sparse, dense = (content_of(a_plan(density=density), tmp_path) for density in (0.3, 0.8))
    hub.add("owner/name", b__safetensors=sparse, c__safetensors=dense)
    hub.add("owner/name", a__safetensors=sparse, b__safetensors=dense, c__safetensors=dense)
    first = hub_server.sha("owner/name", 1)
    assert what(Plan.from_pretrained("owner/name", endpoint=hub.endpoint, revision=first))[1] == 0.3
    assert {path.split("/")[-1] for _, path, _ in hub.log} == {first, "b.safetensors", "c.safetensors"}
    hub.add("owner/name", b__safetensors=dense, c__safetensors=sparse)
    assert what(Plan.from_pretrained("owner/name", endpoint=hub.endpoint, revision=first, density=0.9))[1] == 0.8


def test_what_was_downloaded_is_found_offline(hub, tmp_path, monkeypatch):
    """Through the links of huggingface_hub's cache."""
    for density in (0.3, 0.8):
        hub.add("owner/name", **{f"p{density * 10:.0f}__safetensors": content_of(a_plan(density=density), tmp_path)})
    cache = {"cache_dir": tmp_path / "cache", "endpoint": hub.endpoint}
    with pytest.raises(PlanError, match="'owner/name' was not downloaded before, and cannot be downloaded now"):
        Plan.from_pretrained("owner/name", local_files_only=True, **cache)
    assert what(Plan.from_pretrained("owner/name", density=0.9, **cache))[1] == 0.8
    hub.log.clear()
    assert what(Plan.from_pretrained("owner/name", local_files_only=True, **cache))[1] == 0.8
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert what(Plan.from_pretrained("owner/name", **cache))[1] == 0.8
    assert hub.log == []


def test_files_whose_names_lead_elsewhere_are_not_asked_for(hub, tmp_path):
    content = content_of(a_plan(density=0.3), tmp_path)
    names = ("../up", "/root", "below/x", "..\\up", "C:x", "new\nline")
    hub.add("owner/name", good__safetensors=content_of(a_plan(density=0.8), tmp_path))
    hub.repos["owner/name"][-1].update({f"{name}.safetensors": content for name in names})
    assert what(Plan.from_pretrained("owner/name", endpoint=hub.endpoint))[1] == 0.8
    assert {path for _, path, _ in hub.log} == {"/api/models/owner/name", "/owner/name/resolve/main/good.safetensors"}


def test_broken_files_in_a_repository_are_named_and_left_out(hub, folder):
    broken = break_files(folder)
    broken.update(dict.fromkeys(("deep", "digits", "list", "odd", "short"), "not a readable safetensors"))
    contents = {path.stem: path.read_bytes() for path in folder.iterdir()}
    for name, text in (
        ("list", "[]"),
        ("deep", "[" * 100_000),
        ("odd", '{"a": 3}'),
        ("digits", "9" * 10_000),
        ("text", json.dumps({"__metadata__": {"paroattn_plan": 3}})),
    ):
        contents[name] = len(text).to_bytes(8, "little") + text.encode()
    contents["short"] = b"1234"
    contents["other"] = (2).to_bytes(8, "little") + b"{}"
    hub.add("owner/name", **{f"{name}__safetensors": content for name, content in contents.items()})
    message = ".*".join(f"'{name}.safetensors': .*{broken[name]}" for name in sorted(broken))
    with pytest.raises(PlanError, match=f"'owner/name' holds no plan that can be read: {message}") as caught:
        Plan.from_pretrained("owner/name", endpoint=hub.endpoint)
    assert "\n" not in str(caught.value)
    assert "other" not in str(caught.value)
    assert "text" not in str(caught.value)


@pytest.mark.parametrize(
    ("repo", "arguments", "message"),
    [
        ("owner/gated", {}, "'owner/gated' asks for consent: give it on the repository's page, and log in"),
        ("owner/none", {}, "'owner/none' is not there, or private: check its name, log in"),
        ("owner/name", {"revision": "none"}, "'owner/name' has no revision 'none'; give a branch, a tag or a commit"),
        ("./no/folder", {}, "'./no/folder' is no folder, and no name of a repository, such as owner/name"),
        ("owner/name", {"endpoint": "http://127.0.0.1:9"}, "'owner/name' cannot be used; check the network, .*refused"),
    ],
)
def test_what_the_hub_answers_is_one_line(hub, repo, arguments, message, monkeypatch, tmp_path):
    hub.add("owner/name", a__safetensors=content_of(a_plan(), tmp_path))
    with pytest.raises(PlanError, match=message) as caught:
        Plan.from_pretrained(repo, **{"endpoint": hub.endpoint, **arguments})
    assert "\n" not in str(caught.value)


def push(plan, hub, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return plan.push_to_hub("owner/name", token="secret", endpoint=hub.endpoint, **arguments)


@pytest.mark.parametrize("lfs", [False, True])
def test_pushing_makes_a_repository_and_adds_plans_to_it(hub, tmp_path, lfs):
    hub.lfs = lfs
    url = push(a_plan(), hub, private=True, license="mit")
    assert hub.private == {"owner/name": True}
    assert len(hub.repos["owner/name"]) == 3  # empty, made, and one commit
    assert url == f"{hub.endpoint}/owner/name/commit/{hub_server.sha('owner/name', 2)}"
    plan, picture, card = (
        next(name for name in hub.files("owner/name") if name.endswith(end)) for end in ("tensors", "png", "md")
    )
    assert len(hub.files("owner/name")) == 4
    hub.log.clear()
    push(large_plan(3), hub, commit_message="Another")
    files = hub.files("owner/name")
    assert len(hub.repos["owner/name"]) == 4
    assert len(files) == 6
    assert sum("resolve" in path and "safetensors" in path for _, path, _ in hub.log) == 1  # the header
    (tmp_path / "README.md").write_bytes(files[card])
    shown = ModelCard.load(tmp_path / "README.md")
    assert shown.data.license == "mit"
    assert f"]({plan})" in shown.text
    assert f"]({picture})" in shown.text
    assert shown.text.count("\n| [") == 2
    assert 'Plan.from_pretrained("owner/name", ' in shown.text
    assert what(Plan.from_pretrained("owner/name", model=MODEL, endpoint=hub.endpoint)) == what(a_plan())
    assert not (tmp_path / "hub-cache" / "models--owner--name" / "README.md").exists()


def test_pushing_keeps_the_card_of_a_repository(hub):
    hub.add("owner/name", README__md=b"---\nlicense: mit\n---\n# Mine\n", model__safetensors=b"1234")
    with pytest.warns(UserWarning, match=r"'owner/name' leaves out what cannot be read: 'model\.safetensors'") as said:
        a_plan().push_to_hub("owner/name", endpoint=hub.endpoint)
    assert said[0].filename == __file__
    card = hub.files("owner/name")["README.md"].decode()
    assert card.startswith("---\nlicense: mit\ntags:\n- paroattn\n- sparse-attention\n---\n# Mine\n\n<!-- paroattn")


def test_a_push_that_another_one_overtakes_is_refused(hub):
    push(a_plan(), hub)
    hub.before_commit = lambda: hub.add("owner/name", other__txt=b"")
    with pytest.raises(PlanError, match="'owner/name' was changed meanwhile; push again") as caught:
        push(a_plan(density=0.8), hub)
    assert "\n" not in str(caught.value)
    assert len(hub.files("owner/name")) == 5


def test_pushing_what_cannot_be_written_leaves_the_repository(hub):
    push(a_plan(), hub)
    before = hub.files("owner/name")
    with pytest.raises(PlanError, match="has no revision 'none'"):
        push(a_plan(), hub, revision="none")
    hub.lfs, hub.refuse_uploads = True, True
    with pytest.raises(
        PlanError, match="cannot be used; check the network, .* allows: Error while uploading"
    ) as caught:
        push(a_plan(density=0.8), hub)
    assert "\n" not in str(caught.value)
    assert hub.files("owner/name") == before


def test_the_files_of_a_plan_are_the_same_in_a_folder_and_a_repository(hub, folder):
    push(a_plan(), hub)
    path = a_plan().save_pretrained(folder)
    files = hub.files("owner/name")
    assert files[path.name] == path.read_bytes()
    assert files[path.with_suffix("").name + ".png"] == (folder / f"{path.stem}.png").read_bytes()
    assert apart(path)[0]["provenance"]["density"] == 0.5
