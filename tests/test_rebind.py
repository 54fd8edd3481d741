"""Taking over processors: what is refused."""

import functools

import pytest
import torch
import torch.nn.functional as F

import paroattn
from paroattn.integrations.rebind import rebind


def _no_source():
    scope = {"F": torch.nn.functional}
    exec("class Made:\n    def __call__(self, q):\n        return F.scaled_dot_product_attention(q, q, q)", scope)
    return scope["Made"]()


def _decorated():
    def decorator(function):
        return function

    class Decorated:
        @decorator
        def __call__(self, q):
            return F.scaled_dot_product_attention(q, q, q)

    return Decorated()


def _wrapped():
    def decorator(function):
        return functools.wraps(function)(lambda self, q: function(self, q))

    class Wrapped:
        @decorator
        def __call__(self, q):
            return F.scaled_dot_product_attention(q, q, q)

    return Wrapped()


def _closure():
    scale = 0.5

    class Closure:
        def __call__(self, q):
            return F.scaled_dot_product_attention(q, q, q, scale=scale)

    return Closure()


def _without_attention():
    class Plain:
        def __call__(self, q):
            return q

    return Plain()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_no_source, "Made cannot be taken over: the source of its __call__ is not there"),
        (_decorated, "Decorated cannot be taken over: its __call__ is decorated"),
        (_wrapped, "Wrapped cannot be taken over: its __call__ is decorated"),
        (_closure, "Closure cannot be taken over: its __call__ is a closure over scale"),
        (_without_attention, "Plain cannot be taken over: it calls neither dispatch_attention_fn nor"),
    ],
)
def test_a_processor_that_cannot_be_taken_over_is_refused_in_one_line(make, reason):
    with pytest.raises(paroattn.InputError, match=reason) as raised:
        rebind(make(), lambda call: call.dense())
    assert "\n" not in str(raised.value)
