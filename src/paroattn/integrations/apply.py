"""Applying a plan to a pipeline, and taking it off again."""

from __future__ import annotations

import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from paroattn.balance import balanced_heads, check_ranks, heads_in_order
from paroattn.errors import InputError, PlanError
from paroattn.grid import Boxes, TokenGrid
from paroattn.integrations.attach import Attachment, Forward
from paroattn.integrations.compiling import compile_blocks
from paroattn.integrations.descriptors import describe
from paroattn.integrations.parallel import Sharing, check_agreement, sharing_of
from paroattn.integrations.pipeline import Pipeline
from paroattn.integrations.rebind import AttentionCall
from paroattn.ops.exchange import Exchange
from paroattn.plan import ModelIdentity, Plan
from paroattn.quantize import Precision
from paroattn.runner import Dense, LayerRunner, Runner

OTHER_SIZES = ("dense", "adapt", "error")
"""What requests of another size than the plan's get: the model's own attention, an adapted plan, a `PlanError`."""


def apply(
    pipe: Any,
    plan: Plan | str | os.PathLike[str] | None = None,
    *,
    precision: str | Precision | None = None,
    strict: bool = False,
    backend: str = "auto",
    other_sizes: str = "dense",
    repair: bool = False,
    compile_blocks: bool = False,
) -> Handle:
    """`paroattn.apply` with a plan, or with a precision for all blocks; either is given."""
    if other_sizes not in OTHER_SIZES:
        raise InputError(f"other_sizes is {other_sizes!r}; expected one of {', '.join(OTHER_SIZES)}")
    if (plan is None) == (precision is None):
        raise InputError("apply takes either a plan or a precision; got " + ("both" if plan is not None else "neither"))
    if isinstance(plan, (str, os.PathLike)):
        plan = Plan.load(plan)
    if not isinstance(plan, Plan | None):
        raise InputError(f"plan is a {type(plan).__name__}; expected a Plan or the path of a plan file")
    pipeline = Pipeline(pipe)
    if plan is not None:
        check_model(plan, pipeline.identity)
        text = describe(pipeline.transformers[0]).text
        if plan.grid.text_tokens and plan.grid.text_position != text:
            raise PlanError(f"plan has text tokens as {plan.grid.text_position}; this model has them as {text}")
    parsed = None if precision is None else Precision.parse(precision)
    if repair and plan is None:
        raise InputError("repair is for the blocks that a plan leaves out; apply with a plan or a density")
    return Handle(pipeline, plan, parsed, strict, backend, other_sizes, repair, compile_blocks)


@dataclass(frozen=True)
class Report:
    """How attention ran since a plan was applied.

    Attributes:
        planned: calls of layers that ran as the plan says.
        dense: calls that ran with the model's own attention, by reason. Cross-attention, an IP-adapter's too, always
            does and is not counted.
        plans: where plans are made beside requests, what became of the plan of each size.
    """

    planned: int
    dense: Mapping[str, int]
    plans: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        total = self.planned + sum(self.dense.values())
        lines = [f"{self.planned} of {total} attention calls ran as planned"]
        lines += [f"{count} ran with the model's own attention: {reason}" for reason, count in self.dense.items()]
        lines += [f"plan for {size}: {state}" for size, state in self.plans.items()]
        return "\n".join(lines)


Observer = Callable[[int, AttentionCall], None]
"""Looks at a call of a layer before it is computed."""


