"""What the library's tests share."""

import pytest
from suite_settings import CPU_CAPABILITIES

from paroattn.ops import backend, cpu


@pytest.fixture(scope="module", params=["reference", *CPU_CAPABILITIES])
def every_backend(request):
    """Runs a module's tests once with "auto" being the reference and once with each CPU kernel there is."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "reference":
            patch.setattr(backend, "_BACKENDS", {"reference": backend._BACKENDS["reference"]})
        else:
            patch.setenv(cpu.CAPABILITY_VARIABLE, request.param)
        yield request.param
