"""A small plan, and plan files that are taken apart, changed and put together again."""

import hashlib
import json

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from paroattn import Plan, Precision, TokenGrid
from paroattn.block_mask import pack_bits, text_blocks
from paroattn.plan import ModelIdentity

HEADER_KEY = "paroattn_plan"


def small_plan(**changes):
    """2 step buckets, 1 layer, 2 heads, 3 x 3 blocks of which the last row and column hold text."""
    grid = TokenGrid(2, 8, 8, text_tokens=5)
    visual = [[[1, 0], [0, 1]], [[1, 1], [0, 1]], [[1, 0], [1, 1]]]
    masks = text_blocks(grid).repeat(3, 1, 1)
    masks[:, :2, :2] = torch.tensor(visual).bool()
    parts = {
        "model": ModelIdentity("Model", "abc", 1, 2, 8),
        "grid": grid,
        "order_names": ("FHW", "WHF", "2x4x8"),
        "order_index": torch.tensor([[0, 2]], dtype=torch.uint8),
        "precisions": (Precision("int8", "int8"), Precision("int8", "bf16")),
        "precision_index": torch.tensor([[1, 0]], dtype=torch.uint8),
        "schedule": (1.0, 0.5),
        "bucket_edges": (0.0, 0.5),
        "mask_table": pack_bits(masks),
        "mask_index": torch.tensor([[[0, 2]], [[1, 2]]], dtype=torch.int32),
        "compensate": torch.tensor([[[True, False]], [[False, True]]]),
        "usage": torch.ones(2, 1),
        "provenance": {"prompts": ["é"], "seed": 1},
    }
    return Plan(**{**parts, **changes})


def masks_of(plan):
    """The masks by place, uint8 [buckets, layers, heads, q blocks, bytes]: files may number them otherwise."""
    return plan.mask_table[plan.mask_index.long()]


def apart(path):
    """The header and the tensors of a plan file."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[HEADER_KEY]), {name: file.get_tensor(name) for name in file.keys()}


def together(path, header, tensors):
    """Write a plan file with the checksum that is right for a header (a string is taken as it is) and tensors."""
    text = header if isinstance(header, str) else json.dumps(header, sort_keys=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    digest = hashlib.sha256(text.encode())
    for name in sorted(set(tensors) - {"sha256"}):
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().tobytes())
    if "sha256" in tensors:
        tensors["sha256"] = torch.tensor(list(digest.digest()), dtype=torch.uint8)
    save_file(tensors, path, metadata={HEADER_KEY: text})


def forge(path, change=lambda header, tensors: None, plan=None):
    """Write a plan file whose header or tensors were changed, with the checksum that goes with them.

    change: takes the header and the tensors, and changes them or returns the text of another header.
    """
    (plan or small_plan()).save(path)
    header, tensors = apart(path)
    text = change(header, tensors)
    together(path, text if isinstance(text, str) else header, tensors)
