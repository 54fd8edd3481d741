"""SGLang itself where it is installed, else what stands for it; the plug-in is loaded as SGLang loads it."""

import importlib.util

import pytest
import torch


def pytest_configure():
    """Before test files import SGLang's modules."""
    if importlib.util.find_spec("sglang") is None:
        import fake_sglang

        fake_sglang.install()
    import paroattn_sglang
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry

    paroattn_sglang.register()
    HookRegistry.apply_hooks()


@pytest.fixture(autouse=True)
def _a_server_of_its_own():
    """Nothing is remembered of the test before."""
    from paroattn_sglang import settings
    from sglang.multimodal_gen.runtime.layers.attention import selector

    selector._cached_get_attn_backend.cache_clear()
    settings.served_plan.cache_clear()
    settings.tally.__init__(settings.tally._logger)
    torch.manual_seed(0)