class Handle:
    """What `apply` returns; `remove()` restores the pipeline."""

    def __init__(
        self,
        pipeline: Pipeline,
        plan: Plan | None,
        precision: Precision | None,
        strict: bool,
        backend: str,
        other_sizes: str = "dense",
        repair: bool = False,
        compiles_blocks: bool = False,
    ):
        self.plan = plan
        self._other_sizes = other_sizes
        self._adapted: dict[Boxes, Plan] = {}
        self._identity = pipeline.identity
        self._precision = precision
        self._backend = backend
        self._repair = repair
        self.strict = strict
        self._transformers = pipeline.transformers
        self._sharings: dict[nn.Module, Sharing | None] = {}
        self._rank, self._ranks = 0, 1
        self._heads: dict[tuple[Plan | None, torch.device], list[Tensor]] = {}
        self._runners: dict[tuple[Plan | None, torch.device], Runner] = {}
        self._ready_for: tuple[Runner, torch.dtype] | None = None
        self._lock, self._adapting = threading.Lock(), threading.Lock()
        self._counts: Counter[str | None] = Counter()
        self._requests = [_Request() for _ in pipeline.transformers]
        owners = [request for request, own in zip(self._requests, pipeline.layers, strict=True) for _ in own]
        self._layers = [PlannedLayer(self, layer, request) for layer, request in enumerate(owners)]
        device, dtype = pipeline.place
        if plan is not None or precision is not None:
            self._look_at_ranks(pipeline.transformers[0])
            runner = self.runner(plan, torch.device("cpu") if device.type == "meta" else device)
            self._make_ready(plan, device, dtype)
            if plan is not None and device.type == "cuda":
                runner.build(plan.grid.tokens, plan.model.head_dim, dtype)
        with ExitStack() as undo:
            if compiles_blocks:
                undo.callback(compile_blocks(pipeline.transformers))
            exchanges = [layer.exchange for layer in self._layers]
            attachment = Attachment(
                pipeline, self._layers, self._before_forward, self._after_forward, self._after_call, exchanges
            )
            undo.callback(attachment.remove)
            self._undo = undo.pop_all()

    def remove(self) -> None:
        """Restore the pipeline's own attention, bitwise; what others changed since stays."""
        self._undo.close()

    @property
    def ready(self) -> bool:
        """Whether it has the plan that it runs with."""
        return True

    def report(self) -> Report:
        """How many attention calls ran as planned, and why the others did not."""
        self._collect()
        with self._lock:
            counts = dict(self._counts)
        return Report(counts.pop(None, 0), {str(reason): count for reason, count in counts.items()})

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def count(self, reason: str | None) -> None:
        """Count a call that ran as planned (None) or with the model's own attention."""
        with self._lock:
            self._counts[reason] += 1
            first = self._counts[reason] == 1
        if reason is None:
            return
        if self.strict:
            raise PlanError(f"{reason}. Calibrate for such requests, load a matching plan, or do not ask for strict.")
        if first:
            warnings.warn(f"{reason}: the model's own attention runs instead", stacklevel=2)

    def runner(self, plan: Plan | None, device: torch.device) -> Runner:
        """What computes this rank's heads of a plan on a device; None: all blocks in the handle's precision."""
        runner = self._runners.get((plan, device))
        if runner is None:
            own = self._identity.heads // self._ranks
            if plan is None:
                assert self._precision is not None
                model = replace(self._identity, heads=own)
                runner = Runner.of_precision(self._precision, model, device, self._backend)
                heads = torch.arange(self._identity.heads).expand(1, self._identity.layers, -1)
            else:
                exchanging = any(sharing is not None and sharing.group for sharing in self._sharings.values())
                heads = balanced_heads(plan, self._ranks) if exchanging else heads_in_order(plan)
                mine = None if self._ranks == 1 else heads[..., self._rank * own : (self._rank + 1) * own]
                runner = Runner(plan, device, heads=mine, backend=self._backend, repair=self._repair)
            self._heads[plan, device] = list(heads.to(device).unbind(1))
            self._runners[plan, device] = runner
        return runner

    def heads(self, plan: Plan | None, layer: int, device: torch.device) -> Tensor:
        """The order in which ranks take a layer's heads, int64 [step buckets, H]."""
        self.runner(plan, device)
        return self._heads[plan, device][layer]

    def _look_at_ranks(self, transformer: nn.Module) -> Sharing | None:
        """How ranks share a transformer; all of them look at the same time, before each forward call."""
        sharing = sharing_of(transformer)
        if transformer in self._sharings and sharing == self._sharings[transformer]:
            return sharing
        if sharing is not None:
            settings = (self.plan and self.plan.digest, self._precision, self._other_sizes, self._repair)
            check_agreement(sharing, repr(settings))
        rank, ranks = (0, 1) if sharing is None else (sharing.rank, sharing.ranks)
        check_ranks(self._identity.heads, ranks)
        self._sharings[transformer] = sharing
        if (rank, ranks) != (self._rank, self._ranks):
            self._rank, self._ranks = rank, ranks
            self._runners.clear()
        return sharing

    def _choose(self, forward: Forward) -> Plan | Dense | None:
        """The plan of a forward call (None: all blocks), or why it stays dense."""
        plan = self._plan_for(forward.grid, forward.latents.device)
        reason = self.runner(plan, forward.latents.device).refusal(forward.grid)
        if reason is not None and self._other_sizes == "error":
            raise PlanError(f"{reason}. Calibrate at this size, or apply with other_sizes='adapt' or 'dense'.")
        return plan if reason is None else Dense(reason)

    def _plan_for(self, grid: TokenGrid | None, device: torch.device) -> Plan | None:
        """The plan, adapted to a grid of another size if that is wanted."""
        if self._other_sizes != "adapt" or self.plan is None or grid is None or grid.boxes == self.plan.grid.boxes:
            return self.plan
        if len(grid.boxes) != len(self.plan.grid.boxes):  # nothing is known of boxes that are new
            return self.plan
        with self._adapting:
            if grid.boxes not in self._adapted:
                text = {name: getattr(self.plan.grid, name) for name in ("text_tokens", "text_position")}
                self._adapted[grid.boxes] = self.plan.adapt(replace(grid, **text), device)
            return self._adapted[grid.boxes]

    def _observer(self) -> Observer | None:
        """What looks at the calls of a forward call."""
        return None

    def _before_forward(self, forward: Forward) -> None:
        self._collect()
        sharing = self._look_at_ranks(self._transformers[forward.transformer])
        tensor, request = forward.latents, self._requests[forward.transformer]
        request.share(sharing, forward.grid)
        chosen = self._choose(forward)
        observe = self._observer()
        if sharing is not None and observe is not None:
            raise InputError(
                "ranks share the transformer, where no plan can be made beside requests; make one in a single process, "
                "then apply it"
            )
        if isinstance(chosen, Dense):
            request.begin(chosen.reason, observe=observe)
            return
        runner = self.runner(chosen, tensor.device)
        request.begin(None, chosen, runner, runner.bucket(forward.descriptor.level(forward.timestep)), observe)
        self._make_ready(chosen, tensor.device, tensor.dtype)

    def _after_forward(self, transformer: int) -> None:
        self._requests[transformer].end()

    def _after_call(self, succeeded: bool) -> None:
        """A call of the pipeline has ended."""

    def _make_ready(self, plan: Plan | None, device: torch.device, dtype: torch.dtype) -> None:
        """Make operators before a forward call that may be compiled, where they could not be made."""
        if device.type == "meta":
            return
        runner = self.runner(plan, device)
        if self._ready_for == (runner, dtype):
            return
        self._ready_for = (runner, dtype)
        for layer, own, order in zip(self._layers, runner.layers, self._heads[plan, device], strict=True):
            own.make_ready(dtype)
            layer.runner, layer.heads = own, order

    def _collect(self) -> None:
        """Count what compiled code noted."""
        for layer in self._layers:
            noted, layer.noted = layer.noted, ()
            for reason in noted:
                self.count(reason)


