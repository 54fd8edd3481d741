"""What the library's tests share."""

import pytest
import suite_settings  # noqa: F401 - sets threads and hypothesis

from paroattn.ops import backend, cpu

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
