"""What a calibration is said to take before most of it has begun."""

import re
from types import SimpleNamespace

import pytest
import tiny
import torch

import paroattn
from paroattn.calibration import forecast
from paroattn.calibration.forecast import Forecast
from paroattn.calibration.run import QUICK, THOROUGH


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(time=0.0)
    monkeypatch.setattr(forecast, "now", lambda device: clock.time)
    return clock


def told(clock, sampling, *, order_steps, steps=4, effects=True, prompts=2, seconds=10.0, compared=(5.0, 1.0, 1.0)):
    """What is said in a generation whose steps, of two forward calls, take so many seconds, comparisons on top."""
    lines = []
    pipeline = SimpleNamespace(place=(torch.device("cpu"), torch.float32), transformers=[None])
    run = SimpleNamespace(num_steps=steps, prompt_count=prompts, forwards=0, pipeline=pipeline, say=lines.append)
    own = Forecast(run, sampling, lambda steps: order_steps, most_buckets=4, effects=effects)
    for step in range(steps):
        run.forwards = 2 * step + 1  # a step begins with its first call
        own.follow(step)
        for duration in compared if step in order_steps else ():
            with own.comparing(work=2.9):
                clock.time += duration
        clock.time += seconds
    return lines


def test_parts_are_those_of_all_prompts_and_passes(clock):
    (line,) = told(clock, QUICK, order_steps=[2])
    # 4 for kernels, then 3 steps of 10 and 3 layers of 1 for each prompt. All 4 steps for each, looked at with 0.725 of
    # a layer's attention. Backward passes of one call in 2 buckets; 4, 2 and 1 steps from buckets 0, 2 and 3 on.
    orders, costs, effects = 4 + 2 * 33, 2 * (40 + 4 * 3 / 2.9 * 0.725), 2 * 3.5 * 5 + (4 + 2 + 1) * 10
    assert line == (
        f"calibration will take about {orders + costs + effects:.0f} s: "
        f"orders {orders:.0f}, costs {costs:.0f}, effects {effects:.0f}"
    )


def test_all_is_looked_at_in_a_thorough_one_and_effects_may_be_left_out(clock):
    (line,) = told(clock, THOROUGH, order_steps=[1], steps=8, effects=False)
    orders, costs = 4 + 2 * (80 + 3), 2 * (80 + 8 * 3 / 2.9 * 5.6)
    assert line == f"calibration will take about {orders + costs:.0f} s: orders {orders:.0f}, costs {costs:.0f}"


def test_nothing_is_said_before_a_step_without_comparisons_was_timed(clock):
    assert not told(clock, QUICK, order_steps=[0, 1, 2, 3])
    assert not told(clock, QUICK, order_steps=[])
    assert len(told(clock, QUICK, order_steps=[0])) == 1


def test_calibrate_says_it_before_it_says_where_time_went(capsys):
    paroattn.calibrate(tiny.tiny_wan(), [tiny.call_arguments()], density=0.75)
    starts = ("calibration will", "calibration measured")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(starts)]
    assert re.fullmatch(r"calibration will take about \d+ s: orders \d+, costs \d+, effects \d+", lines[0])
    assert lines[1].startswith("calibration measured for")
