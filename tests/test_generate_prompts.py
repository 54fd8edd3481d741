"""`paroattn generate --prompts`: each prompt is made once, by whichever process, and a killed run continues."""

import os
import signal
import subprocess
import sys
import threading
import time

import click
import pytest
import torch
from click.testing import CliRunner

from paroattn.cli import many
from paroattn.cli.group import command_line
from paroattn.errors import InputError, PlanError

PROMPTS = ["a slow red two over the cat", "a fast white seven over the cat", "a red one over the cat", "a two"]
SIZE = ["--height", "32", "--width", "32", "--frames", "5", "--steps", "1"]
SMALL = ["--model", "moving-digits", "--device", "cpu", *SIZE]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def run(*arguments):
    return CliRunner().invoke(command_line, ["generate", *SMALL, *map(str, arguments)])


def command(prompts, folder):
    return ["-m", "paroattn", "generate", "--prompts", str(prompts), "--output-dir", str(folder), *SMALL]


def wait_until(condition, process):
    """Until a condition holds; a process has to run meanwhile."""
    end = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < end
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)


@pytest.fixture
def start(prompts):
    """Starts a run of these prompts in the background, which does not outlive the test."""
    processes = []

    def started(folder, **environment):
        process = subprocess.Popen(
            [sys.executable, *command(prompts, folder)],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
        return process

    yield started
    for process in processes:
        process.kill()
        process.communicate()


def hidden(folder):
    return sorted(path.name for path in folder.glob(".*") if path.name != ".settings.json.lock")


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
    assert {line.split(":")[0] for line in lines} <= {"rank 0", "rank 1"}  # one that loads fast may make all
    assert len([line for line in result.stdout.splitlines() if f"; {len(NAMES)} are in" in line]) == 2
    assert not hidden(tmp_path / "out")  # locks


def test_seeds_count_and_outputs_are_those_of_single_runs(prompts, tmp_path):
    assert run("--prompts", prompts, "--output-dir", tmp_path / "out", "--seed", 5).exit_code == 0
    for number in (0, 2):
        path = tmp_path / f"{number}.mp4"
        assert run("--prompt", PROMPTS[number], "--seed", 5 + number, "--output", path).exit_code == 0
        assert path.read_bytes() == (tmp_path / "out" / NAMES[number]).read_bytes()


def test_a_killed_run_continues(prompts, tmp_path, start):
    """Killed while it holds a lock and has begun an output; what it finished is not made again."""
    folder = tmp_path / "out"
    process = start(folder)
    wait_until(lambda: folder.is_dir() and made(folder), process)
    process.kill()
    process.wait()
    before = {name: (folder / name).stat().st_mtime_ns for name in made(folder)}
    result = run("--prompts", prompts, "--output-dir", folder)
    assert result.exit_code == 0
    assert made(folder) == NAMES
    assert result.output.count("wrote") == len(NAMES) - len(before)
    assert not hidden(folder)  # what was begun, and locks
    assert all((folder / name).stat().st_mtime_ns == then for name, then in before.items())


def test_prompts_of_a_lost_process_are_made_by_the_other(tmp_path, start):
    """Rank 0 is stopped and then killed at its first prompt, without torchrun, which would end rank 1, too."""
    folder = tmp_path / "out"
    slow = start(folder, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")
    wait_until((folder / f".{NAMES[0]}.lock").exists, slow)
    slow.send_signal(signal.SIGSTOP)
    other = start(folder, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    wait_until(lambda: made(folder) == NAMES[1:], other)
    slow.kill()
    output, _ = other.communicate(timeout=200)
    assert other.returncode == 0, output
    assert made(folder) == NAMES
    assert f"rank 1: wrote {folder / NAMES[0]} (4 of 4)" in output
    assert not hidden(folder)  # the lost process' own, too


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

    assert many.make_all(outputs, make) == 2
    assert order == ["b", "a"]


def test_what_fails_here_is_left_to_others_before_this_process_ends(tmp_path, capsys):
    """A process that ends with an error makes torchrun end the others, which may still make it."""
    outputs = many.outputs_of(["a", "b"], tmp_path, ".txt", 0)
    entered = threading.Event()

    def other():
        with many.at_work(tmp_path):
            entered.set()
            time.sleep(0.5)
            many.make_all(outputs, lambda output: output.path.write_text(output.prompt))

    def broken(output):
        raise RuntimeError("GPU is lost")

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait()
    many.finish(outputs, tmp_path, many.make_all(outputs, broken))
    assert "made 0 of 2 outputs here; 2 are in" in capsys.readouterr().out
    thread.join()


def test_a_plan_that_does_not_fit_ends_all_at_once(tmp_path):
    """It is not about the prompt; nor is a full disk."""
    outputs = many.outputs_of(["a", "b"], tmp_path, ".txt", 0)
    order = []

    def make(output):
        order.append(output.prompt)
        raise PlanError("plan is for another grid")

    with pytest.raises(PlanError):
        many.make_all(outputs, make)
    assert order == ["a"]


def test_each_line_has_an_output_even_if_it_is_there_twice(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# two seeds\na two\n\na two\n")
    assert run("--prompts", path, "--output-dir", tmp_path / "out").exit_code == 0
    assert made(tmp_path / "out") == ["0001-a-two.mp4", "0002-a-two.mp4"]
    assert len({(tmp_path / "out" / name).read_bytes() for name in made(tmp_path / "out")}) == 2


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a cat.", "0001-a-cat.mp4"),
        ("!?", "0001.mp4"),
        ("a " * 60, "0001-" + "a-" * 29 + "a.mp4"),
        ("../x", "0001-x.mp4"),
    ],
)
def test_names_of_outputs(tmp_path, prompt, name):
    assert many.outputs_of([prompt], tmp_path, ".mp4", 0)[0].path == tmp_path / name


def test_one_prompt_that_fails_leaves_the_others(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a two\na purple unicorn\na red one over the cat\n")
    result = run("--prompts", path, "--output-dir", tmp_path / "out")
    assert result.exit_code != 0
    assert "0002-a-purple-unicorn.mp4 failed: prompt has unknown words" in result.output
    assert "Error: 1 of 3 prompts failed" in result.output
    assert made(tmp_path / "out") == ["0001-a-two.mp4", "0003-a-red-one-over-the-cat.mp4"]


@pytest.mark.parametrize(
    ("change", "message"), [(["--seed", "1"], "seed 0, not 1"), (["--frames", "9"], "num_frames 5, not 9")]
)
def test_outputs_of_other_settings_are_refused(prompts, tmp_path, change, message):
    (tmp_path / "out").mkdir()
    many.note_settings(tmp_path / "out", PROMPTS, {"seed": 0, "num_frames": 5})
    result = run("--prompts", prompts, "--output-dir", tmp_path / "out", *change)
    assert result.exit_code == 2
    assert message in result.output
    assert "choose another --output-dir" in result.output
    assert len(result.output.splitlines()) == 1


def test_a_missing_or_empty_file_of_prompts(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    for name, message in (("missing.txt", "is no file"), ("empty.txt", "holds no prompt")):
        result = run("--prompts", tmp_path / name, "--output-dir", tmp_path / "out")
        assert result.exit_code != 0
        assert message in result.output


def test_several_processes_make_no_single_prompt(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run("--prompt", "a two")
    assert result.exit_code == 2
    assert "expected --prompts" in result.output


def test_ranks_and_gpus_come_from_the_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert many.rank_and_count() == (0, 1)
    assert many.own_device(None) is None
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert many.rank_and_count() == (3, 8)
    assert [many.own_device(device) for device in (None, "cuda", "cpu", "cuda:0")] == [
        "cuda:1",
        "cuda:1",
        "cpu",
        "cuda:0",
    ]
    assert chosen == [1, 1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(click.UsageError, match="expected --nproc-per-node 2 or less"):
        many.own_device(None)


def test_a_folder_goes_with_its_prompts_and_settings(tmp_path):
    long = "a harbour at dawn, " * 5
    many.note_settings(tmp_path, [long + "red", "b"], {"seed": 0})
    many.note_settings(tmp_path, [long + "red"], {"seed": 0})
    many.note_settings(tmp_path, [long + "red", "b", "c"], {"seed": 0})
    with pytest.raises(InputError, match="seed 0, not 2"):
        many.check_settings(tmp_path, [long + "red"], {"seed": 2})
    with pytest.raises(InputError, match="prompt 1 .*red', not .*blue'"):  # of the same file name
        many.check_settings(tmp_path, [long + "blue"], {"seed": 0})
    with pytest.raises(InputError, match="prompt 3 'c', not 'd'"):
        many.note_settings(tmp_path, [long + "red", "b", "d"], {"seed": 0})


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_folder_with_a_file_of_that_name_is_refused(tmp_path, content):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(InputError, match="does not say what outputs beside it were made with"):
        many.check_settings(tmp_path, ["a"], {"seed": 0})
