"""Compile the shipped kernels ahead of time, without a GPU, and say what the compilers made of them.

    python lab/benchmarks/triton_kernels.py                  # every target's kernels in the common formats
    python lab/benchmarks/triton_kernels.py --target sm90    # of one target
    python lab/benchmarks/triton_kernels.py --all            # all formats and variants
    python lab/benchmarks/triton_kernels.py --roofline    # instructions per score element, two workloads' lower bounds

Exit code 1 if a kernel spills registers (but for some with head_dim 256), lacks its matrix instruction or takes more
shared memory than the target has.
"Instructions per score element" counts what the main loop issues per entry of QK^T that a thread computes.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from paroattn.block_mask import BLOCK
from paroattn.calibration.gpu import kernels as calibration
from paroattn.ops import repair as repair_by_definition
from paroattn.ops.gpu import configs, exchange, forward, hopper, prologue, repair, rotary
from paroattn.ops.gpu.configs import Config, Kind
from paroattn.ops.gpu.device import SHARED_MEMORY, TARGETS
from paroattn.quantize import HEAD_WIDTHS

_NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_POINTEES = {"int8": "i8", "fp8": "fp8e4nv", "fp16": "fp16", "bf16": "bf16"}
# The instruction that multiplies matrices of a width, by target; any of them counts as the expected one.
_MATRIX = {
    "sm80": {"int8": "IMMA", "16": "HMMA"},
    "sm86": {"int8": "IMMA", "16": "HMMA"},
    "sm89": {"int8": "IMMA", "16": "HMMA", "fp8": "QMMA"},
    "sm90": {"int8": "IGMMA", "16": "HGMMA", "fp8": "QGMMA"},
    "sm100": {"int8": "IMMA", "16": "UTCHMMA", "fp8": "UTCQMMA"},
    "sm120": {"int8": "IMMA", "16": "HMMA", "fp8": "QMMA"},
    "gfx942": {"int8": "v_mfma_i32", "16": "v_mfma_f32"},
}
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of one kernel.

    Attributes:
        registers: per thread; spills: loads and stores of registers in local memory.
        shared: bytes of shared memory.
        matrix: matrix instructions and how often they stand in the code.
        per_score: instructions of the main loop per score element, or None (not NVIDIA, or no such loop).
        mix: the same by instruction.
    """

    registers: int
    spills: int
    shared: int
    matrix: dict[str, int]
    per_score: float | None = None
    mix: dict[str, float] | None = None


def gpu_target(name: str) -> GPUTarget:
    return GPUTarget("cuda", int(name[2:]), 32) if name.startswith("sm") else GPUTarget("hip", name, 64)


def compile_kernel(kernel: Any, target: str, types: dict[str, str], constants: dict[str, Any], **options: int) -> Any:
    """Compile a kernel; arguments in neither `types` nor `constants` are 32-bit integers.

    Pointers and strides are taken for multiples of 16, as those of whole heads are.
    """
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name.startswith("stride_")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name not in constants},
    )
    return triton.compile(source, target=gpu_target(target), options=options)


def compile_forward(
    target: str, kind: Kind, config: Config, *, sparse: bool = True, compensate: bool = False, biased: bool = False
) -> Any:
    """The attention forward of one kind, bfloat16 tensors, with an order and a mask; biased is with a key mask."""
    qk, pv = ("bf16" if width == "16" else width for width in (kind.qk, kind.pv))
    types = dict.fromkeys(("heads_ptr", "order_ptr", "order_index_ptr"), "*i32") | {
        "q_ptr": f"*{_POINTEES[qk]}",
        "output_ptr": "*bf16",
    }
    types |= dict.fromkeys(("lse_ptr", "q_factor_ptr"), "*fp32")
    unused = ["visited_ptr"] if biased else ["visited_ptr", "bias_ptr"]
    types |= {"bias_ptr": "*fp32"} if biased else {}
    for names, used in (
        (("lse_shift_ptr", "k_scale_ptr"), kind.qk == "int8"),
        (("v_mean_ptr", "v_scale_ptr"), kind.pv != "16"),
    ):
        types |= dict.fromkeys(names, "*fp32") if used else {}
        unused += [] if used else names
    lists = {"slots_ptr": "*i32", "rows_ptr": "*i32", "counts_ptr": "*i32", "indices_ptr": "*i32"}
    means = {"compensate_ptr": "*u8", "mask_ptr": "*u8", "mean_bias_ptr": "*fp32"}
    means |= {"mask_index_ptr": "*i32", "bucket_ptr": "*i64"}
    means |= {"mean_k_ptr": f"*{_POINTEES[qk]}", "mean_v_ptr": f"*{_POINTEES[pv]}"}
    means |= dict.fromkeys(("mean_k_scale_ptr", "mean_v_scale_ptr"), "*fp32")
    for used, group in ((sparse, lists), (compensate, means)):
        types |= group if used else {}
        unused += [] if used else list(group)
    types |= {"k_ptr": f"*{_POINTEES[qk]}", "v_ptr": f"*{_POINTEES[pv]}"}
    constants = dict.fromkeys(unused) | {
        "HEAD_DIM": kind.head_dim,
        "D": kind.head_dim,
        "BLOCK_Q": kind.block_q,
        "QK": qk,
        "PV": pv,
        "WIDTH": config.width,
        "SWAPPED": config.swapped,
        "ASM": config.asm,
        "NUM_STAGES": config.num_stages,
    }
    return compile_kernel(forward.attention_forward, target, types, constants, **config.options)


