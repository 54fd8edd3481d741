"""How Triton's attention forward is compiled: one table by target, formats and shape instead of tuning at run time.

What hopper.py computes has choices of its own there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from paroattn.ops.gpu.device import FP8_TARGETS
from paroattn.quantize import HEAD_WIDTHS


@dataclass(frozen=True)
class Kind:
    """What distinguishes compiled forwards of a target.

    Attributes:
        head_dim: 64, 128 or 256, to which heads are padded.
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
        for head_dim in HEAD_WIDTHS
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
    if kind.head_dim == 256:
        return _widest(target, kind, swapped, asm)
    if target == "sm90":
        return _measured(kind, swapped, asm)
    # Four warps of 64 x 128 queries in 16 bits would spill where registers hold the operands.
    wide = kind.head_dim == 128 and (kind.qk, eight_bit) != ("int8", True) and target not in ("sm100", "gfx942")
    # Left to itself, NVIDIA's assembler stops at 128 or 168 registers for some of these and spills.
    all_registers = 255 if kind.head_dim == 64 and eight_bit and target != "gfx942" else None
    return Config(8 if wide or kind.block_q == 128 else 4, 2, 64, swapped, asm, all_registers)


def _widest(target: str, kind: Kind, swapped: bool, asm: bool) -> Config:
    """For head_dim 256, compiled but not measured: eight warps, since the sums alone are 128 registers in four.

    A second stage of keys and values spills on most targets, and with 16 bits exceeds the shared memory of some.
    """
    if target == "gfx942":
        return Config(4, 1, 64, swapped, asm)  # each thread has 512 registers
    two = {"sm90": kind.qk == "int8" or kind.pv == "16", "sm100": kind.pv != "int8"}
    return Config(8, 2 if two.get(target) else 1, 64, swapped, asm)


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
    """Triton's `Kind.block_q` for a head_dim of `HEAD_WIDTHS` and a mask's queries per block, None without a mask.

    With more than 64, two programs of 64 queries share a row of a mask in blocks of 128: one program would leave room
    for no other on an H100, and spill on other targets.
    """
    if head_dim > 64 or (mask_block_q is None and tokens <= 64):
        return 64
    return mask_block_q or 128


def block_warps(head_dim: int) -> int:
    """Of a kernel that holds 64 rows of float32, for a head_dim of `HEAD_WIDTHS`."""
    return 8 if head_dim == 256 else 4


def skip_cost_options(target: str, head_dim: int, *, of_lists: bool = False) -> dict[str, int]:
    """How calibration's kernels, or the one that walks over lists, are compiled; head_dim one of `HEAD_WIDTHS`.

    Nothing spills with head_dim 64 and 128. With 256, exact `attend_rows` does on sm90 and gfx942, and `kept_errors`
    everywhere.
    """
    if target == "gfx942":
        return {"num_warps": 4, "num_stages": 1}
    if head_dim == 256:  # two stages of what they read are more shared memory than the others have
        # Left to itself, NVIDIA's assembler stops at 128 registers on sm100 and spills.
        return {"num_warps": 8, "num_stages": 2 if target in ("sm80", "sm90", "sm100") else 1, "maxnreg": 255}
    if of_lists:
        return {"num_warps": 8 if head_dim == 128 else 4, "num_stages": 2}
    wide = head_dim == 128 and target not in ("sm90", "sm100")
    return {"num_warps": 8 if wide else 4, "num_stages": 3 if wide else 2}
