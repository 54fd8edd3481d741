"""The tables of README and docs say what the records say."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "update_tables.py"


@pytest.fixture(scope="module")
def tables():
    sys.path.insert(0, str(SCRIPT.parent))
    yield importlib.import_module("update_tables")
    sys.path.remove(str(SCRIPT.parent))


def test_tables_match_their_records():
    answer = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout


def test_a_table_that_was_edited_is_found(tables):
    """Edits the first figure of every table, one after the other."""
    count = 0
    for page in tables.PAGES:
        for match in tables.TABLE.finditer(page.read_text()):
            figure = re.search(r"\| (\d+\.\d+)", match[0])
            edited = f"{match[0][: figure.end()]}9{match[0][figure.end() :]}"
            assert tables.updated(edited) == match[0]
            count += 1
    assert count >= 9


def test_every_mark_of_records_is_understood(tables):
    for page in tables.PAGES:
        text = page.read_text()
        assert text.count("<!-- records:") == len(tables.TABLE.findall(text)), page
