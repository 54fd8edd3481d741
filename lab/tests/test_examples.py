"""The example scripts run as they are and print what they promise."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.models
EXAMPLES = Path(__file__).parents[2] / "examples"
PROMISED = {
    "calibrate_and_generate.py": r"density 0\.50: PSNR (\d+\.\d) dB against full attention",
    "operator_in_your_model.py": r"density 1: relative error (0\.0[01]\d+)\ndensity 0\.75: .*\ndensity 0\.5: ",
    "compare_two_plans.py": r"paroattn over the paper's: ([+-]\d+\.\d+) dB, standard error",
}


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == PROMISED.keys()


@pytest.mark.parametrize("name", PROMISED)
def test_examples_run(name, tmp_path):
    command = [sys.executable, str(EXAMPLES / name)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert re.search(PROMISED[name], answer.stdout), answer.stdout
    assert list(tmp_path.iterdir()) == []
