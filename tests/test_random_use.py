"""What users do with a pipeline, in random order: each output is that of an oracle which knows every bucket."""

import copy
import functools
import os
import random
import threading
import warnings

import peft
import pytest
import tiny
import tiny_models
import torch

import paroattn
from paroattn.block_mask import block_count, text_blocks
from paroattn.integrations.pipeline import Pipeline
from paroattn.ops import prepare

OPERATIONS = int(os.environ.get("PAROATTN_OPERATIONS", "50"))  # of each of four models
MODELS = {"cogvideox": {"height": 32}, "wan2.2": {"height": 64}, "ltx": {"height": 128}, "qwen": {"height": 16}}


@functools.cache
def model_of(name):
    return next(model for model in tiny_models.MODELS if model.name == name)


@functools.cache
def plan_of(name, number):
    model = model_of(name)
    pipe, blocks = model.pipe(), block_count(model.grid.tokens, 64)
    layers, heads = Pipeline(pipe).identity.layers, Pipeline(pipe).identity.heads
    masks = torch.rand(3, layers, heads, blocks, blocks, generator=torch.Generator().manual_seed(number)) < 0.4
    masks |= torch.eye(blocks, dtype=torch.bool) | text_blocks(model.grid)
    schedule = model.schedule(pipe)
    return tiny.make_plan(pipe, masks, model.grid, (0.0, 1 / 3, 2 / 3), schedule=schedule)


def add_lora(pipe):
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, "lora")


@functools.cache
def oracle(name, number, lora, steps, other_size):
    """Latents of a fresh pipeline, with the plan's operators called by hand (number None: with full attention)."""
    model = model_of(name)
    pipe, changes = model.pipe(), MODELS[name] if other_size else {}
    if lora:
        add_lora(pipe)
    if number is None or other_size:
        return model.latents(pipe, steps, **changes)
    plan = plan_of(name, number)
    calibrated = torch.tensor(plan.schedule)

    def attend(call):
        place = {"device": "cpu", "dtype": call.query.dtype, "tensor_layout": "NHD", "scale": call.scale}
        bucket = (calibrated - call.level).abs().argmin()  # each calibrated step is a bucket
        return prepare(plan.layer(call.layer), **place)(
            call.query, call.key, call.value, bucket=bucket, key_mask=call.key_mask
        )

    with paroattn.observe(pipe, attend):
        return model.latents(pipe, steps)


class User:
    """Does one thing after another with a pipeline, and checks what comes of it."""

    def __init__(self, name, seed):
        self.name, self.model = name, model_of(name)
        self.pipe = self.model.pipe()
        self.random = random.Random(seed)
        self.handle, self.number, self.lora, self.done = None, None, False, []

    def draw(self, pipe=None):
        """A generation, and what has to come of it."""
        steps, other_size = self.random.choice((2, 3, 5)), self.random.random() < 0.3
        changes = MODELS[self.name] if other_size else {}
        expected = oracle(self.name, self.number, self.lora, steps, other_size)
        return functools.partial(self.model.latents, pipe or self.pipe, steps, **changes), expected

    def check(self, pipe=None):
        generate, expected = self.draw(pipe)
        assert torch.equal(generate(), expected), self.done

    def apply(self):
        if self.handle is None:
            self.number = self.random.randrange(2)
            self.handle = paroattn.apply(self.pipe, plan_of(self.name, self.number))
        else:
            with pytest.raises(ValueError, match="already applied"):
                paroattn.apply(self.pipe, precision="int8")

    def remove(self):
        if self.handle is not None:
            self.handle.remove()
            self.handle.remove()
            self.handle = self.number = None
        steps = self.random.choice((2, 3))
        assert torch.equal(self.model.latents(self.pipe, steps), oracle(self.name, None, self.lora, steps, False))

    def apply_between_steps(self):
        """What was begun with full attention goes on sparse; the next generation is the plan's."""
        if self.handle is None and self.name != "qwen":
            number, handles = self.random.randrange(2), []

            def begin(pipe, step, timestep, kwargs):
                if step == 0:
                    handles.append(paroattn.apply(pipe, plan_of(self.name, number)))
                return kwargs

            self.model.latents(self.pipe, 3, callback_on_step_end=begin)
            (self.handle,), self.number = handles, number

    def break_off(self):
        def stop(*_):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.model.latents(self.pipe, 3, callback_on_step_end=stop)

    def exchange_scheduler(self):
        own = self.pipe.scheduler
        self.pipe.scheduler = self.random.choice((copy.deepcopy(own), type(own).from_config(own.config)))

    def use_another_pipeline(self):
        other = copy.copy(self.pipe)
        other.scheduler = copy.deepcopy(self.pipe.scheduler)
        self.check(other)

    def copy_whole(self):
        if self.handle is None:
            self.pipe = copy.deepcopy(self.pipe)
        else:
            with pytest.raises(ValueError, match="cannot be copied"):
                copy.deepcopy(self.pipe.transformer)

    def swap_transformer(self):
        own = self.pipe.transformer
        self.pipe.transformer = self.model.pipe().transformer
        if self.handle is not None:
            with pytest.raises(ValueError, match="was replaced"):
                self.model.latents(self.pipe, 2)
        self.pipe.transformer = own

    def compile(self):
        """By Dynamo alone, whose code computes what Python would; a second time takes it back."""
        transformer = self.pipe.transformer
        torch._dynamo.reset()
        if transformer._compiled_call_impl is None:
            transformer.compile(backend="eager")
        else:
            transformer._compiled_call_impl = None
            if self.handle is not None:  # a handle whose layers were compiled once goes on serving one thread at a time
                self.remove()
                self.apply()
        self.check()

    def use_threads(self):
        if self.pipe.transformer._compiled_call_impl is not None:
            return  # compiled code serves one thread at a time
        count, found, drawn = torch.get_num_threads(), {}, []
        for _ in range(2):
            pipe = copy.copy(self.pipe)
            pipe.scheduler = copy.deepcopy(self.pipe.scheduler)
            drawn.append(self.draw(pipe))

        def run(number):
            torch.set_num_threads(count)  # sums are then in the same order
            found[number] = drawn[number][0]()

        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(found[number], drawn[number][1]) for number in range(2)), self.done

    def load_adapter(self):
        if self.lora:
            self.pipe.transformer.delete_adapters("lora")
        else:
            add_lora(self.pipe)
        self.lora = not self.lora


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_the_oracles_whatever_was_done_before(name):
    user = User(name, seed=sum(map(ord, name)))
    what = [getattr(User, method) for method in vars(User) if not method.startswith("_") and method != "draw"]
    weights = [5 if method in (User.check, User.apply) else 1 for method in what]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(OPERATIONS):
            (operation,) = user.random.choices(what, weights)
            user.done.append(operation.__name__)
            operation(user)
        user.remove()
    assert {"apply", "check", "remove", "use_threads"} <= set(user.done)
    full, first, second = (oracle(name, number, False, 3, False) for number in (None, 0, 1))
    assert not torch.equal(full, first)
    assert not torch.equal(first, second)
