"""A stand-in for ComfyUI, written from its contract: what a node pack sees of it, and no more.

Attention functions that look for an override, the model patcher with wrappers, callbacks and patches, the executor of
wrappers, folders, the schema of nodes, and sampling of flow models with conditioning that is batched, apart, in
threads, of an area or in windows.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
import threading
import types
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F


class WrappersMP:
    OUTER_SAMPLE = "outer_sample"
    CALC_COND_BATCH = "calc_cond_batch"
    DIFFUSION_MODEL = "diffusion_model"


class CallbacksMP:
    ON_CLEANUP = "on_cleanup"
    ON_PREPARE_STATE = "on_prepare_state"


class WrapperExecutor:
    """Calls wrappers from the outermost to the original function; each calls the rest as `executor(...)`."""

    def __init__(self, original, class_obj, wrappers):
        self.original, self.class_obj, self._wrappers = original, class_obj, list(wrappers)

    def __call__(self, *args, **kwargs):
        if not self._wrappers:
            return self.original(*args, **kwargs)
        first, *rest = self._wrappers
        return first(WrapperExecutor(self.original, self.class_obj, rest), *args, **kwargs)


def wrappers_of(kind, transformer_options):
    own = transformer_options.get("wrappers", {}).get(kind, {})
    return [wrapper for wrappers in own.values() for wrapper in wrappers]


def wrap_attn(func):
    @functools.wraps(func)
    def outer(*args, **kwargs):
        if kwargs.pop("_inside_attn_wrapper", False):
            return func(*args, **kwargs)
        override = (kwargs.get("transformer_options") or {}).get("optimized_attention_override")
        if override is None:
            return func(*args, **kwargs)
        return override(outer, *args, **kwargs, _inside_attn_wrapper=True)

    return outer


@wrap_attn
def optimized_attention(
    q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, scale=None, **others
):
    if not skip_reshape:
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if mask is not None:
        mask = mask[None] if mask.ndim == 2 else mask
        mask = mask[:, None] if mask.ndim == 3 else mask
    output = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    return output if skip_output_reshape else output.transpose(1, 2).flatten(2)


class ModelSampling:
    """Flow: sigma runs from 1 to 0, shifted towards 1."""

    def __init__(self, shift=3.0):
        self.shift = shift

    def percent_to_sigma(self, percent):
        rest = 1.0 - percent
        return self.shift * rest / (1 + (self.shift - 1) * rest)


class BaseModel:
    def __init__(self, diffusion_model, multiplier=1000.0):
        self.diffusion_model = diffusion_model
        self.model_sampling = ModelSampling()
        self.multiplier = multiplier
        self.dtype = torch.float32

    def apply_model(self, x, sigma, transformer_options, **conditioning):
        conditioning = {
            name: value.to(self.dtype) if torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in conditioning.items()
        }
        output = self.diffusion_model(
            x.to(self.dtype), sigma * self.multiplier, transformer_options=dict(transformer_options), **conditioning
        ).float()
        return x - output * sigma.view(-1, *[1] * (x.ndim - 1))


class ModelPatcher:
    def __init__(self, model):
        self.model = model
        self.model_options = {"transformer_options": {}}
        self.wrappers, self.callbacks = {}, {}

    def clone(self):
        other = ModelPatcher(self.model)
        other.model_options = _copied(self.model_options)
        other.wrappers, other.callbacks = _copied(self.wrappers), _copied(self.callbacks)
        return other

    def get_model_object(self, name):
        return functools.reduce(getattr, name.split("."), self.model)

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def get_wrappers(self, kind, key):
        return self.wrappers.get(kind, {}).get(key, [])

    def add_callback_with_key(self, kind, key, callback):
        self.callbacks.setdefault(kind, {}).setdefault(key, []).append(callback)

    def set_model_patch_replace(self, patch, name, block, number):
        own = self.model_options["transformer_options"].setdefault("patches_replace", {})
        own.setdefault(name, {})[block, number] = patch

    def call(self, kind, *args):
        for callbacks in self.callbacks.get(kind, {}).values():
            for callback in callbacks:
                callback(self, *args)


def _copied(nested):
    if isinstance(nested, dict):
        return {key: _copied(value) for key, value in nested.items()}
    return list(nested) if isinstance(nested, list) else nested


@dataclass
class Sampling:
    """How `sample` evaluates the model: together, or in threads, or in windows of frames."""

    batched: bool = True
    threads: bool = False
    window: int | None = None


def sample(patcher, noise, sigmas, positive, negative=None, cfg=1.0, second_order=False, how=None):
    """Euler steps, or Heun's, in which sigmas between those of the schedule are visited, too."""
    how = how or Sampling()
    options = _copied(patcher.model_options)
    options["transformer_options"]["wrappers"] = patcher.wrappers
    options["transformer_options"]["sample_sigmas"] = sigmas
    conds = [positive] if negative is None else [positive, negative]

    def outer_sample(noise, latent_image, sampler, sigmas, denoise_mask=None):
        x = noise
        for sigma, following in pairwise(sigmas):

            def denoised(x, at):
                outputs = _evaluate(patcher, conds, x, at.view(1), options, how)
                return outputs[0] if len(outputs) == 1 else outputs[1] + (outputs[0] - outputs[1]) * cfg

            slope = (x - denoised(x, sigma)) / sigma
            if second_order and following > 0:
                middle = (sigma * following) ** 0.5
                slope = (x + (middle - sigma) * slope - denoised(x + (middle - sigma) * slope, middle)) / middle
            x = x + (following - sigma) * slope
        return x

    try:
        executor = WrapperExecutor(
            outer_sample, patcher, wrappers_of(WrappersMP.OUTER_SAMPLE, options["transformer_options"])
        )
        return executor(noise, None, None, sigmas)
    finally:
        patcher.call(CallbacksMP.ON_CLEANUP)


