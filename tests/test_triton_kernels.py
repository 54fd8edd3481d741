"""Every shipped configuration compiles ahead of time for every target; `make kernels` compiles all variants."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parent.parent / "lab" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import triton_kernels  # noqa: E402

from paroattn.ops.gpu import configs, hopper  # noqa: E402
from paroattn.ops.gpu.configs import Config, Kind  # noqa: E402
from paroattn.ops.gpu.device import SHARED_MEMORY  # noqa: E402

pytestmark = pytest.mark.kernels


def test_the_common_formats_compile_for_every_target():
    """Zero spills, the expected matrix instruction, shared memory within the target's."""
    command = [sys.executable, BENCHMARKS / "triton_kernels.py"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, (
        "\n".join(line for line in answer.stdout.splitlines() if "<-" in line) + answer.stderr
    )


@pytest.mark.parametrize(("pv", "limit"), [("int8", 9.0), ("fp8", 8.2)])
def test_the_main_loop_on_hopper_is_short(pv, limit):
    kind = Kind(64, 128, "int8", pv)
    report = triton_kernels.forward_report("sm90", kind, configs.config("sm90", kind))
    assert 5 < report.per_score <= limit


@pytest.mark.skipif(hopper.unavailable() is not None, reason=f"{hopper.unavailable()}")
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("pv", ["int8", "fp8"])
def test_the_cuda_kernel_compiles_without_spills_for_so_many_programs_as_it_says(width, pv):
    report = triton_kernels.hopper_report(Kind(width, 64, "int8", pv))
    assert not report.spills
    assert {"int8": {"IGMMA"}, "fp8": {"IGMMA", "QGMMA"}}[pv] == set(report.matrix)
    assert report.registers * hopper.THREADS * hopper.PROGRAMS[width] <= 2**16
    # A program takes 1 KB of shared memory more than it asks for.
    assert (report.shared + 1024) * hopper.PROGRAMS[width] <= SHARED_MEMORY["sm90"]
    # Triton's loop takes 9.4 and 8.7 with D 64, 10.8 and 11.8 with D 128; both ways to copy a step are counted here.
    assert report.per_score < {"int8": {64: 8.5, 128: 9.6}, "fp8": {64: 7.2, 128: 8.6}}[pv][width]


def test_faults_are_found():
    """A configuration that spills, and one without its matrix instruction."""
    kind = Kind(128, 128, "int8", "int8")  # is not shipped
    spilling = triton_kernels.forward_report("sm90", kind, Config(4, 3, 128, swapped=True, asm=True))
    assert any("spills" in fault for fault in triton_kernels.faults("sm90", kind, spilling))
    assert "no HGMMA" in triton_kernels.faults("sm90", Kind(128, 128, "16", "int8"), spilling)
    assert any("shared memory" in fault for fault in triton_kernels.faults("sm86", kind, spilling))
