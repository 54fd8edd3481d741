"""The tables of README and docs say what the records say."""

import json
import re
import subprocess
import sys
from pathlib import Path

import update_tables as tables

from paroattn.integrations.descriptors import DESCRIPTORS

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "update_tables.py"


def test_tables_match_their_records():
    answer = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout


def test_every_known_model_has_a_record():
    lines = (tables.RECORDS / "models.jsonl").read_text().splitlines()
    found = {record["class"]: (record["others"], record["others_ask"]) for record in map(json.loads, lines)}
    assert found == {name: (own.text, own.text_asks) for name, own in DESCRIPTORS.items()}
    assert f"[{len(found)} transformers]" in (tables.ROOT / "README.md").read_text()


def test_a_table_that_was_edited_is_found():
    """Edits the first figure of every table, one after the other."""
    count = 0
    for page in tables.PAGES:
        for match in tables.TABLE.finditer(page.read_text()):
            figure = re.search(r"\| (\d+)", match[0])
            edited = f"{match[0][: figure.end()]}9{match[0][figure.end() :]}"
            assert tables.updated(edited) == match[0]
            count += 1
    assert count >= 9


def test_every_mark_of_records_is_understood():
    for page in tables.PAGES:
        text = page.read_text()
        assert text.count("<!-- records:") == len(tables.TABLE.findall(text)), page
