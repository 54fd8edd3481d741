"""A plan at work on one device, whatever the host: told a call's noise level and layer, it attends or says why not.

Nothing here changes once it is made but the operators, which are made as dtypes come. What belongs to a request, its
step bucket, is a tensor that the host keeps and hands over with each call, so that requests and threads do not meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from paroattn.errors import InputError
from paroattn.grid import TokenGrid
from paroattn.ops import PreparedAttention
from paroattn.ops.backend import choose_backend
from paroattn.ops.inputs import MOST_ON_GPU, CallKind
from paroattn.ops.prepared import kind_of_calls
from paroattn.plan import LayerPlan, ModelIdentity, Plan
from paroattn.quantize import Precision


class Dense(NamedTuple):
    """The answer of a runner to a call that has to stay with the model's own attention.

    Attributes:
        reason: in words that follow "because".
    """

    reason: str


class Runner:
    """A plan's operators on one device.

    Args:
        plan: the plan.
        device: of the tensors that calls will bring.
        layers: numbers of the plan's layers that the host has, in its order; default: all. A second transformer has
            the last ones.
        heads: numbers of the plan's heads that the host has, in its order (one rank's, say); default: all. Where they
            differ by step bucket and layer, an integer tensor [step buckets, layers, heads], in which places keep their
            precision.
        backend: "auto" or a backend's name.
        repair: bring outputs closer to attention over all keys, by 64 rows of each call that attend to them.

    Attributes:
        grid: the token grid, or None for any.

    Raises:
        InputError: an unknown backend, or a precision it does not have.

    Example:
        >>> runner = Runner(plan, "cuda")  # doctest: +SKIP
        >>> bucket = runner.bucket(timestep / 1000)  # doctest: +SKIP
        >>> output = runner.call(0, query, key, value, bucket=bucket)  # doctest: +SKIP
    """

    def __init__(
        self,
        plan: Plan,
        device: torch.device | str,
        *,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | Tensor | None = None,
        backend: str = "auto",
        repair: bool = False,
    ):
        kind = CallKind(plan.precisions, block_shape=(plan.block_q, plan.block_kv))
        choose_backend(backend, kind)
        device = torch.device(device)
        part = part_of(plan, layers, None if isinstance(heads, Tensor) else heads)
        table, index = resident(part.mask_table, device), part.mask_index.to(device)
        light = replace(part, mask_table=part.mask_table[:1], mask_index=torch.zeros_like(part.mask_index))
        layer_plans = [
            replace(layer, mask_table=table, mask_index=index[:, number])
            for number, layer in enumerate(light.layers(device))
        ]
        if isinstance(heads, Tensor):
            layer_plans = [layer.of_heads(heads[:, number]) for number, layer in enumerate(layer_plans)]
        calibrated = (part.usage > 0).any(0).tolist()
        self._set_up(layer_plans, plan.grid, plan.bucket_levels, device, backend, calibrated, repair)

    @classmethod
    def of_precision(
        cls, precision: Precision, model: ModelIdentity, device: torch.device | str, backend: str = "auto"
    ) -> Runner:
        """A runner that computes all blocks of any number of tokens in a precision."""
        layer = LayerPlan(precisions=(precision,) * model.heads)
        choose_backend(backend, kind_of_calls(layer))
        runner = cls.__new__(cls)
        layers = [layer] * model.layers
        runner._set_up(layers, None, (), torch.device(device), backend, [True] * model.layers)
        return runner

    def _set_up(
        self,
        layers: Sequence[LayerPlan],
        grid: TokenGrid | None,
        levels: Sequence[float],
        device: torch.device,
        backend: str,
        calibrated: Sequence[bool],
        repair: bool = False,
    ) -> None:
        self.grid = grid
        self._levels = torch.tensor(levels, dtype=torch.float32, device=device)
        self._device = device
        self.layers = [
            LayerRunner(layer, device, backend, own, repair) for layer, own in zip(layers, calibrated, strict=True)
        ]

    def build(self, tokens: int, head_dim: int, dtype: torch.dtype) -> None:
        """Build the kernels that calls of so many tokens will need, rather than in the first request.

        Each kind of layer attends once, to nothing. A GPU that lacks the memory now builds them later.
        """
        from tqdm.auto import tqdm

        operators = (layer.make_ready(dtype) for layer in self.layers)
        # Other backends have none to build.
        kinds = {operator.kind: operator for operator in operators if operator.backend == "triton"}
        bucket = torch.zeros((), dtype=torch.int64, device=self._device)
        for operator in tqdm(kinds.values(), desc="building kernels", delay=1, leave=False):
            try:
                nothing = torch.zeros(1, tokens, operator.layer_plan.heads, head_dim, dtype=dtype, device=self._device)
                operator(nothing, nothing, nothing, bucket=bucket)
            except torch.OutOfMemoryError:
                return

    def bucket(self, level: Tensor | float) -> Tensor:
        """The step bucket of calls at a noise level, a 0-dim tensor on the device; nothing waits for its value.

        Args:
            level: timestep as a share of the training timesteps; of flow models that is sigma.
        """
        if isinstance(level, Tensor):
            level = level.to(self._device)
        return (self._levels >= level).sum()

    def refusal(self, grid: TokenGrid | None) -> str | None:
        """Why calls of a token grid (None: tokens that form no boxes) have to stay dense, or None if they need not.

        The number of text tokens may differ from the plan's.
        """
        if self.grid is None:
            return None
        found = "tokens that form no boxes of frames, height and width" if grid is None else f"grid {grid}"
        planned = self.grid
        if grid is None or planned.boxes != grid.boxes:
            return f"plan is for grid {planned}; this request has {found}"
        return None

    def call(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        bucket: Tensor,
        key_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor | Dense:
        """Attend in a layer, or say why not.

        Args:
            layer: number among the host's layers.
            query, key, value: [B, N, H, D] in the model's order, text included.
            bucket: from `bucket()`.
            key_mask: bool [B, N], False for keys to ignore, or None.
            scale: factor of the logits; default 1 / sqrt(D).

        Returns:
            The output [B, N, H, D], or `Dense`.
        """
        return self.layers[layer](query, key, value, bucket=bucket, key_mask=key_mask, scale=scale)


class LayerRunner:
    """One layer of a runner; its operator is made at the first call, or ahead of compiled code by `make_ready`."""

    def __init__(
        self, layer_plan: LayerPlan, device: torch.device, backend: str, calibrated: bool, repair: bool = False
    ):
        self._layer_plan = layer_plan
        self._calibrated = calibrated
        self.device = device
        grid = layer_plan.grid
        self.visual_tokens = None if grid is None else grid.visual_tokens
        self._takes_text = grid is not None and grid.text_tokens > 0
        self._backend = backend
        self._repair = repair
        self._operator: PreparedAttention | None = None

    def make_ready(self, dtype: torch.dtype, scale: float | None = None) -> PreparedAttention:
        """The operator for a dtype, made unless it is there."""
        operator = self._operator
        if operator is None or (operator.dtype, operator.scale) != (dtype, scale):
            operator = PreparedAttention(
                self._layer_plan, self.device, dtype, "NHD", scale, self._backend, self._repair
            )
            self._operator = operator
        return operator

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        bucket: Tensor,
        key_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor | Dense:
        """As `Runner.call`."""
        if not self._calibrated:
            return Dense("the plan's calibration never called this layer: it ran other steps of the schedule")
        tokens, keys = query.shape[1], key.shape[1]
        if keys != tokens:
            return Dense(f"there are {tokens} queries and {keys} keys: it is cross-attention")
        if not query.dtype == key.dtype == value.dtype:
            return Dense(f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}")
        expected = self.visual_tokens
        if expected is not None and (tokens < expected or (not self._takes_text and tokens != expected)):
            return Dense(f"there are {tokens} tokens; the plan has {expected}")
        operator = self._operator
        if operator is None or not operator.fits(query, scale):
            if torch.compiler.is_compiling():
                raise InputError(
                    f"paroattn has no operator for {query.dtype} on {query.device} in compiled code; apply it after "
                    "torch.compile(pipe.transformer), or compile with pipe.transformer.compile_repeated_blocks()"
                )
            operator = self.make_ready(query.dtype, scale)
        return operator(query, key, value, bucket=bucket, key_mask=key_mask)


def part_of(plan: Plan, layers: Sequence[int] | None = None, heads: Sequence[int] | None = None) -> Plan:
    """The plan of some layers and heads, in the order given; `InputError` for numbers that it does not have."""
    model = plan.model
    for name, numbers, count in (("layers", layers, model.layers), ("heads", heads, model.heads)):
        wrong = [number for number in numbers or () if not 0 <= number < count]
        if wrong or (numbers is not None and not len(numbers)):
            raise InputError(f"{name} are {list(numbers or ())}; expected numbers from 0 to {count - 1}")
    if layers is None and heads is None:
        return plan
    rows = torch.tensor(range(model.layers) if layers is None else layers)
    columns = torch.tensor(range(model.heads) if heads is None else heads)

    def taken(tensor: Tensor) -> Tensor:
        return tensor.index_select(-2, rows).index_select(-1, columns)

    return replace(
        plan,
        model=replace(model, layers=len(rows), heads=len(columns)),
        order_index=taken(plan.order_index),
        precision_index=taken(plan.precision_index),
        mask_index=taken(plan.mask_index),
        compensate=taken(plan.compensate),
        usage=plan.usage.index_select(-1, rows),
    )


def resident(table: Tensor, device: torch.device) -> Tensor:
    """A table where kernels of a device read it: small ones on the device, large ones of a GPU in pinned host memory.

    Only the masks of a call are read from there, in a small part of the time that the call takes.
    """
    if device.type != "cuda" or table.nbytes <= MOST_ON_GPU:
        return table.to(device)
    with torch.cuda.device(device):
        return torch.as_tensor(_Mapped(table.pin_memory()), device=device)


class _Mapped:
    """Pinned host memory as the device sees it, by the protocol with which torch takes over other libraries' arrays."""

    def __init__(self, pinned: Tensor):
        self._pinned = pinned  # lives as long as the tensor that is made of this
        self.__cuda_array_interface__ = {
            "shape": tuple(pinned.shape),
            "typestr": "|u1",
            "data": (pinned.data_ptr(), False),
            "version": 3,
        }
