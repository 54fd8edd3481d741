"""The parts of vLLM-Omni that the plug-in meets, after the source of vllm-omni 0.30.0; none of its code.

Each class and function keeps the names, arguments and answers of vLLM-Omni's. `install()` makes them importable under
its module names.
"""

import enum
import functools
import pkgutil
import sys
import types
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

ROOT = "vllm_omni.diffusion"
BACKENDS = f"{ROOT}.attention.backends"


class AttentionBackend:
    supported_platforms = None

    @classmethod
    def validate_available(cls):
        return None

    @classmethod
    def supports_attention_mask(cls, attention_spec=None):
        return False


@dataclass(frozen=True)
class VideoTokenSpan:
    start: int
    latent_grid: tuple
    role: str


@dataclass(frozen=True)
class VideoTokenLayout:
    prefix_len: int | None = None
    latent_grid: tuple | None = None
    used_len: int | None = None
    video_spans: tuple = ()


@dataclass
class AttentionMetadata:
    attn_mask: Any = None
    joint_attn_mask: Any = None
    joint_query: Any = None
    joint_key: Any = None
    joint_value: Any = None
    joint_strategy: str = "front"
    extra: dict = field(default_factory=dict)
    full_attn_spans: Any = None
    query_ranges: Any = None
    video_layout: VideoTokenLayout | None = None
    packed_padding: Any = None


class AttentionImpl:
    def forward(self, query, key, value, attn_metadata=None):
        return self.forward_cuda(query, key, value, attn_metadata)

    def forward_cuda(self, query, key, value, attn_metadata=None):
        raise NotImplementedError


class SDPABackend(AttentionBackend):
    @classmethod
    def supports_attention_mask(cls, attention_spec=None):
        return True

    @staticmethod
    def get_name():
        return "SDPA"

    @staticmethod
    def get_impl_cls():
        return SDPAImpl


class SDPAImpl(AttentionImpl):
    """vLLM-Omni's dense attention; counts its calls."""

    calls = 0

    def __init__(
        self, num_heads, head_size, softmax_scale, causal=False, num_kv_heads=None, prefix="", backend_kwargs=None, **_
    ):
        self.causal, self.scale = causal, softmax_scale

    def forward_cuda(self, query, key, value, attn_metadata=None):
        type(self).calls += 1
        mask = None if attn_metadata is None else attn_metadata.attn_mask
        mask = mask[:, None, None] if mask is not None and mask.ndim == 2 else mask
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=self.causal, scale=self.scale
        )
        return output.transpose(1, 2)


class DiffusionAttentionBackendEnum(enum.Enum):
    TORCH_SDPA = f"{BACKENDS}.sdpa.SDPABackend"
    RAINFUSION_ATTN = f"{BACKENDS}.rainfusion_attn.RainFusionAttentionBackend"

    def get_path(self):
        return _overrides.get(self, self.value)

    def clear_override(self):
        _overrides.pop(self, None)

    def get_class(self):
        return pkgutil.resolve_name(self.get_path())


_overrides: dict = {}


def register_diffusion_backend(backend, class_path=None):
    _overrides[backend] = class_path
    return lambda x: x


class RainFusionAttentionBackend(AttentionBackend):
    supported_platforms = ("npu",)


class Platform:
    name = "cuda"

    def is_npu(self):
        return self.name == "npu"

    def get_diffusion_attn_backend_cls(self, selected_backend, head_size, allow_trtllm_default=True):
        """Explicit choices are validated; without one it is the default."""
        if selected_backend is None:
            assert not allow_trtllm_default
            return DiffusionAttentionBackendEnum.TORCH_SDPA.get_path()
        backend = DiffusionAttentionBackendEnum[selected_backend.upper()]
        supported = backend.get_class().supported_platforms
        if supported is not None and self.name not in supported:
            raise ValueError(f"The {selected_backend} diffusion attention backend runs on {supported} only")
        backend.get_class().validate_available()
        return backend.get_path()


@functools.cache
def _cached_get_backend_cls(backend_name, head_size, allow_trtllm_default=True):
    return pkgutil.resolve_name(current_omni_platform.get_diffusion_attn_backend_cls(backend_name, head_size))


_config = None


@contextmanager
def set_current_diffusion_config(config):
    global _config
    before, _config = _config, config
    try:
        yield
    finally:
        _config = before


def get_current_diffusion_config_or_none():
    return _config


@dataclass
class ForwardContext:
    denoise_step_idx: int | None = None
    denoise_timestep: float | None = None
    sp_padding_size: int = 0
    sp_original_seq_len: int | None = None


_forward_context = None


def get_forward_context():
    assert _forward_context is not None
    return _forward_context


def is_forward_context_available():
    return _forward_context is not None


@contextmanager
def override_forward_context(forward_context):
    global _forward_context
    before, _forward_context = _forward_context, forward_context
    try:
        yield
    finally:
        _forward_context = before


def get_tensor_model_parallel_rank():
    return 0


def get_tensor_model_parallel_world_size():
    return 1


def get_ulysses_parallel_rank():
    raise AssertionError("the sequence parallel group is not initialized")


current_omni_platform = Platform()
MODULES = {
    "vllm.distributed": [get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size],
    "vllm_omni.platforms": [current_omni_platform],
    f"{BACKENDS}.abstract": [AttentionBackend, AttentionImpl, AttentionMetadata, VideoTokenLayout, VideoTokenSpan],
    f"{BACKENDS}.sdpa": [SDPABackend, SDPAImpl],
    f"{BACKENDS}.rainfusion_attn": [RainFusionAttentionBackend],
    f"{BACKENDS}.registry": [DiffusionAttentionBackendEnum, register_diffusion_backend],
    f"{ROOT}.attention.selector": [_cached_get_backend_cls],
    f"{ROOT}.config": [set_current_diffusion_config, get_current_diffusion_config_or_none],
    f"{ROOT}.distributed.parallel_state": [get_ulysses_parallel_rank],
    f"{ROOT}.forward_context": [
        ForwardContext,
        get_forward_context,
        is_forward_context_available,
        override_forward_context,
    ],
}


def install():
    """Make vLLM-Omni's modules importable."""
    for path, members in MODULES.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if name not in sys.modules:
                sys.modules[name] = types.ModuleType(name)
                sys.modules[name].__path__ = []
                if end > 1:
                    setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], sys.modules[name])
        for member in members:
            setattr(sys.modules[path], getattr(member, "__name__", "current_omni_platform"), member)
