"""vLLM-Omni itself where it is installed, else what stands for it; the plug-in is loaded as vLLM-Omni loads it."""

import importlib.util

import pytest
import torch


def pytest_configure():
    """Before test files import vLLM-Omni's modules."""
    if importlib.util.find_spec("vllm_omni") is None:
        import fake_vllm_omni

        fake_vllm_omni.install()
    import paroattn_vllm_omni

    paroattn_vllm_omni.register()


@pytest.fixture(autouse=True)
def _a_server_of_its_own():
    """Nothing is remembered of the test before."""
    from paroattn_vllm_omni import backend, settings
    from vllm_omni.diffusion.attention import selector

    selector._cached_get_backend_cls.cache_clear()
    settings.served_plan.cache_clear()
    settings.tally.__init__(settings.tally._logger)
    backend.request_in_progress.__init__()
    torch.manual_seed(0)