UNSEEN = "compiled code cannot be observed: generate once before compiling, or calibrate"


class _Known:
    """What is known of a forward call: its plan and step bucket, or why it stays dense and what observes it."""

    reason: str | None = "attention was called outside of the transformer's forward call"
    observe: Observer | None = None
    sharing: Sharing | None = None
    tokens: tuple[int, int] | None = None  # visual tokens and those of text
    plan: Plan | None
    runner: Runner
    bucket: Tensor


class _KnownByThread(threading.local, _Known):
    pass


class _Request:
    """The forward call of a transformer in progress in each thread.

    Compiled code cannot read what belongs to a thread, in all versions of PyTorch: for it there is one call at a time.
    """

    def __init__(self) -> None:
        self._by_thread = _KnownByThread()
        self._in_compiled = _Known()
        self._is_compiled = False
        self._thread: threading.Thread | None = None

    def begin(
        self,
        reason: str | None,
        plan: Plan | None = None,
        runner: Runner | None = None,
        bucket: Tensor | None = None,
        observe: Observer | None = None,
    ) -> None:
        own, other = threading.current_thread(), self._thread
        if self._is_compiled and other not in (None, own) and other.is_alive():
            raise InputError("two threads call one compiled transformer at once; give each a transformer of its own")
        self._thread = own
        for known in (self._by_thread, self._in_compiled):
            known.reason = reason
            if runner is not None and bucket is not None:
                known.plan, known.runner, known.bucket = plan, runner, bucket
        self._by_thread.observe = observe
        if observe is not None and reason is not None:
            self._in_compiled.reason = UNSEEN

    def share(self, sharing: Sharing | None, grid: TokenGrid | None) -> None:
        """Say how ranks share the transformer in the call that begins."""
        if sharing is not None and sharing.is_own and grid is None:
            raise InputError("ranks share tokens that form no boxes; generate such requests without enable_parallelism")
        for known in (self._by_thread, self._in_compiled):
            known.sharing = sharing
            known.tokens = None if grid is None else (grid.visual_tokens, grid.text_tokens)

    def end(self) -> None:
        self._thread = None

    @property
    def now(self) -> _Known:
        """The call in progress."""
        if not torch.compiler.is_compiling():
            return self._by_thread
        self._is_compiled = True
        return self._in_compiled


