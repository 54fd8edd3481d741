"""Pictures of the report, as data URIs: attention maps with their masks, and videos side by side."""

from __future__ import annotations

import base64
import io

import matplotlib
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import interpolate

from paroattn.block_mask import block_count, unpack_bits
from paroattn.calibration.select import CalibrationStatistics
from paroattn.frames import webp_bytes
from paroattn.plan import Plan

matplotlib.use("agg")
COLUMN_WIDTH = 192  # pixels of one video in a row of videos
DIFFERENCE_GAIN = 4


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def video_row(videos: list[Tensor], fps: int) -> str:
    """One animation of several videos side by side; below each, its difference from the first, amplified.

    Being one picture, the videos cannot run apart.
    """
    width = min(COLUMN_WIDTH, videos[0].shape[-1])
    height = round(videos[0].shape[-2] * width / videos[0].shape[-1])
    small = [interpolate(video, size=(height, width), mode="area") for video in videos]
    differences = [((video - small[0]).abs() * DIFFERENCE_GAIN).clamp(max=1) for video in small]
    return data_uri(webp_bytes(torch.cat((torch.cat(small, 3), torch.cat(differences, 3)), 2), fps), "webp")


def telling_head(reordered: CalibrationStatistics, original: CalibrationStatistics, layer: int, share: float) -> int:
    """The head of a layer whose attention gains most from its order: mass in the largest `share` of blocks."""

    def kept_mass(statistics: CalibrationStatistics) -> Tensor:
        blocks = statistics.block_sums[0, layer].flatten(1).sort(descending=True).values
        return blocks[:, : round(share * blocks.shape[1])].sum(1)

    return int((kept_mass(reordered) - kept_mass(original)).argmax())


def attention_maps(reordered: CalibrationStatistics, original: CalibrationStatistics, plan: Plan) -> str:
    """Per layer one head's attention map, before and after reordering, and with the plan's mask; first step bucket."""
    layers = plan.model.layers
    figure = Figure(figsize=(9.6, 3.2 * layers), layout="constrained")
    panels = figure.subplots(layers, 3, squeeze=False)
    for layer, row in enumerate(panels):
        head = telling_head(reordered, original, layer, plan.density())
        before, after = original.block_sums[0, layer, head], reordered.block_sums[0, layer, head]
        mask = unpack_bits(plan.mask_table[plan.mask_index[0, layer, head].long()], after.shape[-1])
        order = plan.order_names[int(plan.order_index[layer, head])]
        least = max(float(after.max()) * 1e-4, 1e-12)
        norm = LogNorm(least, max(float(after.max()), float(before.max()), 2 * least))
        pictures = {
            f"layer {layer}, head {head}: model's order": before.clamp(min=least),
            f"order {order}": after.clamp(min=least),
            f"kept blocks, {float(mask.float().mean()):.0%}": after.clamp(min=least).where(mask, torch.nan),
        }
        for axes, (title, picture) in zip(row, pictures.items(), strict=True):
            axes.imshow(picture, norm=norm, cmap="viridis", interpolation="nearest")
            axes.set_title(title, fontsize=9)
            axes.set(xticks=[], yticks=[])
            axes.set_facecolor("#d8d8d8")
        row[0].set_ylabel(f"{block_count(plan.grid.tokens, plan.block_q)} blocks of queries", fontsize=8)
        row[0].set_xlabel("blocks of keys", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return data_uri(buffer.getvalue(), "png")
