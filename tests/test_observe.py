"""Looking at attention calls."""

import pytest
import tiny
import torch
from attention_inputs import inputs

import paroattn
from paroattn import TokenGrid
from paroattn.integrations.observe import ObservedCall
from paroattn.integrations.rebind import AttentionCall
from paroattn.integrations.schedule import Schedule


def test_every_call_is_seen_and_nothing_changes():
    pipe, seen, steps = tiny.tiny_wan(), [], []
    full = tiny.latents(pipe)
    with paroattn.observe(pipe, seen.append, on_step=lambda schedule: steps.append(schedule.step)):
        assert torch.equal(tiny.latents(pipe), full)
    assert torch.equal(tiny.latents(pipe), full)
    assert [(call.step, call.layer) for call in seen] == [
        (step, layer) for step in range(tiny.STEPS) for layer in (0, 1)
    ]
    assert {call.num_steps for call in seen} == {tiny.STEPS}
    assert all(call.grid == tiny.GRID and call.heads == 2 for call in seen)
    assert sorted(set(steps)) == list(range(tiny.STEPS))


def test_what_the_function_returns_takes_the_place_of_the_output():
    pipe = tiny.tiny_wan()
    full = tiny.latents(pipe)
    with paroattn.observe(pipe, lambda call: call.dense() * (call.layer == 0)):
        assert not torch.equal(tiny.latents(pipe), full)
    with paroattn.observe(pipe, lambda call: call.dense()):
        assert torch.equal(tiny.latents(pipe), full)


def test_keys_and_values_that_heads_share_are_repeated():
    query, key, value = (x.transpose(1, 2) for x in inputs(20, heads=4, key_heads=2))
    call = AttentionCall(query, key, value, None, lambda: query, None)
    schedule = Schedule()
    schedule.levels = (1.0,)
    seen = ObservedCall.of(call, 0, schedule, TokenGrid(1, 4, 5))
    (sample,) = seen.samples()
    for head in range(4):
        q, k, v = sample.head(head)
        assert torch.equal(q, query[0, :, head])
        assert torch.equal(k, key[0, :, head // 2])
        assert torch.equal(v, value[0, :, head // 2])


def test_a_pipeline_that_is_taken_over_is_refused():
    pipe = tiny.tiny_wan()
    with paroattn.apply(pipe, precision="int8"), pytest.raises(paroattn.InputError, match="already applied"):
        paroattn.observe(pipe, print)
