"""How Triton's attention forward is compiled: one table by target, formats and shape instead of tuning at run time.

What hopper.py computes has choices of its own there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from paroattn.ops.gpu.device import FP8_TARGETS


@dataclass(frozen=True)
class Kind:
    """What distinguishes compiled forwards of a target.

    Attributes:
        head_dim: 64 or 128, to which heads are padded.
        block_q: queries per program, 64 or, with head_dim 64, 128.
        qk: "int8" or "16" (bit).
        pv: "int8", "fp8" or "16".
    """

    head_dim: int
    block_q: int
    qk: str
    pv: str


@dataclass(frozen=True)
class Config:
    """Choices that change how fast the forward is, not what it computes.

    Attributes:
        num_warps, num_stages: Triton's.
        width: kept keys per step: 64, or 128 for two blocks at a time.
        swapped: keys are stored so that P becomes an 8-bit operand without moving between threads.
        asm: P is rounded to int8 by inline PTX.
        registers: at most so many per thread: few, so that a multiprocessor holds one program more, or 255 where
            NVIDIA's assembler would stop earlier and spill. None leaves it to the assembler.
    """

    num_warps: int
    num_stages: int
    width: int = 64
    swapped: bool = False
    asm: bool = False
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Options of Triton's compiler."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


OVERRIDES: dict[tuple[str, Kind], Config] = {}
"""Entries that replace the table's: `OVERRIDES["sm90", Kind(64, 128, "int8", "int8")] = Config(4, 3, width=128)`."""


def kinds(target: str) -> list[Kind]:
    """Everything that is shipped for a target."""
    values = ("int8", "fp8", "16") if target in FP8_TARGETS else ("int8", "16")
    return [
        Kind(head_dim, block_q, qk, pv)
        for head_dim in (64, 128)
        for block_q in ((64, 128) if head_dim == 64 else (64,))
        for qk in ("int8", "16")
        for pv in values
    ]


def config(target: str, kind: Kind, *, compensated: bool = False) -> Config:
    """The entry of `OVERRIDES`, or else of the table; compensated is the variant with mean tokens."""
    if (target, kind) in OVERRIDES:
        return OVERRIDES[target, kind]
    own = _table(target, kind)
    if compensated and own.registers == 168:  # would spill
        return replace(own, registers=None)
    if compensated and target == "sm90" and (kind.block_q, kind.qk, kind.pv) == (128, "16", "16"):  # so would this
        return replace(own, num_stages=2)
    return own


def _table(target: str, kind: Kind) -> Config:
    eight_bit = kind.pv != "16"
    swapped = eight_bit and target not in ("sm100", "gfx942")  # whose registers are laid out otherwise
    asm = kind.pv == "int8" and target != "gfx942"
    if target == "sm90":
        return _measured(kind, swapped, asm)
    # Four warps of 64 x 128 queries in 16 bits would spill where registers hold the operands.
    wide = kind.head_dim == 128 and (kind.qk, eight_bit) != ("int8", True) and target not in ("sm100", "gfx942")
    # Left to itself, NVIDIA's assembler stops at 128 or 168 registers for some of these and spills.
    all_registers = 255 if kind.head_dim == 64 and eight_bit and target != "gfx942" else None
    return Config(8 if wide or kind.block_q == 128 else 4, 2, 64, swapped, asm, all_registers)


def _measured(kind: Kind, swapped: bool, asm: bool) -> Config:
    """The fastest on an H100; the other targets' are compiled, not measured."""
    both = kind.qk == "int8" and kind.pv != "16"
    if kind.block_q == 128:
        return Config(4, 3, 128, swapped, asm)
    if kind.head_dim == 64:
        return Config(4, 3, 128, swapped, asm, 128) if both else Config(4, 2, 128, swapped, asm, 168)
    if both:
        return Config(4, 4, 64, swapped, asm, 168) if kind.pv == "fp8" else Config(4, 3, 128, swapped, asm)
    return Config(4, 3, 64, swapped, asm) if kind.pv == "16" else Config(4, 2, 64, swapped, asm, 168)


def queries_per_program(head_dim: int, mask_block_q: int | None, tokens: int) -> int:
    """Triton's `Kind.block_q` for a head_dim of 64 or 128 and a mask with so many queries per block, None for no mask.

    With head_dim 128, two programs of 64 queries share a row of a mask in blocks of 128: one program would leave room
    for no other on an H100, and spill on other targets.
    """
    if head_dim == 128 or (mask_block_q is None and tokens <= 64):
        return 64
    return mask_block_q or 128


def skip_cost_options(target: str, head_dim: int, *, of_lists: bool = False) -> dict[str, int]:
    """How calibration's kernels, or the one that walks over lists, are compiled without spills; head_dim 64 or 128."""
    if target == "gfx942":
        return {"num_warps": 4, "num_stages": 1}
    if of_lists:
        return {"num_warps": 8 if head_dim == 128 else 4, "num_stages": 2}
    wide = head_dim == 128 and target not in ("sm90", "sm100")
    return {"num_warps": 8 if wide else 4, "num_stages": 3 if wide else 2}
