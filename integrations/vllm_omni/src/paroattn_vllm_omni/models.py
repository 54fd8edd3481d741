"""The models of vLLM-Omni that a plan can be used with, as data; and which of a model's layers is being built.

A model is here if it publishes the token grid with each call and the noise level of each step, and names its layers.
In vLLM-Omni 0.30.0 that is Wan without references.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from paroattn.errors import PlanError
from paroattn.serving import ServedPlan

LAYERS = {"WanTransformer3DModel": re.compile(r"(?:^|\.)blocks\.(\d+)\.attn1$")}
"""What the names of self-attention layers match, by diffusers' name of the model; the group is the layer's number."""


class Building:
    """A model as vLLM-Omni builds it.

    The two transformers of Wan 2.2 give their layers the same names. They are built one after the other, so that the
    second layer of a name is the second transformer's.
    """

    def __init__(self, served: ServedPlan, config: Any):
        self.served = served
        self.config = config
        self._known = config.tf_model_config
        planned = served.plan.model.layers
        self._layers = int(self._known.get("num_layers") or planned)  # of one transformer
        self._two = planned == 2 * self._layers
        # With such a boundary, one of the two is not built: the second, or the first.
        self._alone = self._two and config.boundary_ratio in (0.0, 1.0)
        self._first = int(self._alone and config.boundary_ratio == 1.0)
        self._built: Counter[str] = Counter()

    def layer(self, prefix: str, heads: int, head_dim: int) -> int | None:
        """Number in the plan of the layer that is being built, or None if the plan is not about it.

        Args:
            prefix: its name.
            heads, head_dim: of the layer, over all processes.

        Raises:
            PlanError: the plan is for another model.
        """
        model = self.served.plan.model
        if model.class_name not in LAYERS:
            raise PlanError(
                f"plan is for {model.class_name}; in vLLM-Omni, plans can be used with {', '.join(LAYERS)}. Choose "
                "another backend than RAINFUSION_ATTN."
            )
        found = LAYERS[model.class_name].search(prefix)
        if found is None:
            return None
        transformer = self._first + self._built[prefix]
        self._built[prefix] += 1
        fits = model.layers in (self._layers, 2 * self._layers) and transformer < 1 + self._two
        self.served.check(
            class_name=self._known.get("_class_name"),
            layers=None if fits else (1 + transformer) * self._layers,
            heads=heads,
            head_dim=head_dim,
            text=None,
        )
        return transformer * self._layers + int(found[1])

    @property
    def missing(self) -> bool:
        """Whether the plan is for two transformers, and the model has one."""
        return self._two and not self._alone and max(self._built.values()) == 1
