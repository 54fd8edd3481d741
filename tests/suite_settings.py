"""Settings of the whole suite: few threads, and hypothesis examples that are the same in every run."""

import os

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # workers share the cores
settings.register_profile(
    "paroattn", derandomize=True, deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("paroattn")
