"""What every record has in common: where and with what it was measured, and how it is written."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import diffusers
import torch

import paroattn
from paroattn.files import write_atomically


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Machine, threads, versions and commit, and the GPU if the device is one; no host name."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device is not None and device.type == "cuda" else {}
    return {
        **gpu,
        "machine": _processor(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "paroattn": paroattn.__version__,
        },
        "commit": COMMIT,
    }


def write_records(records: list[dict[str, Any]], path: Path) -> None:
    """Write records as JSON lines, whole or not at all; a file that exists is replaced."""
    lines = "".join(json.dumps(record, sort_keys=True, allow_nan=False) + "\n" for record in records)
    write_atomically(path, lambda temporary: temporary.write_text(lines))


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the checkout that this package is imported from, if it is one."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:  # git is not installed
        return None
    return answer.stdout.strip() or None


COMMIT = _commit()  # when the code was loaded: a long run may outlive the state of the checkout