def describe(compiled: Any, scores: float | None = None) -> Compiled:
    """Resources and instructions; `scores` is how many score elements a thread computes per turn of the main loop."""
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        numbers = {name: int(re.search(rf"\.{name}:?\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count")}
        matrix = collections.Counter(re.findall(r"\bv_mfma_[a-z0-9]+", text))
        return Compiled(numbers["vgpr_count"], numbers["vgpr_spill_count"], shared, dict(matrix))
    return describe_machine_code(compiled.asm["cubin"], shared, scores)


def describe_machine_code(code: bytes, shared: int, scores: float | None = None) -> Compiled:
    """`describe` for NVIDIA's."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        usage, listing = (
            subprocess.run([_NVIDIA_TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True)
            for flag in ("--dump-resource-usage", "-sass")
        )
    found = [match.groups() for match in map(_INSTRUCTION.match, listing.stdout.splitlines()) if match]
    instructions = [(int(address, 16), name, rest) for address, name, rest in found]
    names = [name for _, name, _ in instructions]
    matrix = collections.Counter(name.split(".")[0] for name in names if _is_matrix(name))
    loop = _main_loop(instructions) if scores else []
    return Compiled(
        registers=int(re.search(r"REG:(\d+)", usage.stdout)[1]),
        spills=sum(name.startswith(("LDL", "STL")) for name in names),
        shared=shared,
        matrix=dict(matrix),
        per_score=len(loop) / scores if loop and scores else None,
        mix={name: count / scores for name, count in collections.Counter(loop).most_common()} if scores else None,
    )


def _is_matrix(name: str) -> bool:
    return re.match(r"([HIQ]G?MMA|UTC\w*MMA)", name) is not None


def _main_loop(instructions: list[tuple[int, str, str]]) -> list[str]:
    """Names of the instructions of the loop with the most matrix products that holds no other loop with some.

    Waiting for a barrier may go on at the end of the code and jump back, which would look like a loop over everything.
    """
    loops = {}
    for address, name, rest in instructions:
        to = re.findall(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else []
        if to and int(to[-1], 16) <= address:
            start = int(to[-1], 16)
            names = [own for at, own, _ in instructions if start <= at <= address]
            if any(map(_is_matrix, names)):
                loops[start, address] = names

    def inner(span: tuple[int, int]) -> bool:
        return not any(other != span and span[0] <= other[0] and other[1] <= span[1] for other in loops)

    return max(
        (names for span, names in loops.items() if inner(span)), key=lambda x: sum(map(_is_matrix, x)), default=[]
    )


def forward_report(target: str, kind: Kind, config: Config, **variant: bool) -> Compiled:
    per_thread = kind.block_q * config.width / (32 * config.num_warps)
    return describe(compile_forward(target, kind, config, **variant), per_thread)


def hopper_report(kind: Kind) -> Compiled:
    """hopper_forward.cu; its main loop's instructions are those of a step of two blocks, with both ways to copy."""
    code = hopper.compiled(kind.head_dim, kind.pv, torch.bfloat16)
    shared = hopper.layout(kind.head_dim, kind.pv).shared
    return describe_machine_code(code, shared, kind.block_q * 2 * BLOCK / hopper.THREADS)


def _in_cuda(kind: Kind) -> bool:
    """Whether hopper_forward.cu computes this kind; its programs have 64 queries."""
    return (
        kind.block_q == BLOCK
        and kind.qk == "int8"
        and kind.pv in hopper.PV_FORMATS
        and kind.head_dim in hopper.PROGRAMS
    )


# Kernels with head_dim 256 that spill on some targets in every configuration tried.
_SPILLING = ("attend_rows", "kept_errors", "exact_probes")
_SOLVING = "fit_map"  # one program per head, all of whose tiles stay in registers: a hundred spills are nothing to it


def _spills_anyway(target: str, kind: Kind, variant: dict[str, bool]) -> bool:
    """Whether a forward does."""
    compensated, dense = variant.get("compensate", False), not variant.get("sparse", True)
    found = {
        "sm90": compensated or kind.pv != "16",
        "sm100": (compensated or dense) and kind.pv == "int8",
        "gfx942": dense and kind.pv == "16",
    }
    return (kind.head_dim, kind.qk) == (256, "16") and found.get(target, False)


def faults(target: str, kind: Kind, report: Compiled, **variant: bool) -> list[str]:
    """What of a compiled forward may not be shipped."""
    found = []
    if report.spills and not _spills_anyway(target, kind, variant):
        found.append(f"{report.spills} spills")
    if report.shared > SHARED_MEMORY[target]:
        found.append(f"{report.shared} bytes of shared memory; the target has {SHARED_MEMORY[target]}")
    for width in {kind.qk, kind.pv}:
        wanted = _MATRIX[target][width]
        if not any(name.startswith(wanted) for name in report.matrix):
            found.append(f"no {wanted}")
    return found


_SKIP_COSTS = ("attend_rows", "block_costs", "kept_errors")  # calibration's kernels with options of their own
# What the other kernels are compiled with: types of their pointers and constants.
_FLOATS = ["k_mean_ptr", "v_mean_ptr", "v_scale_ptr", "q_factor_ptr", "lse_shift_ptr", "k_scale_ptr"]
_FLOATS += ["values_scale_ptr", "partial_ptr", "surrogate_ptr", "mean_v_ptr", "start_ptr", "taken_ptr"]
_FLOATS += ["parts_ptr", "errors_ptr", "output_ptr"]
_FLOATS += ["bias_ptr", "block_k_ptr", "block_v_ptr", "block_count_ptr", "lse_ptr", "sums_ptr"]
_FLOATS += ["first_cos_ptr", "second_cos_ptr", "first_sin_ptr", "second_sin_ptr"]
_INTEGERS = ["heads_ptr", "order_ptr", "orders_ptr", "counts_ptr", "indices_ptr", "slots_ptr", "rows_ptr"]
_INTEGERS += ["lists_ptr", "ends_ptr"]
_POINTERS = dict.fromkeys(_FLOATS, "*fp32") | dict.fromkeys(_INTEGERS, "*i32")
_POINTERS |= dict.fromkeys(("order_index_ptr", "mask_index_ptr"), "*i32") | {"bucket_ptr": "*i64"}
_POINTERS |= dict.fromkeys(("mask_ptr", "key_mask_ptr", "wanted_ptr"), "*u8")
_POINTERS |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "x_ptr", "out_ptr", "tokens_ptr", "packed_ptr"), "*bf16")
_POINTERS |= dict.fromkeys(("queries_ptr", "keys_ptr", "values_ptr"), "*i8") | {"numbers_ptr": "*i64"}
_POINTERS |= {"limits_ptr": "*fp32", "moved_ptr": "*fp32", "weights_ptr": "*bf16", "scale": "fp32", "ridge": "fp32"}


