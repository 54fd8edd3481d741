# What csrc/module.cpp exports.
from torch import Tensor

CAPABILITIES: tuple[str, ...]

def best_capability() -> str: ...
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    permutation: Tensor | None,
    mask: Tensor | None,
    mask_block_q: int,
    mask_block_kv: int,
    compensate: Tensor | None,
    key_mask: Tensor | None,
    qk: list[str],
    pv: list[str],
    scale: float,
    capability: str,
    threads: int,
) -> tuple[int, float]: ...
