"""Write tests/data/bad_plans: a plan file for each defect, and the message that it has to be refused with.

python tests/make_bad_plans.py
"""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import numpy as np
import torch
import zstandard
from plan_files import HEADER_KEY, forge

FOLDER = Path(__file__).parent / "data" / "bad_plans"


def header(**values):
    """A file whose header has other values; those named model__heads are within an object, None is left out."""

    def change(header, tensors):
        for name, value in values.items():
            *outer, key = name.split("__")
            place = header[outer[0]] if outer else header
            if value is None:
                del place[key]
            else:
                place[key] = value

    return change


def text(change):
    """A file whose header is another text, made of the right one."""
    return lambda header, tensors: change(json.dumps(header, sort_keys=True))


def tensor(**changes):
    """A file in which some tensors are others, made of the right ones; or are missing."""

    def change(header, tensors):
        for name, make in changes.items():
            tensors[name] = make(tensors.get(name))
            if tensors[name] is None:
                del tensors[name]

    return change


def put(place, value):
    """A tensor with another value in one place."""

    def change(tensor):
        changed = tensor.clone()
        changed[place] = value
        return changed

    return change


def frame(change, repack=zstandard.compress):
    """A file whose first stack holds other bytes: 8 of four patterns, then 3 rows of 8 pixels."""

    def changed(header, tensors):
        length = int(tensors["mask_stacks"][0, 3])
        data = bytes(tensors["mask_data"].tolist())
        first = repack(change(zstandard.decompress(data[:length])))
        tensors["mask_data"] = torch.tensor(list(first + data[length:]), dtype=torch.uint8)
        tensors["mask_stacks"][0, 3] = len(first)

    return changed


def pixels(row, columns, pattern):
    """A file in whose first stack some blocks of a row have another pattern."""

    def changed(header, tensors):
        def change(content):
            image = np.frombuffer(content, np.uint8, offset=len(content) - 24).copy()
            turned = bool(tensors["mask_stacks"][0, 2])
            (image.reshape(8, 3).T if turned else image.reshape(3, 8))[row, columns] = pattern
            return content[:-24] + image.tobytes()

        frame(change)(header, tensors)

    return changed


def packed(**arguments):
    return lambda content: zstandard.ZstdCompressor(**arguments).compress(content)


def content(change):
    """A file whose bytes are others, made of the right ones."""
    return {"bytes": change}


def fuzzed(seed):
    """What a fuzzer that changed up to 4 bytes of the list of tensors has found; the checksum does not cover it."""

    def change(content):
        choice = random.Random(seed)
        length = struct.unpack("<Q", content[:8])[0]
        start = content.index(b'"compensate"')
        changed = bytearray(content)
        for _ in range(choice.randint(1, 4)):
            changed[choice.randrange(start, 8 + length)] = choice.choice(b'0123456789,:[]{}"UIFBe')
        return bytes(changed)

    return content(change)


def listed(change):
    """A file whose list of tensors is another."""

    def changed(content):
        length = struct.unpack("<Q", content[:8])[0]
        entries = json.loads(content[8 : 8 + length])
        change(entries)
        new = json.dumps(entries).encode()
        return struct.pack("<Q", len(new)) + new + content[8 + length :]

    return content(changed)


def a_bomb(header, tensors):
    """A million masks of 32 MB each."""
    header["grid"].update(frames=1024, height=32, width=31)
    tensors["mask_index"] = torch.tensor([[[0, 1]], [[2, 999_999]]], dtype=torch.int32)


def a_bomb_of_empty_masks(header, tensors):
    """A thousand masks of 2 MB, all of them zeros."""
    header["grid"].update(frames=64, height=64, width=64, text_tokens=0)
    zeros = zstandard.compress(bytes(2) + bytes(4096 * 4096))
    tensors["mask_index"] = torch.tensor([[[0, 1]], [[2, 999]]], dtype=torch.int32)
    tensors["mask_stacks"] = torch.tensor([[10, 1, 0, len(zeros)]] * 100)
    tensors["mask_data"] = torch.tensor(list(zeros * 100), dtype=torch.uint8)


def a_large_window(header, tensors):
    """A good mask of 16 MB of pixels, for which a decoder has to keep them all."""
    header["grid"].update(frames=64, height=64, width=64, text_tokens=0)
    own = zstandard.ZstdCompressionParameters(window_log=25)
    data = packed(compression_params=own)(bytes([1, 0]) + bytes(4096 * 4096))
    tensors["mask_index"] = torch.zeros(2, 1, 2, dtype=torch.int32)
    tensors["mask_stacks"] = torch.tensor([[1, 1, 0, len(data)]])
    tensors["mask_data"] = torch.tensor(list(data), dtype=torch.uint8)


