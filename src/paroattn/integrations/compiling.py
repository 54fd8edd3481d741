"""Compiling the blocks of transformers, and leaving them as they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from paroattn.errors import InputError
from paroattn.integrations.descriptors import attention_modules


def compile_blocks(transformers: Sequence[nn.Module]) -> Callable[[], None]:
    """Compile every block with self-attention, in place, and return what undoes it.

    Blocks of a kind share a graph, which is made in the first forward call. A block that was compiled before stays as
    it is.

    Raises:
        InputError: a transformer is compiled as a whole.
    """
    blocks: list[nn.Module] = []
    for transformer in transformers:
        if _is_compiled(transformer):
            raise InputError(
                "compile_blocks is for transformers that are not compiled; this one is, as a whole: leave it out"
            )
        blocks += [block for block in attention_blocks(transformer) if not _is_compiled(block)]
    compiled = []
    for block in blocks:
        block.compile()
        compiled.append((block, block._compiled_call_impl))

    def undo() -> None:
        for block, own in compiled:
            if block._compiled_call_impl is own:
                block._compiled_call_impl = None

    return undo


def attention_blocks(transformer: nn.Module) -> list[nn.Module]:
    """The modules that hold self-attention, each once."""
    names = {module: name for name, module in transformer.named_modules()}
    found = dict.fromkeys(names[module].rpartition(".")[0] for module in attention_modules(transformer))
    return [transformer.get_submodule(name) for name in found]


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
