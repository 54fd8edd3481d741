"""`paroattn generate --prompts`: each prompt is made once, by whichever process, and a killed run continues."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from click.testing import CliRunner

from paroattn.cli import many
from paroattn.cli.group import command_line
from paroattn.errors import InputError

PROMPTS = ["a slow red two over the cat", "a fast white seven over the cat", "a red one over the cat", "a two"]
SMALL = ["--model", "moving-digits", "--steps", "1", "--device", "cpu"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def run(*arguments):
    return CliRunner().invoke(command_line, ["generate", *map(str, arguments), *SMALL])


def command(prompts, folder):
    return ["-m", "paroattn", "generate", "--prompts", str(prompts), "--output-dir", str(folder), *SMALL]


def made(folder):
    return sorted(path.name for path in folder.glob("[0-9]*.mp4"))


NAMES = [
    "0001-a-slow-red-two-over-the-cat.mp4",
    "0002-a-fast-white-seven-over-the-cat.mp4",
    "0003-a-red-one-over-the-cat.mp4",
    "0004-a-two.mp4",
]


def test_two_processes_make_each_output_once(prompts, tmp_path):
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-endpoint", "localhost:0"]
    launch += ["--rdzv-backend", "c10d", *command(prompts, tmp_path / "out")]
    result = subprocess.run([sys.executable, *launch], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert made(tmp_path / "out") == NAMES
    lines = [line for line in result.stdout.splitlines() if ": wrote " in line]
    assert len(lines) == len(NAMES)
    assert {line.split(":")[0] for line in lines} <= {"rank 0", "rank 1"}  # a late one may find nothing left
    assert not list((tmp_path / "out").glob(".0*"))  # locks


def test_seeds_count_and_outputs_are_those_of_single_runs(prompts, tmp_path):
    assert run("--prompts", prompts, "--output-dir", tmp_path / "out", "--seed", 5).exit_code == 0
    for number in (0, 2):
        path = tmp_path / f"{number}.mp4"
        assert run("--prompt", PROMPTS[number], "--seed", 5 + number, "--output", path).exit_code == 0
        assert path.read_bytes() == (tmp_path / "out" / NAMES[number]).read_bytes()


def test_a_killed_run_continues(prompts, tmp_path):
    """Killed while it holds a lock and has begun an output; what it finished is not made again."""
    folder = tmp_path / "out"
    process = subprocess.Popen([sys.executable, *command(prompts, folder)], stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 200
        while not (folder.is_dir() and made(folder)):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = {name: (folder / name).stat().st_mtime_ns for name in made(folder)}
    result = run("--prompts", prompts, "--output-dir", folder)
    assert result.exit_code == 0
    assert made(folder) == NAMES
    assert result.output.count("wrote") == len(NAMES) - len(before)
    assert not list(folder.glob(".0*"))  # what was begun, and locks
    assert all((folder / name).stat().st_mtime_ns == then for name, then in before.items())


def test_what_another_process_works_at_is_waited_for_and_made_if_it_is_lost(tmp_path, monkeypatch):
    """In this process alone: another one holds a lock and lets it go without an output."""
    outputs = many.outputs_of(["a", "b"], tmp_path, ".txt", 0)
    other = many.FileLock(tmp_path / ".0001-a.txt.lock")
    other.acquire()
    order = []

    def make(output):
        order.append(output.prompt)
        output.path.write_text(output.prompt)
        other.release()

    assert many.make_all(outputs, make) == 0
    assert order == ["b", "a"]


def test_one_prompt_that_fails_leaves_the_others(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a two\na purple unicorn\na red one over the cat\n")
    result = run("--prompts", path, "--output-dir", tmp_path / "out")
    assert result.exit_code != 0
    assert "0002-a-purple-unicorn.mp4 failed: prompt has unknown words" in result.output
    assert "Error: 1 of 3 prompts failed" in result.output
    assert made(tmp_path / "out") == ["0001-a-two.mp4", "0003-a-red-one-over-the-cat.mp4"]


@pytest.mark.parametrize(("change", "message"), [(["--seed", "1"], "seed 0, not 1"), (["--frames", "9"], "num_frames")])
def test_outputs_of_other_settings_are_refused(prompts, tmp_path, change, message):
    many.check_settings(tmp_path / "out", {"seed": 0, "num_frames": None})
    result = run("--prompts", prompts, "--output-dir", tmp_path / "out", *change)
    assert result.exit_code != 0
    assert message in result.output
    assert "choose another --output-dir" in result.output


def test_a_missing_or_empty_file_of_prompts(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    for name, message in (("missing.txt", "is no file"), ("empty.txt", "holds no prompt")):
        result = run("--prompts", tmp_path / name, "--output-dir", tmp_path / "out")
        assert result.exit_code != 0
        assert message in result.output


def test_ranks_come_from_the_environment(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert many.rank_and_count() == (0, 1)
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert many.rank_and_count() == (3, 8)
    assert many.own_device() == ("cuda:1" if torch.cuda.is_available() else None)
    assert os.environ["LOCAL_RANK"] == "1"


def test_settings_are_compared_by_value(tmp_path):
    many.check_settings(tmp_path, {"seed": 0})
    many.check_settings(tmp_path, {"seed": 0})
    with pytest.raises(InputError, match="seed 0, not 2"):
        many.check_settings(tmp_path, {"seed": 2})
