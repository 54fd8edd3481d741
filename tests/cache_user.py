"""One of several processes that use a cache of plans; a module of its own, so that it starts quickly."""

import dataclasses
import warnings

import torch
from plan_files import masks_of

from paroattn.plan import Plan
from paroattn.plan_cache import PlanCache


def use(folder, limit_gb, path, wish, number, start, failures):
    """Put a plan file's plan and find it, for more wishes than there is room for; failures get errors and warnings."""
    try:
        plan, cache = Plan.load(path), PlanCache(folder, limit_gb)
        wishes = [dataclasses.replace(wish, density=density) for density in (0.1, 0.2, 0.3, 0.4, 0.5)]
        start.wait(timeout=300)  # imports take seconds
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a reader that met half a file would warn
            for turn in range(100):
                cache.put(plan, wishes[(turn * 3 + number) % 5])
                found = cache.find(plan.model, plan.grid, wishes[turn % 5])
                assert found is None or torch.equal(masks_of(found), masks_of(plan))
                assert not [entry.note for entry in cache.entries() if entry.note]
    except BaseException as error:
        failures.put(repr(error))