SAFETENSORS = "is not a readable safetensors file"
DEFECTS = {
    # the header as text
    "header_missing": (
        content(lambda x: x.replace(HEADER_KEY.encode(), b"another_plan_")),
        "no header 'paroattn_plan'",
    ),
    "header_no_json": (text(lambda x: x[:-1]), "header cannot be read"),
    "header_a_list": (text(lambda x: f"[{x}]"), "header cannot be read"),
    "header_key_twice": (text(lambda x: x[:-1] + ', "block_q": 64}'), "a key occurs twice"),
    "header_key_twice_within": (
        text(lambda x: x.replace('"heads": 2', '"heads": 2, "heads": 2')),
        "a key occurs twice",
    ),
    "header_nested": (
        text(lambda x: x[:-1] + ', "new": ' + "[" * 100 + "]" * 100 + "}"),
        "nested 101 deep; expected at",
    ),
    "header_nested_10000": (
        text(lambda x: '{"a":' * 10_000 + "1" + "}" * 10_000),
        "nested 10000 deep; expected at most",
    ),
    "header_huge_number": (text(lambda x: x[:-1] + ', "new": ' + "9" * 5000 + "}"), "header cannot be read"),
    # versions
    "version_missing": (header(version=None), "KeyError('version')"),
    "version_newer": (header(version=2), "version is 2; this paroattn reads up to 1. Install a newer"),
    "version_negative": (header(version=-1), "version is -1; expected an integer from 0"),
    "version_text": (header(version="1"), "version is '1'; expected an integer"),
    "version_true": (header(version=True), "version is True; expected an integer"),
    "version_older_than_tensors": (header(version=0), "tensors are .*expected .*'mask_table'"),
    # values of the header
    "model_missing": (header(model=None), "header has no model"),
    "model_a_list": (header(model=[1]), "model is [1]; expected an object"),
    "model_unknown_key": (header(model__color=1), "color"),
    "model_without_heads": (header(model__heads=None), "heads"),
    "layers_0": (header(model__layers=0), "the plan has 0 layers; expected 1 to 1,024"),
    "layers_many": (header(model__layers=10**9), "the plan has 1000000000 layers; expected 1 to 1,024"),
    "layers_text": (header(model__layers="1"), "the plan has '1' layers"),
    "heads_negative": (header(model__heads=-2), "the plan has -2 heads"),
    "head_dim_half": (header(model__head_dim=0.5), "the plan has 0.5 head_dim"),
    "class_name_number": (header(model__class_name=7), "class_name is 7; expected printable text"),
    "class_name_escape": (header(model__class_name="\x1b[2J"), "class_name is '\\x1b[2J'; expected printable text"),
    "class_name_lines": (header(model__class_name="a\nb"), "class_name is 'a\\nb'; expected printable text"),
    "config_hash_long": (
        header(model__config_hash="0" * 300),
        "the plan has 300 characters of the model's config_hash",
    ),
    "grid_empty": (header(grid={}), "frames"),
    "grid_negative": (header(grid__height=-8), "height is -8; expected an integer of at least 1"),
    "grid_float": (header(grid__width=8.0), "width is 8.0; expected an integer"),
    "grid_huge": (header(grid__frames=10**12), "tokens; expected 1 to 1,048,576"),
    "grid_text_position": (header(grid__text_position="middle"), "text_position is 'middle'"),
    "grid_reference_flat": (header(grid__references=[[8, 8]]), "references hold [8, 8]; expected frames, height and"),
    "grid_reference_empty": (header(grid__references=[[1, 0, 8]]), "a side of references is 0; expected an integer"),
    "grid_references_many": (header(grid__references=[[1, 1, 1]] * 17), "expected up to 16 boxes"),
    "grid_references_text": (header(grid__references="1x8x8"), "references are '1x8x8'; expected up to 16 boxes"),
    "grid_of_other_masks": (header(grid__frames=4), "stack 0 of masks cannot be decoded: its frame is for"),
    "orders_none": (header(order_names=[]), "the plan has 0 token orders"),
    "orders_text": (header(order_names="FHW"), "order_names is 'FHW'; expected a list of strings"),
    "orders_many": (header(order_names=["FHW"] * 300), "the plan has 300 token orders; expected 1 to 256"),
    "order_unknown": (header(order_names=["FHW", "WHF", "HHW"]), "token order 'HHW' is unknown"),
    "order_no_permutation": (header(order_names=["FHW", "WHF", "8x8x8"]), "token order '8x8x8' is unknown"),
    "order_larger_than_grid": (header(order_names=["FHW", "WHF", "64x1x1"]), "tile '64x1x1' is larger than the grid"),
    "precision_unknown": (header(precisions=["int8", "int3"]), "precision qk is 'int3'"),
    "precisions_missing": (header(precisions=None), "header has no precisions"),
    "schedule_rising": (header(schedule=[0.5, 1.0]), "schedule is [0.5, 1.0]; expected noise levels from 1 down to 0"),
    "schedule_beyond_1": (header(schedule=[1.5, 1.0]), "schedule is [1.5, 1.0]; expected noise levels"),
    "schedule_nan": (header(schedule=[float("nan"), 0.0]), "schedule is [nan, 0.0]; expected noise levels"),
    "schedule_long": (header(schedule=[1] * 10_001), "10001 steps of the schedule; expected 1 to 10,000"),
    "schedule_flat": (header(schedule=[0.5, 0.5]), "has to be one at which the noise level falls"),
    "edges_missing": (header(bucket_edges=[]), "the plan has 0 step buckets"),
    "edges_falling": (header(bucket_edges=[0.5, 0.0]), "bucket_edges are [0.5, 0.0]; expected an ascending list"),
    "edges_text": (header(bucket_edges=["0", "1"]), "bucket_edges is ['0', '1']; expected a list of numbers"),
    "edges_more_than_tensors": (
        header(bucket_edges=[0, 0.25, 0.5]),
        "mask_index is torch.int32 [2, 1, 2]; expected torch.int32 [3, 1, 2]",
    ),
    "block_q_32": (header(block_q=32), "blocks are 32 x 64; expected 64 x 64 or 128 x 64"),
    "block_kv_float": (header(block_kv=64.0), "blocks are 64 x 64.0"),
    "provenance_a_list": (header(provenance=[]), "provenance is []; expected an object"),
    "quality_text": (header(quality={"psnr": "high"}), "quality 'psnr' is 'high'; expected a finite number"),
    "quality_infinite": (header(quality={"psnr": float("inf")}), "quality 'psnr' is inf; expected a finite number"),
    # tensors
    "tensor_missing": (tensor(usage=lambda x: None), "expected .*'usage'"),
    "tensor_more": (tensor(code=lambda x: torch.zeros(1)), "tensors are ['code', "),
    "order_index_range": (tensor(order_index=put((0, 1), 3)), "order_index ranges from 0 to 3; expected 0 to 2"),
    "precision_index_range": (tensor(precision_index=put((0, 0), 9)), "precision_index ranges from 0 to 9"),
    "precision_index_dtype": (tensor(precision_index=lambda x: x.int()), "precision_index is torch.int32 [1, 2]"),
    "mask_index_negative": (tensor(mask_index=put((0, 0, 0), -1)), "mask_index ranges from -1 to 2"),
    "mask_index_beyond": (tensor(mask_index=put((0, 0, 0), 3)), "counts 3 masks; mask_index uses 4"),
    "mask_index_huge": (tensor(mask_index=put((0, 0, 0), 2**31 - 1)), "counts 3 masks; mask_index uses 2147483648"),
    "mask_index_shape": (tensor(mask_index=lambda x: x[:1]), "mask_index is torch.int32 [1, 1, 2]; expected"),
    "compensate_bytes": (tensor(compensate=lambda x: x.to(torch.uint8)), "compensate is torch.uint8"),
    "usage_above_1": (tensor(usage=put((0, 0), 1.5)), "usage holds numbers outside [0, 1]"),
    "usage_nan": (tensor(usage=put((0, 0), float("nan"))), "usage holds numbers outside [0, 1]"),
    "usage_nowhere": (tensor(usage=torch.zeros_like), "or says that no layer is ever called"),
    "checksum_missing": (tensor(sha256=lambda x: None), "expected .*'sha256'"),
    "checksum_wrong": (content(lambda x: x.replace(b'\\"seed\\": 1', b'\\"seed\\": 2')), "does not match its checksum"),
    # masks
    "stacks_none": (
        tensor(mask_stacks=lambda x: x[:0]),
        "mask_stacks is torch.int64 [0, 4]; expected torch.int64 [any, 4]",
    ),
    "stacks_masks_0": (tensor(mask_stacks=put((0, 0), 0)), "stack 0 has 0 masks; expected 1 to 16"),
    "stacks_masks_many": (tensor(mask_stacks=put((1, 0), 2**62)), "masks; expected 1 to 16"),
    "stacks_patterns_0": (tensor(mask_stacks=put((0, 1), 0)), "stack 0 has 0 patterns; expected 1 to 256"),
    "stacks_patterns_257": (tensor(mask_stacks=put((0, 1), 257)), "stack 0 has 257 patterns; expected 1 to 256"),
    "stacks_patterns_fewer": (tensor(mask_stacks=put((0, 1), 2)), "its frame is for 30 bytes; expected 28"),
    "stacks_layout_2": (tensor(mask_stacks=put((1, 2), 2)), "stack 1 has 2 as layout; expected 0 to 1"),
    "stacks_bytes_negative": (tensor(mask_stacks=put((0, 3), -5)), "stack 0 has -5 bytes; expected 1 to"),
    "stacks_bytes_short": (tensor(mask_data=lambda x: x[:-1]), "bytes; mask_data has"),
    "stacks_masks_fewer": (tensor(mask_stacks=put((0, 0), 1)), "counts 2 masks; mask_index uses 3"),
    "frame_no_zstd": (tensor(mask_data=put(0, 0)), "stack 0 of masks cannot be decoded: "),
    "frame_without_size": (frame(lambda x: x, packed(write_content_size=False)), "its frame is for unknown bytes"),
    "frame_long": (frame(lambda x: x + x[-8:]), "bytes; expected"),
    "frame_cut": (
        frame(lambda x: x, lambda x: zstandard.compress(x)[:-4]),
        "stack 0 of masks cannot be decoded: its frame ends",
    ),
    "frame_garbled": (
        frame(lambda x: x, lambda x: zstandard.compress(x)[:8] + b"\xff" * 30),
        "stack 0 of masks cannot be",
    ),
    "frame_window": (
        a_large_window,
        "stack 0 of masks cannot be decoded: zstd decompress error: Frame requires too much",
    ),
    "pixel_beyond_patterns": (pixels(0, [0], 200), "a pixel is 200; expected less than its"),
    "mask_row_empty": (pixels(0, [0, 1, 2], 0), "keeps no block in row 0; every row needs one"),
    "mask_skips_text_column": (pixels(1, [2], 0), "skips a block that touches text tokens"),
    "mask_skips_text_row": (pixels(2, [0], 0), "skips a block that touches text tokens"),
    "mask_beyond_columns": (pixels(1, [5], 2), "has bits beyond its 3 kv blocks"),
    "bomb_of_masks": (a_bomb, "its 1,000,000 masks of 15,873 x 1,985 bytes take 31507.9 GB"),
    "bomb_of_empty_masks": (a_bomb_of_empty_masks, "mask 0 keeps no block in row 0"),
    # bytes
    "empty_file": (content(lambda x: b""), SAFETENSORS),
    "truncated": (content(lambda x: x[:-1]), SAFETENSORS),
    "truncated_in_header": (content(lambda x: x[:300]), SAFETENSORS),
    "trailing_bytes": (content(lambda x: x + b"x"), SAFETENSORS),
    "header_length_huge": (content(lambda x: b"\xff" * 8 + x[8:]), SAFETENSORS),
    "a_pickle": (content(lambda x: b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07example\x94."), SAFETENSORS),
    "tensors_overlap": (
        listed(lambda x: x["usage"].update(data_offsets=x["mask_index"]["data_offsets"])),
        SAFETENSORS,
    ),
    "tensor_size_overflows": (listed(lambda x: x["usage"].update(shape=[2**62, 2**62])), SAFETENSORS),
    "tensor_dtype_unknown": (listed(lambda x: x["usage"].update(dtype="F99")), SAFETENSORS),
    "fuzzed_name": (fuzzed(2), "tensors are ['compensat2', "),
    "fuzzed_dtype": (fuzzed(8), SAFETENSORS),
    "fuzzed_offset": (fuzzed(179), SAFETENSORS),
    "fuzzed_shape": (fuzzed(181), SAFETENSORS),
    "fuzzed_tuple": (fuzzed(36), SAFETENSORS),
    "fuzzed_hole": (fuzzed(2932), SAFETENSORS),
    "tensor_dtype_swapped": (listed(lambda x: x["usage"].update(dtype="I32")), "usage is torch.int32"),
}


def write(folder):
    """Write a file for each defect into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (change, _) in DEFECTS.items():
        path = folder / f"{name}.safetensors"
        if isinstance(change, dict):
            forge(path)
            path.write_bytes(change["bytes"](path.read_bytes()))
        else:
            forge(path, change)


if __name__ == "__main__":
    write(FOLDER)
