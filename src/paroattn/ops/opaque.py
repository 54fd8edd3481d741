"""Operators of torch, each one opaque node in compiled code.

They are defined without `torch.library.custom_op`, which takes 26 us of a call instead of 6. Gradients do not pass; who
calls them sees to it that none are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("paroattn", "FRAGMENT")


def opaque(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define an operator of the namespace `paroattn`; returns what calls it.

    Args:
        schema: name, arguments and results as `torch.library.Library.define` takes them.
        function: computes it, on any device.
        fake: makes outputs of the right kinds, whatever they hold.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"paroattn::{name}", fake, lib=_library)
    overload: Callable[..., Any] = getattr(torch.ops.paroattn, name).default
    return overload
