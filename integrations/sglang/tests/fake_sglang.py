"""The parts of SGLang-diffusion that the plug-in meets, after the source of sglang 0.5.23; none of its code.

Each class and function keeps the names, arguments and answers of SGLang's. `install()` makes them importable under
SGLang's module names.
"""

import enum
import functools
import itertools
import pkgutil
import sys
import types
from collections import defaultdict
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any, ClassVar

import torch

ROOT = "sglang.multimodal_gen.runtime"


class AttentionBackendEnum(enum.Enum):
    FA = enum.auto()
    TORCH_SDPA = enum.auto()
    SPARGE_ATTN = enum.auto()
    SOL_ATTN = enum.auto()

    @property
    def is_sparse(self):
        return self.name in ("SPARGE_ATTN", "SOL_ATTN")


class AttentionBackend:
    pass


class AttentionImpl:
    def preprocess_qkv(self, qkv, attn_metadata):
        return qkv

    def postprocess_output(self, output, attn_metadata):
        return output

    def forward_varlen(self, query, key, value, *, cu_seqlens, max_seqlen, cu_seqlens_host=None):
        raise NotImplementedError


class SDPABackend(AttentionBackend):
    @staticmethod
    def get_enum():
        return AttentionBackendEnum.TORCH_SDPA

    @staticmethod
    def get_impl_cls():
        return SDPAImpl


class SDPAImpl(AttentionImpl):
    """SGLang's dense attention; counts its calls."""

    calls = 0

    def __init__(self, num_heads, head_size, causal, softmax_scale, num_kv_heads=None, prefix="", **extra):
        self.causal, self.scale = causal, softmax_scale

    def forward(self, query, key, value, attn_metadata=None):
        type(self).calls += 1
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=self.causal, scale=self.scale
        )
        return output.transpose(1, 2)

    def forward_varlen(self, query, key, value, *, cu_seqlens, max_seqlen, cu_seqlens_host=None):
        bounds = cu_seqlens.tolist()
        parts = [slice(*pair) for pair in itertools.pairwise(bounds)]
        return torch.cat([self.forward(query[None, p], key[None, p], value[None, p])[0] for p in parts])


class SpargeAttentionBackend(SDPABackend):
    """What the name `sparge_attn` stands for without the plug-in."""

    @staticmethod
    def get_enum():
        return AttentionBackendEnum.SPARGE_ATTN


class CudaPlatformBase:
    """SGLang's choice of a class for a name."""

    device_name = "cuda"
    paths = MappingProxyType(
        {
            None: "sdpa.SDPABackend",
            "TORCH_SDPA": "sdpa.SDPABackend",
            "SPARGE_ATTN": "sparge_attn.SpargeAttentionBackend",
        }
    )

    @classmethod
    def get_attn_backend_cls_str(cls, selected_backend, head_size, dtype):
        name = getattr(selected_backend, "name", None)
        if name not in cls.paths:
            raise ValueError(f"Invalid attention backend for {cls.device_name}")
        return f"{ROOT}.layers.attention.backends.{cls.paths[name]}"


class CudaPlatform(CudaPlatformBase):
    pass


class HookType(enum.Enum):
    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"
    REPLACE = "replace"


class HookRegistry:
    """Wraps functions by their dotted names, in the order of registration, also where others imported them."""

    _hooks: ClassVar = defaultdict(list)

    @classmethod
    def register(cls, target, hook, hook_type=HookType.AFTER, *, source=None):
        cls._hooks[target].append((hook_type, hook))

    @classmethod
    def apply_hooks(cls):
        for target, hooks in cls._hooks.items():
            owner_path, name = target.rsplit(".", 1)
            owner = pkgutil.resolve_name(owner_path)
            raw = vars(owner)[name]
            original = wrapped = raw.__func__ if isinstance(raw, classmethod) else raw
            for hook_type, hook in hooks:
                wrapped = _wrap(wrapped, hook, hook_type)
            setattr(owner, name, classmethod(wrapped) if isinstance(raw, classmethod) else wrapped)
            for module in list(sys.modules.values()):
                for attribute, value in list(vars(module).items()) if isinstance(module, types.ModuleType) else ():
                    if value is original:
                        setattr(module, attribute, wrapped)
        cls._hooks.clear()


