"""Checks the distributions in dist/ and installs them into a fresh environment, one part after another.

The library alone has to import and attend; then come the plug-ins of servers, its extras, and the lab with its models.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLUG_INS = ("paroattn_sglang", "paroattn_vllm_omni")
# With the most megabytes of their wheels.
PROJECTS = {"paroattn": 2.0, "paroattn_lab": 3.0, "paroattn_models": 95.0, **dict.fromkeys(PLUG_INS, 0.1)}
ATTEND = (
    "import torch, paroattn; q = torch.randn(1, 2, 200, 64); "
    "mask = torch.eye(4, dtype=torch.bool).expand(2, 4, 4); "
    "print(paroattn.attention(q, q, q, block_mask=mask, precision='int8').shape, paroattn.backends()); "
)


def run(*command: str | Path, expected: int = 0) -> str:
    answer = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)
    if answer.returncode != expected:
        sys.exit(f"{' '.join(map(str, command))}\n{answer.stdout}{answer.stderr}")
    return answer.stdout + answer.stderr


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        wheels, environment = ROOT / "dist", Path(folder) / "environment"
        for project, limit in PROJECTS.items():
            (wheel,) = wheels.glob(f"{project}-*.whl")
            size = wheel.stat().st_size / 1e6
            weights = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".safetensors")]
            print(f"{wheel.name}: {size:.2f} MB, {len(weights)} files of weights")
            if size > limit or bool(weights) != (project == "paroattn_models"):
                sys.exit(f"{wheel.name}: expected at most {limit} MB, and weights in the models' wheel only")
        run(sys.executable, "-m", "twine", "check", "--strict", *wheels.glob("*.whl"), *wheels.glob("*.tar.gz"))
        venv.create(environment, with_pip=True)
        python, command = environment / "bin" / "python", environment / "bin" / "paroattn"
        torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
        pip = (python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt")
        find = ("--find-links", wheels)
        run(*pip, torch)
        run(*pip, *find, "paroattn")
        print(run(python, "-c", ATTEND).strip())
        print(run(command, "--help", expected=1).strip())
        for name in PLUG_INS:
            run(*pip, *find, name.replace("_", "-"))
            run(python, "-c", f"import {name}; {name}.register, {name}.report()")
        run(*pip, *find, "paroattn[diffusers]")
        run(python, "-c", "import paroattn; paroattn.apply, paroattn.calibrate, paroattn.observe")
        run(*pip, *find, "paroattn[cli]")
        run(command, "calibrate", "--help")
        print(run(command, "calibrate", expected=2).strip())
        run(*pip, *find, "paroattn[lab]")
        run(command, "demo", "--help")
        run(*pip, "pytest", "hypothesis")
        (sdist,) = wheels.glob("paroattn-0*.tar.gz")
        run("tar", "-xf", sdist, "-C", folder)
        (source,) = (path for path in Path(folder).iterdir() if path.name.startswith("paroattn-"))
        settings = ("-c", source / "pyproject.toml")
        print(run(python, "-m", "pytest", *settings, source / "tests" / "test_attention.py").strip())


if __name__ == "__main__":
    main()
