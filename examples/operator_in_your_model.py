"""Use the operator alone, in a transformer of one's own.

    python examples/operator_in_your_model.py

A layer that attends over a box of frames x height x width tokens gets a token order and a mask of its heads' own
statistics: the blocks with the largest sums of the attention map, reordered.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import paroattn
from paroattn.block_mask import pack_bits, text_blocks
from paroattn.calibration.statistics import block_sums
from paroattn.keep import keep_best
from paroattn.order import token_order
from paroattn.plan import LayerPlan

GRID = paroattn.TokenGrid(frames=8, height=8, width=8)
HEADS, HEAD_DIM = 4, 32


class SelfAttention(nn.Module):
    """As in any transformer; `operator` None is full attention."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(HEADS * HEAD_DIM, 3 * HEADS * HEAD_DIM)
        self.to_out = nn.Linear(HEADS * HEAD_DIM, HEADS * HEAD_DIM)
        self.operator: Callable[..., Tensor] | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        query, key, value = self.to_qkv(hidden_states).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)  # [B, N, H, D]
        if self.operator is None:
            heads_first = (x.transpose(1, 2) for x in (query, key, value))
            output = nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)
        else:
            output = self.operator(query, key, value, bucket=torch.tensor(0))
        return self.to_out(output.flatten(2))


def layer_plan(query: Tensor, key: Tensor, density: float) -> LayerPlan:
    """Orders with time fastest for half of the heads, and the blocks that hold most attention."""
    names = ["FHW", "HWF"] * (HEADS // 2)
    orders = torch.stack([token_order(name, GRID) for name in names])
    required = text_blocks(GRID)
    masks = []
    for head in range(HEADS):
        (sums,) = block_sums(query[0, :, head], key[0, :, head], [orders[head]], HEAD_DIM**-0.5)
        masks.append(keep_best(sums, density, required))
    return LayerPlan(
        precisions=(paroattn.Precision("int8", "int8"),) * HEADS,
        orders=orders,
        mask_table=pack_bits(torch.stack(masks)),
        tokens=GRID.tokens,
    )


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    layer = SelfAttention()
    hidden_states = torch.randn(1, GRID.tokens, HEADS * HEAD_DIM)
    full = layer(hidden_states)
    query, key, _ = layer.to_qkv(hidden_states).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
    for density in (1.0, 0.75, 0.5):
        plan = layer_plan(query, key, density)
        layer.operator = paroattn.prepare(plan, device="cpu", dtype=torch.float32, tensor_layout="NHD")
        error = (layer(hidden_states) - full).norm() / full.norm()
        print(f"density {density:g}: relative error {error:.4f}")


if __name__ == "__main__":
    main()