class PlannedLayer:
    """The intercept of one layer: its operator, or the model's own attention where the plan has nothing to say."""

    def __init__(self, handle: Handle, layer: int, request: _Request):
        self._handle = handle
        self._layer = layer
        self._request = request
        self.runner: LayerRunner | None = None
        self.heads: Tensor | None = None
        self.noted: tuple[str | None, ...] = ()  # by compiled code, which cannot count: the reason of its last call

    def __call__(self, call: AttentionCall) -> Tensor:
        known = self._request.now
        reason = call.refusal or known.reason
        if known.observe is not None and not call.refusal:
            known.observe(self._layer, call)
        output: Tensor | Dense = Dense(reason) if reason else self._attend(call, known)
        if not isinstance(output, Dense):
            self._note(None)
            return output
        if call.attends_to_itself:  # an IP-adapter's calls do not, and no plan is about them
            self._note(output.reason)
        return call.dense()

    def exchange(self, tokens: int) -> Exchange | None:
        """How the call that comes exchanges so many tokens for heads; None if it does not, or the model does it."""
        known = self._request.now
        sharing = known.sharing
        if sharing is None or sharing.group is None or known.tokens is None:
            return None
        parts = sharing.parts(*known.tokens, tokens)
        if known.reason is None:
            heads = self.heads
            if not torch.compiler.is_compiling():
                heads = self._handle.heads(known.plan, self._layer, known.bucket.device)
            assert heads is not None
            return Exchange(heads.index_select(0, known.bucket.reshape(1)).view(-1), parts, sharing.group, sharing.rank)
        return Exchange(None, parts, sharing.group, sharing.rank) if sharing.is_own else None

    def _attend(self, call: AttentionCall, known: _Known) -> Tensor | Dense:
        runner, bucket = self.runner, known.bucket
        if not torch.compiler.is_compiling():
            runner = known.runner.layers[self._layer]
            if runner.device != call.query.device:
                runner = self._handle.runner(known.plan, call.query.device).layers[self._layer]
        if runner is None:
            raise InputError("paroattn was applied to a transformer on the meta device; apply it where it runs")
        visual = runner.visual_tokens
        if call.with_text is not None and visual is None:
            return Dense("text has masks of its own, and only a plan says which tokens are text")
        output = runner(call.query, call.key, call.value, bucket=bucket, key_mask=call.key_mask)
        if call.with_text is None or visual is None or isinstance(output, Dense):
            return output
        return call.with_text(output, call.query.shape[1] - visual)

    def _note(self, reason: str | None) -> None:
        if torch.compiler.is_compiling():
            if reason is not None and self._handle.strict:
                raise PlanError(reason)
            self.noted = (reason,)
        else:
            self._handle.count(reason)


def check_model(plan: Plan, identity: ModelIdentity) -> None:
    """Raise `PlanError` unless the plan was made for a model like this one."""
    labels = {"class_name": "class", "heads": "number of heads", "layers": "number of layers", "head_dim": "head_dim"}
    for name, label in labels.items():
        expected, found = getattr(plan.model, name), getattr(identity, name)
        if expected != found:
            raise PlanError(f"plan is for another model: its {label} is {expected}, this model's is {found}")
    if plan.model.config_hash != identity.config_hash:
        raise PlanError(
            "plan is for another model: the class and sizes agree but the config differs "
            f"(hash {plan.model.config_hash[:12]}, this model's {identity.config_hash[:12]}). Calibrate this model."
        )
