"""Every file of tests/data/bad_plans is refused: by the message for its defect, soon, and in little memory."""

import json
import re
import subprocess
import sys

import pytest
from make_bad_plans import DEFECTS, FOLDER, write

from paroattn import Plan, PlanError

PATHS = sorted(FOLDER.glob("*.safetensors"))
MEASURE = """
import json, resource, sys, time
from pathlib import Path
import torch
from paroattn import Plan, PlanError
torch.set_num_threads(2)
Plan.load(sys.argv[1])  # imports, and whatever is made once
found = {}
for path in map(Path, sys.argv[2:]):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    try:
        Plan.load(path)
        found[path.stem] = "loaded"
    except PlanError:
        seconds = time.perf_counter() - start
        growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - path.stat().st_size
        found[path.stem] = [seconds, growth]
print(json.dumps(found))
"""


def pattern(message):
    """The message as a regular expression; ".*" stands for anything."""
    return ".*".join(re.escape(part) for part in message.split(".*"))


def test_there_is_a_file_for_each_defect():
    assert {path.stem for path in PATHS} == DEFECTS.keys()
    assert len(PATHS) >= 40
    assert sum(path.stat().st_size for path in PATHS) < 2_000_000


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_bad_plan_is_refused_by_its_defect(path):
    with pytest.raises(PlanError, match=pattern(DEFECTS[path.stem][1])) as caught:
        Plan.load(path)
    message = str(caught.value)
    assert message.startswith(repr(str(path)))
    assert len(message.splitlines()) == 1
    assert len(message) < len(str(path)) + 600


def test_the_script_still_makes_these_defects(tmp_path):
    """From today's plan and with today's zstandard, whose bytes may be others."""
    write(tmp_path)
    for name, (_, message) in DEFECTS.items():
        with pytest.raises(PlanError, match=pattern(message)):
            Plan.load(tmp_path / f"{name}.safetensors")


def test_each_is_refused_within_a_second_and_100_mb(tmp_path):
    """In a process of its own: its greatest memory so far can only grow."""
    from plan_files import small_plan

    small_plan().save(tmp_path / "good")
    command = [sys.executable, "-c", MEASURE, tmp_path / "good", *PATHS]
    measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert measured.keys() == DEFECTS.keys()
    assert "loaded" not in measured.values()
    slow = {name: seconds for name, (seconds, _) in measured.items() if seconds > 1}
    large = {name: growth for name, (_, growth) in measured.items() if growth > 100e6}
    assert not slow
    assert not large