def _evaluate(patcher, conds, x, sigma, options, how):
    if how.window is None:
        return _outer(patcher, conds, x, sigma, options, how)
    outputs = [torch.zeros_like(x) for _ in conds]
    for start in range(0, x.shape[2], how.window):
        own = _copied(options)
        own["transformer_options"]["context_window"] = (start, start + how.window)
        part = slice(start, start + how.window)
        for output, found in zip(outputs, _outer(patcher, conds, x[:, :, part], sigma, own, how), strict=True):
            output[:, :, part] = found
    return outputs


def _outer(patcher, conds, x, sigma, options, how):
    def calc_cond_batch(model, conds, x_in, timestep, model_options):
        patcher.call(CallbacksMP.ON_PREPARE_STATE, timestep, model_options)
        runs = [_Run(cond, x_in) for cond in conds]
        shapes = {(run.x.shape, run.kind) for run in runs}
        groups = [runs] if how.batched and len(shapes) == 1 else [[run] for run in runs]
        if how.threads:
            threads = [
                threading.Thread(target=_run, args=(copy.deepcopy(model), own, timestep, model_options))
                for own in groups
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        else:
            for own in groups:
                _run(model, own, timestep, model_options)
        return [run.output(x_in) for run in runs]

    wrappers = wrappers_of(WrappersMP.CALC_COND_BATCH, options["transformer_options"])
    return WrapperExecutor(calc_cond_batch, None, wrappers)(patcher.model, conds, x, sigma, options)


class _Run:
    """One conditioning: [[text, {...}]], of which "area" (height, width, y, x) cuts the latent."""

    def __init__(self, cond, x):
        ((self.text, extra),) = cond
        self.extra = dict(extra)
        self.area = self.extra.pop("area", None)
        self.x = x
        if self.area is not None:
            height, width, top, left = self.area
            self.x = x[..., top : top + height, left : left + width]
        self.kind = (self.text.shape, tuple(sorted(self.extra)))
        self.found = None

    def output(self, x):
        if self.area is None:
            return self.found
        height, width, top, left = self.area
        whole = torch.zeros_like(x)
        whole[..., top : top + height, left : left + width] = self.found
        return whole


@torch.no_grad()
def _run(model, runs, sigma, options):
    extra = {
        name: torch.cat([run.extra[name] for run in runs]) if isinstance(value, torch.Tensor) else value
        for name, value in runs[0].extra.items()
    }
    found = model.apply_model(
        torch.cat([run.x for run in runs]),
        sigma.repeat(len(runs)),
        {**options["transformer_options"], "sigmas": sigma},
        context=torch.cat([run.text for run in runs]),
        **extra,
    )
    for run, own in zip(runs, found.chunk(len(runs)), strict=True):
        run.found = own


def _schema():
    """`comfy_api.latest`, of which a node pack sees classes that hold their arguments."""

    class Held:
        def __init__(self, *args, **kwargs):
            self.args = args
            self.__dict__.update(kwargs)

    class NodeOutput(Held):
        pass

    def kind(name):
        return type(name, (), {"Input": type("Input", (Held,), {}), "Output": type("Output", (Held,), {})})

    io = types.SimpleNamespace(
        ComfyNode=type("ComfyNode", (), {}),
        Schema=type("Schema", (Held,), {}),
        NodeOutput=NodeOutput,
        Custom=kind,
        **{name: kind(name) for name in ("Model", "Combo", "Boolean", "Float", "Latent", "String")},
    )
    ui = types.SimpleNamespace(PreviewText=type("PreviewText", (Held,), {}))
    return {"ComfyExtension": type("ComfyExtension", (), {}), "io": io, "ui": ui}


def _folders(models):
    known = {}

    def add_model_folder_path(name, path):
        folders, _ = known.setdefault(name, ([], set()))
        if path not in folders:
            folders.append(path)

    def get_filename_list(name):
        folders, extensions = known[name]
        files = [file for folder in folders if os.path.isdir(folder) for file in sorted(os.listdir(folder))]
        return [file for file in files if not extensions or os.path.splitext(file)[1] in extensions]

    def get_full_path(name, file):
        paths = [os.path.join(folder, file) for folder in known[name][0]]
        return next((path for path in paths if os.path.isfile(path)), None)

    return {
        "models_dir": models,
        "folder_names_and_paths": known,
        "add_model_folder_path": add_model_folder_path,
        "get_filename_list": get_filename_list,
        "get_full_path": get_full_path,
    }


def install(models):
    """Put the stand-in where `import comfy` finds it; `models` is its models folder."""
    patcher_extension = {"WrappersMP": WrappersMP, "CallbacksMP": CallbacksMP, "WrapperExecutor": WrapperExecutor}
    for name, content in (
        ("comfy", {}),
        ("comfy.patcher_extension", patcher_extension),
        ("comfy_api", {}),
        ("comfy_api.latest", _schema()),
        ("folder_paths", _folders(models)),
    ):
        module = types.ModuleType(name)
        vars(module).update(content)
        sys.modules[name] = module
