"""The attention operator: the public functions `attention` and `prepare`, several backends behind them."""

from paroattn.ops.attention import attention
from paroattn.ops.backend import backends
from paroattn.ops.prepared import PreparedAttention, prepare

__all__ = ["PreparedAttention", "attention", "backends", "prepare"]
