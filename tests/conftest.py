"""Settings of the whole suite: few threads, and hypothesis examples that are the same in every run."""

import pytest
import torch
from hypothesis import HealthCheck, settings

from paroattn.ops import backend, cpu

torch.set_num_threads(2)
settings.register_profile(
    "paroattn", derandomize=True, deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("paroattn")

CPU_CAPABILITIES = [] if cpu.unavailable() else cpu.usable_capabilities()


@pytest.fixture(scope="module", params=["reference", *CPU_CAPABILITIES])
def every_backend(request):
    """Runs a module's tests once with "auto" being the reference and once with each CPU kernel there is."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "reference":
            patch.setattr(backend, "_BACKENDS", {"reference": backend._BACKENDS["reference"]})
        else:
            patch.setenv(cpu.CAPABILITY_VARIABLE, request.param)
        yield request.param


@pytest.fixture(scope="session")
def report_inputs():
    """What a report is made from, evaluated once for all its tests."""
    import report_pages

    return report_pages.report_inputs()