def other_kernels(head_dim: int) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The kernels beside the forward, for INT8 and calibration: name -> kernel and constants."""
    size = {"HEAD_DIM": head_dim, "D": head_dim}
    int8 = {"QK": "int8", "PV": "int8", "SWAPPED": True}
    channels = {"CHANNELS": head_dim, "WIDTH": head_dim}
    probes = {"STEP": repair_by_definition._STEP} | channels
    rounds = repair.rounds_of(head_dim, repair_by_definition._RIDGE * repair_by_definition.PROBES)
    in_place = {"COLUMNS": repair.columns_of(head_dim, in_16_bits=True)}
    pairs = {"ROWS": rotary.rows_of(head_dim), "CHANNELS": head_dim, "WIDTH": head_dim}
    plain, in_records = {"RECORD": 0, "COLUMNS": 0}, {}
    if head_dim in hopper.PROGRAMS:
        layout = hopper.layout(head_dim, "int8")
        records = {"RECORD": layout.record, "COLUMNS": layout.columns}
        in_records = {"pack_key_value, records": (prologue.pack_key_value, size | int8 | records)}
    statistics = {"CHUNK": 512, "K_CHUNK": 128, "TILE": 2048 // head_dim}
    return {
        "partial_statistics": (prologue.partial_statistics, size | statistics),
        "channel_statistics": (prologue.channel_statistics, {"D": head_dim, "PV": "int8", "CHUNKS": 256}),
        "pack_query": (prologue.pack_query, size | {"QK": "int8", "RECORD": 0}),
        "pack_key_value": (prologue.pack_key_value, size | int8 | plain),
        **in_records,
        "pack_means": (prologue.pack_means, {"D": head_dim} | int8 | plain),
        "rotate": (rotary.rotate_rows, pairs | {"INTERLEAVED": True}),
        "rotate, halves": (rotary.rotate_rows, pairs | {"INTERLEAVED": False}),
        "exact_probes": (repair.exact_probes, probes | {"PRECISION": "tf32x3"}),
        "fit_map": (repair.fit_map, probes | {"ROUNDS": rounds, "CHUNKS": 32, "PRECISION": "tf32x3"}),
        "apply_map": (repair.apply_map, channels | in_place | {"PRECISION": "tf32x3"}),
        "move_heads": (exchange.move_heads, channels | {"ROWS": exchange.rows_of(head_dim), "UNPACKS": False}),
        "kept_lists": (prologue.kept_lists, {"COLUMNS": 512}),
        "schedule": (prologue.schedule, {"ROWS": 512, "TILE": 64, "SLOTS": 8}),
        "attend_rows": (calibration.attend_rows, {"D": head_dim, "ROUNDED": False}),
        "attend_rows, rounded": (calibration.attend_rows, {"D": head_dim, "ROUNDED": True}),
        "block_costs": (calibration.block_costs, {"D": head_dim, "ROUNDED": False}),
        "block_costs, rounded": (calibration.block_costs, {"D": head_dim, "ROUNDED": True}),
        "kept_errors": (calibration.kept_errors, {"D": head_dim}),
        "row_lse": (calibration.row_lse, size),
        "block_sums": (calibration.block_sums, size),
    }


_HOPPER = "hopper_forward.cu"
_COMMON = (("int8", "int8"), ("int8", "fp8"), ("16", "16"))
_VARIANTS = ({}, {"sparse": False}, {"compensate": True}, {"biased": True})


def jobs(targets: Sequence[str], everything: bool) -> list[tuple[str, Any, dict[str, bool]]]:
    """What to compile: (target, kind or (name, head_dim), variant); by default the common formats with a mask."""
    found: list[tuple[str, Any, dict[str, bool]]] = []
    for target in targets:
        for kind in configs.kinds(target):
            if everything or (kind.qk, kind.pv) in _COMMON:
                found += [(target, kind, variant) for variant in (_VARIANTS if everything else _VARIANTS[:1])]
        found += [
            (target, (name, head_dim), {})
            for head_dim in HEAD_WIDTHS
            for name in other_kernels(head_dim)
            if not (target.startswith("gfx") and head_dim > 128 and name in repair.WARPS)  # `repair.takes`
        ]
        if target == "sm90" and hopper.unavailable() is None:
            found += [(target, (_HOPPER, kind), {}) for kind in configs.kinds(target) if _in_cuda(kind)]
    return found


def compiled_row(job: tuple[str, Any, dict[str, bool]]) -> tuple[str, list[str]]:
    """One line of the table, and what may not be shipped of it."""
    try:
        return _row(*job)
    except RuntimeError as error:
        wrong = f"does not compile: {error}"
        return f"{job[0]} {job[1]} {job[2]}  <- {wrong}", [wrong]


def _row(target: str, what: Any, variant: dict[str, bool]) -> tuple[str, list[str]]:
    if isinstance(what, Kind):
        config = configs.config(target, what, compensated=variant.get("compensate", False))
        report = forward_report(target, what, config, **variant)
        settings = f"{config.num_warps} warps, {config.num_stages} stages, width {config.width}"
        settings += "" if config.registers is None else f", at most {config.registers} registers"
        name = f"{what.block_q:3d} x 64  {what.qk:>4}/{what.pv:<4}  {settings}"
        name += "".join(f", {key} {value}" for key, value in variant.items())
        wrong, head_dim = faults(target, what, report, **variant), what.head_dim
    elif what[0] == _HOPPER:
        kind = what[1]
        report = hopper_report(kind)
        name = f"{kind.block_q:3d} x 64  {kind.qk:>4}/{kind.pv:<4}  {_HOPPER}"
        wrong, head_dim = faults(target, kind, report), kind.head_dim
    else:
        (kernel, head_dim) = what
        function, constants = other_kernels(head_dim)[kernel]
        if "PRECISION" in constants and target.startswith("gfx"):
            constants = constants | {"PRECISION": "ieee"}
        types = {key: value for key, value in _POINTERS.items() if key in function.arg_names and key not in constants}
        options = {"num_warps": configs.block_warps(head_dim) * (2 if kernel == "channel_statistics" else 1)}
        if kernel in repair.WARPS:
            options = {"num_warps": repair.WARPS[kernel](head_dim)}
        if kernel in ("exact_probes", "apply_map"):
            options["num_stages"] = repair.stages_of(head_dim, in_16_bits=True, on_amd=target.startswith("gfx"))
        if kernel.partition(",")[0] in _SKIP_COSTS:
            options = configs.skip_cost_options(target, head_dim, of_lists=kernel == "kept_errors")
        report = describe(compile_kernel(function, target, types, constants, **options))
        spilling = report.spills and not (head_dim == 256 and kernel in _SPILLING) and kernel != _SOLVING
        name, wrong = kernel, [f"{report.spills} spills"] if spilling else []
        if report.shared > SHARED_MEMORY[target]:
            wrong.append(f"{report.shared} bytes of shared memory")
    per_score = f"{report.per_score:5.2f}" if report.per_score else "    -"
    matrix = " ".join(f"{count} {key}" for key, count in report.matrix.items())
    line = (
        f"{target:6} {head_dim:3} {name:86} {report.registers:3} registers {report.shared:6} B  {per_score}  {matrix}"
    )
    accepted = f"  {report.spills} spills" if report.spills and not wrong else ""
    return line + accepted + (f"  <- {', '.join(wrong)}" if wrong else ""), wrong


@dataclass(frozen=True)
class Workload:
    """Attention of one layer of a model."""

    name: str
    batch: int
    heads: int
    tokens: int
    head_dim: int


_WORKLOADS = (Workload("CogVideoX", 2, 48, 17_776, 64), Workload("Wan 14B 720p", 1, 40, 75_600, 128))
_SMS, _CLOCK = 132, 1.755e9  # of an H200
_MATRIX_RATE = {"16": 989e12, "int8": 1979e12, "fp8": 1979e12}  # of its datasheet


def roofline() -> None:
    """Print, for both workloads, the instructions per score element on sm90 and the least times in ms."""
    print("sm90, 132 multiprocessors at 1.755 GHz, datasheet matrix rates: least ms per layer, density 1 (0.3)")
    for work in _WORKLOADS:
        scores = work.batch * work.heads * work.tokens**2
        for qk, pv in (("16", "16"), ("int8", "16"), ("int8", "int8"), ("int8", "fp8")):
            kind, where = Kind(work.head_dim, BLOCK, qk, pv), "in CUDA"
            if _in_cuda(kind) and hopper.unavailable() is None:
                report = hopper_report(kind)
            else:
                kind, where = replace(kind, block_q=128 if work.head_dim == 64 else 64), ""
                report = forward_report("sm90", kind, configs.config("sm90", kind))
            per_score = report.per_score or 0.0
            matrix = sum(2 * scores * work.head_dim / _MATRIX_RATE[width] for width in (qk, pv))
            terms = {
                "matrix": matrix,
                "exp2": scores / (16 * _SMS * _CLOCK),
                "issue": scores * per_score / (128 * _SMS * _CLOCK),
            }
            times = "  ".join(f"{key} {1e3 * value:6.2f} ({300 * value:5.2f})" for key, value in terms.items())
            name = f"{work.name:12} D {work.head_dim:3} {kind.block_q:3} x 64 {qk:>4}/{pv:<4} {where:7}"
            print(f"{name} {per_score:5.2f} instructions  {times}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this one; may be repeated")
    parser.add_argument("--all", action="store_true", help="all formats, and variants of the forward")
    parser.add_argument("--roofline", action="store_true", help="instructions beside the lower bounds of two workloads")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    arguments = parser.parse_args()
    if arguments.roofline:
        roofline()
        return 0
    start, wanted = time.perf_counter(), jobs(arguments.target or TARGETS, arguments.all)
    wrong = 0
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for line, found in pool.map(compiled_row, wanted):
            print(line, flush=True)
            wrong += bool(found)
    seconds = time.perf_counter() - start
    print(f"Triton {triton.__version__}: {len(wanted)} kernels, {wrong} not to be shipped, {seconds:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