def _wrap(original, hook, hook_type):
    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        if hook_type is HookType.AROUND:
            return hook(original, *args, **kwargs)
        assert hook_type is HookType.BEFORE
        changed = hook(*args, **kwargs)
        args, kwargs = changed or (args, kwargs)
        return original(*args, **kwargs)

    return wrapper


class ComponentAttentionBackendNotAppliedError(ValueError):
    pass


_component: ContextVar = ContextVar("component", default=None)


@contextmanager
def component_attn_backend_context_manager(attn_backend, component_name=None, **options):
    token = _component.set(SimpleNamespace(backend=attn_backend, component_name=component_name, **options))
    try:
        yield
    finally:
        _component.reset(token)


def get_component_attn_backend_context():
    return _component.get()


def get_attn_backend(head_size, dtype, supported_attention_backends=None, is_cross_attention=False):
    """The class for a layer: what was chosen; for cross-attention and text encoders another if need be."""
    context = _component.get()
    selected = context.backend if context is not None else None
    if selected is None and get_global_server_args().attention_backend is not None:
        selected = AttentionBackendEnum[get_global_server_args().attention_backend.upper()]
    lenient = selected is None or (is_cross_attention and selected.is_sparse)
    lenient = lenient or getattr(context, "allow_global_backend_fallback", False)
    failure = None
    for candidate in [selected, None] if lenient else [selected]:
        try:
            found = _cached_get_attn_backend(head_size, dtype, candidate)
        except ValueError as error:
            failure = failure or error
            continue
        if not (is_cross_attention and found.get_enum().is_sparse):
            return found
    raise ValueError(f"{failure}") from failure


@functools.cache
def _cached_get_attn_backend(head_size, dtype, selected_backend):
    return pkgutil.resolve_name(current_platform.get_attn_backend_cls_str(selected_backend, head_size, dtype))


@dataclass
class ForwardContext:
    current_timestep: int
    attn_metadata: Any
    forward_batch: Any = None


_forward_context = None


def get_forward_context_or_none():
    return _forward_context


@contextmanager
def set_forward_context(current_timestep, attn_metadata, forward_batch=None):
    global _forward_context
    before, _forward_context = _forward_context, ForwardContext(current_timestep, attn_metadata, forward_batch)
    try:
        yield
    finally:
        _forward_context = before


_server_args = None


def set_global_server_args(server_args):
    global _server_args
    _server_args = server_args


def get_global_server_args():
    if _server_args is None:
        raise ValueError("Global sgl_diffusion args is not set.")
    return _server_args


def get_tp_world_size():
    return 1


def get_tp_rank():
    return 0


def get_ulysses_parallel_world_size():
    return 1


def get_ulysses_parallel_rank():
    return 0


def get_compute_dtype():
    return torch.get_default_dtype()


current_platform = CudaPlatform()
MODULES = {
    "platforms": [AttentionBackendEnum, current_platform],
    "platforms.cuda": [CudaPlatformBase, CudaPlatform],
    "platforms.plugins": [HookRegistry, HookType],
    "distributed.parallel_state": [
        get_tp_world_size,
        get_tp_rank,
        get_ulysses_parallel_world_size,
        get_ulysses_parallel_rank,
    ],
    "layers.attention.backends.attention_backend": [AttentionBackend, AttentionImpl],
    "layers.attention.backends.sdpa": [SDPABackend, SDPAImpl],
    "layers.attention.backends.sparge_attn": [SpargeAttentionBackend],
    "layers.attention.selector": [
        ComponentAttentionBackendNotAppliedError,
        component_attn_backend_context_manager,
        get_attn_backend,
        get_component_attn_backend_context,
        _cached_get_attn_backend,
    ],
    "managers.forward_context": [ForwardContext, get_forward_context_or_none, set_forward_context],
    "server_args.server_args": [get_global_server_args, set_global_server_args],
    "server_args": [get_global_server_args, set_global_server_args],
    "utils.precision": [get_compute_dtype],
}


def install():
    """Make SGLang's modules importable."""
    for path, members in MODULES.items():
        parts = f"{ROOT}.{path}".split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if name not in sys.modules:
                sys.modules[name] = types.ModuleType(name)
                sys.modules[name].__path__ = []
                if end > 1:
                    setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], sys.modules[name])
        for member in members:
            setattr(sys.modules[f"{ROOT}.{path}"], getattr(member, "__name__", "current_platform"), member)
