"""Plan files with arbitrary changes and a right checksum are refused in one line, or are plans that run rightly."""

import json
import struct

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_files import apart, masks_of, small_plan, together

import paroattn
from paroattn import Plan, PlanError
from paroattn.block_mask import block_count, unpack_bits
from paroattn.ops import cpu

STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["\ud800", "é" * 300, "1x8x8", "int8/fp8", "prefix", 64, 128, 0.5, 2**20, 10**400]),
    st.lists(st.one_of(st.integers(-1, 300), st.floats(-1, 2), st.text(max_size=3)), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(-1, 5), max_size=3),
)
SETTINGS = settings(max_examples=150)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The path of a plan's file, and a path for changed ones."""
    folder = tmp_path_factory.mktemp("fuzz")
    small_plan().save(folder / "good")
    return folder / "good", folder / "changed"


def loaded_or_refused(path):
    """The plan of a file, if it is one; otherwise the refusal is checked."""
    try:
        plan = Plan.load(path)
    except PlanError as error:
        message = str(error)
        assert message.startswith(repr(str(path)))
        assert len(message.splitlines()) == 1
        assert len(message) < 1000
        return None
    runs_rightly(plan)
    return plan


def runs_rightly(plan):
    """Each layer and bucket of a small plan computes the same on the CPU backend as on the reference."""
    if plan.grid.tokens > 400 or plan.model.layers * plan.model.heads * plan.buckets > 32:
        return  # too large to be run here; it was validated all the same
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, plan.model.heads, plan.grid.tokens, 16, generator=generator) for _ in range(3))
    names = ["reference"] if cpu.unavailable() else ["reference", "cpu"]
    for number, layer in enumerate(plan.layers()):
        for bucket in range(plan.buckets):
            arguments = {"device": "cpu", "dtype": torch.float32}
            outputs = [
                paroattn.prepare(layer, backend=name, **arguments)(query, key, value, bucket=torch.tensor(bucket))
                for name in names
            ]
            assert all(torch.isfinite(output).all() for output in outputs)
            assert torch.allclose(outputs[0], outputs[-1], atol=0.05, rtol=0.05), (number, bucket)


@SETTINGS
@given(data=st.data())
def test_bytes(good, data):
    """Anywhere in the file, safetensors' own header included; mostly the checksum does not match."""
    path, changed = good
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["set", "cut", "insert", "repeat"])):
            case "set":
                content[position] = data.draw(st.integers(0, 255))
            case "cut":
                del content[position : position + data.draw(st.integers(1, 200))]
            case "insert":
                content[position:position] = data.draw(st.binary(min_size=1, max_size=20))
            case "repeat":
                content[position:position] = content[position : position + data.draw(st.integers(1, 200))]
        if not content:
            break
    changed.write_bytes(content)
    loaded_or_refused(changed)


@SETTINGS
@given(data=st.data())
def test_list_of_tensors(good, data):
    """Of safetensors' own header: dtypes, shapes and places that are others."""
    path, changed = good
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    listed = json.loads(content[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(set(listed) - {"__metadata__"})))
    key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    values = {
        "dtype": st.sampled_from(["U8", "I8", "BOOL", "F8_E4M3", "F4", "BF16", "I64", "U64", "F64", "C64", "X"]),
        "shape": st.lists(st.integers(0, 2**63), max_size=4),
        "data_offsets": st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 600), min_size=2, max_size=2),
    }
    listed[name][key] = data.draw(values[key] | STRANGE)
    text = json.dumps(listed).encode(errors="replace")
    changed.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    loaded_or_refused(changed)


@SETTINGS
@given(data=st.data())
def test_header(good, data):
    path, changed = good
    header, tensors = apart(path)
    for _ in range(data.draw(st.integers(1, 2))):
        place = header
        key = data.draw(st.sampled_from([*sorted(header), "new"]))
        while isinstance(place.get(key), dict) and place[key] and data.draw(st.booleans()):
            place = place[key]
            key = data.draw(st.sampled_from(sorted(place)))
        if data.draw(st.booleans()):
            place[key] = data.draw(STRANGE)
        elif isinstance(place.get(key), list) and place[key]:
            place[key][data.draw(st.integers(0, len(place[key]) - 1))] = data.draw(STRANGE)
        else:
            place.pop(key, None)
    together(changed, header, tensors)
    loaded_or_refused(changed)


@SETTINGS
@given(data=st.data())
def test_tensors(good, data):
    path, changed = good
    header, tensors = apart(path)
    name = data.draw(st.sampled_from(sorted(tensors)))
    flat = tensors[name].flatten().clone()
    position = data.draw(st.integers(0, len(flat) - 1))
    match flat.dtype:
        case torch.float32:
            flat[position] = data.draw(st.floats(width=32))
        case torch.bool:
            flat[position] = data.draw(st.booleans())
        case dtype:
            limits = torch.iinfo(dtype)
            near = st.integers(max(limits.min, -3), min(limits.max, 300))
            flat[position] = data.draw(near | st.integers(limits.min, limits.max))
    tensors[name] = flat.view(tensors[name].shape)
    together(changed, header, tensors)
    loaded_or_refused(changed)


@SETTINGS
@given(data=st.data())
def test_frames(good, data):
    """What was compressed is changed and compressed again; the plan that comes of it has what the frame says."""
    path, changed = good
    header, tensors = apart(path)
    stacks, frames, start = tensors["mask_stacks"], [], 0
    for length in stacks[:, 3].tolist():
        frames.append(bytearray(zstandard.decompress(bytes(tensors["mask_data"][start : start + length].tolist()))))
        start += length
    number = data.draw(st.integers(0, len(frames) - 1))
    for _ in range(data.draw(st.integers(1, 6))):
        position = data.draw(st.integers(0, len(frames[number]) - 1))
        frames[number][position] = data.draw(st.integers(0, 8) | st.integers(0, 255))
    if data.draw(st.integers(0, 3)) == 0:
        frames[number] += bytes(data.draw(st.integers(1, 70)))
    packed = [zstandard.compress(bytes(frame)) for frame in frames]
    tensors["mask_data"] = torch.tensor(list(b"".join(packed)), dtype=torch.uint8)
    stacks[:, 3] = torch.tensor([len(frame) for frame in packed])
    together(changed, header, tensors)
    plan = loaded_or_refused(changed)
    if plan is not None:
        dense = unpack_bits(masks_of(plan), block_count(plan.grid.tokens, 64))
        assert dense.any(-1).all()
        assert dense[..., -1].all()  # the text's column
        assert dense[..., -1, :].all()


@pytest.mark.skipif(bool(cpu.unavailable()), reason="there is one backend only")
def test_the_check_of_running_sees_another_mask(monkeypatch):
    """`runs_rightly` is no check that passes whatever the backends do."""
    plan = small_plan()
    runs_rightly(plan)
    whole = small_plan(mask_table=torch.full_like(plan.mask_table, 7)).layer(0)
    original = paroattn.prepare

    def prepare(layer, *, backend, **arguments):
        return original(whole if backend == "cpu" else layer, backend=backend, **arguments)

    monkeypatch.setattr(paroattn, "prepare", prepare)
    with pytest.raises(AssertionError):
        runs_rightly(plan)
