"""Settings of the whole suite: few threads, hypothesis examples that are the same in every run, CPU kernels to test."""

import os

import torch
from hypothesis import HealthCheck, settings

from paroattn.ops import cpu

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # workers share the cores
settings.register_profile(
    "paroattn", derandomize=True, deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("paroattn")

CPU_CAPABILITIES = [] if cpu.unavailable() else cpu.usable_capabilities()
