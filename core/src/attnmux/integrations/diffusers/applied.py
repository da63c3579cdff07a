"""`apply`: replace the attention of a model by layers of attnmux, and take them out again."""

from __future__ import annotations

import inspect
import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from attnmux.errors import AttnmuxError, UnsupportedRequestError
from attnmux.integrations.diffusers.modules import AttentionModule, chosen, chosen_as_self, find_attention
from attnmux.integrations.diffusers.parameters import load_parameters
from attnmux.integrations.diffusers.passes import ModelPasses
from attnmux.integrations.diffusers.processor import GATE, AttnmuxProcessor, make_processor
from attnmux.integrations.versions import require
from attnmux.layers import LocalAttention
from attnmux.schedule import LayerPlan, Schedule
from attnmux.selector import select_backend
from attnmux.spec import AttentionBackendEnum, AttentionRequest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from attnmux.backend import AttentionBackend
    from attnmux.candidates import Selection

__all__ = ["Applied", "Replacement", "apply"]

_logger = logging.getLogger("attnmux")


@dataclass(frozen=True)
class Replacement:
    """One replaced module.

    Attributes:
        name: Its path in the model.
        role: "self", "cross" or "other".
        layer: Index of its block, -1 outside of the blocks.
        plan: Its backend in every phase of the schedule.
        selections: The selection of each of its backends, by name, with the reasons.
    """

    name: str
    role: str
    layer: int
    plan: LayerPlan
    selections: Mapping[str, Selection]


class Applied:
    """What `apply` did to a model; a context manager that undoes it.

    Attributes:
        replaced: The replaced modules.
        kept: Paths of the attention modules that were left as they are.
        loaded: Names of backend parameters that came from the checkpoint.
        initialised: Names of backend parameters that have their initial values.
    """

    def __init__(
        self,
        model: nn.Module,
        replaced: Sequence[Replacement],
        kept: Sequence[str],
        originals: Sequence[tuple[Any, object]],
        passes: ModelPasses,
    ) -> None:
        self.replaced = tuple(replaced)
        self.kept = tuple(kept)
        self.loaded: tuple[str, ...] = ()
        self.initialised: tuple[str, ...] = ()
        self._model = model
        self._originals = list(originals)
        self._passes = passes

    @property
    def step(self) -> int | None:
        """Index of the denoising step, from 0; None = not told. A forward context around the model call wins over it."""
        return self._passes.step

    @step.setter
    def step(self, step: int | None) -> None:
        self._passes.step = step

    def on_step_end(
        self, pipeline: Any, step: int, timestep: object, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Count the steps of a pipeline: its argument `callback_on_step_end`. Set `step = 0` before the first."""
        is_last = step + 1 >= getattr(pipeline, "num_timesteps", step + 2)
        self._passes.step = 0 if is_last else step + 1
        return callback_kwargs

    def restore(self) -> None:
        """Put the model's own processors back, with the hooks and the backends' parameters gone; twice does nothing."""
        for module, processor in self._originals:
            module.set_processor(processor)
        self._originals.clear()
        self._passes.remove()

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} of {len(self.replaced) + len(self.kept)} attention modules replaced"]
        for plan in dict.fromkeys(str(item.plan) for item in self.replaced):
            names = [item.name for item in self.replaced if str(item.plan) == plan]
            lines.append(f"  {plan}: {names[0]}{f' to {names[-1]} ({len(names)})' if len(names) > 1 else ''}")
        if self.loaded:
            lines.append(f"parameters loaded: {len(self.loaded)}")
        if self.initialised:
            lines.append(f"parameters initialised: {len(self.initialised)}, such as {self.initialised[0]}")
        return "\n".join(lines)

    def explain(self) -> str:
        """Return for every attention module which backend serves it and when, and for every backend the reasons."""
        width = max(len(name) for name in [item.name for item in self.replaced] + list(self.kept))
        lines = [str(self).partition("\n")[0]]
        lines += [f"  {item.name:<{width}}  {item.role:<5}  {item.plan}" for item in self.replaced]
        lines += [f"  {name:<{width}}  kept" for name in self.kept]
        reports = {name: chosen for item in self.replaced for name, chosen in item.selections.items()}
        for name, selection in reports.items():
            lines += ["", f"{name}:", selection.report.explain()]
        return "\n".join(lines)


def apply(
    model: nn.Module,
    backend: AttentionBackendEnum | str | None = None,
    *,
    modules: str | Sequence[str] = "self",
    schedule: Schedule | None = None,
    grid: tuple[int, int, int] | None = None,
    metadata: Mapping[str, Any] | None = None,
    impl_args: Mapping[str, Any] | None = None,
    softmax_scale: float | None = None,
    assume_full_masks: bool = False,
    device: torch.device | str | None = None,
    checkpoint: str | Path | None = None,
) -> Applied:
    """Replace the attention inside a diffusers transformer by an attnmux backend.

    The model is changed as a whole or, on an error, not at all. Compile it afterwards, block by block
    (`model.compile_repeated_blocks(fullgraph=True)`): the hooks that build metadata stay outside of the blocks.

    Args:
        model: A transformer of diffusers whose processors attend through `dispatch_attention_fn` or
            `F.scaled_dot_product_attention`: Wan, HunyuanVideo, CogVideoX, Flux and most others.
        backend: Backend of every chosen module; None = as selection gives (scope, force, variable, automatic).
        modules: Which attention modules: "self", "cross", "other", "all", patterns of paths, or several of these.
        schedule: A choice by layer, role and step instead of `backend`. Where it depends on the step, someone must tell it:
            see `Applied.on_step_end` and `Applied.step`.
        grid: Tokens of the video (frames, rows, columns); None = from the latents of each call and the model's patch size.
        metadata: Options of the backends' metadata builders, such as `{"VSA_sparsity": 0.8}`.
        impl_args: Constructor arguments of the backends' impls, such as `{"topk_ratio": 0.1}`.
        softmax_scale: Factor on the scores that the model asks for, where it is not `head_size ** -0.5`.
        assume_full_masks: The masks that the model passes hide nothing, as those of HunyuanVideo with text that is not padded.
            They are not passed on, so that backends without masks serve the model, and others are faster. A mask that hides
            a key all the same raises on a CPU; on a GPU it is a device-side assertion, which ends the process's use of
            the device. Nothing waits for the device.
        device: Where the model will run, such as "cuda" for one that is offloaded or moved later; None = where it is now.
        checkpoint: File or folder in safetensors form from which the backends' parameters come; those that it lacks keep
            their initial values, and a warning says which.

    Returns:
        What was done, to print, to steer and to undo.

    Raises:
        AttnmuxError: A backend cannot serve a module; nothing matches `modules`; an option belongs to no backend; the model
            is replaced already.
        MissingPackageError: diffusers is not installed, or too old.
    """
    require("diffusers")
    if schedule is not None and backend is not None:
        raise UnsupportedRequestError(
            f"backend={backend!r} and schedule= are both given; write the backend as the schedule's default"
        )
    schedule = Schedule(default=backend) if schedule is None else schedule
    found, num_layers = find_attention(model)
    if any(isinstance(item.module.processor, AttnmuxProcessor) for item in found):
        raise UnsupportedRequestError("attnmux is applied to this model already; restore() it first")
    targets = chosen(found, modules)
    options = _Options(dict(impl_args or {}), dict(metadata or {}))
    replaced, processors = [], []
    for item in targets:
        plan = schedule.resolve(item.layer, num_layers, item.role)
        selections = _select(item, plan, softmax_scale, None if device is None else str(device), model)
        held = {"assume_full_masks": assume_full_masks, "is_self": chosen_as_self(item, modules)}
        processors.append(_processor(item, plan, selections, softmax_scale, held, options))
        named = tuple(selections[name].spec.name for name in plan.backends)
        replaced.append(
            Replacement(item.name, item.role, item.layer, LayerPlan(plan.edges, named), _by_name(selections))
        )
    wanting = [_wanting_metadata(replaced, phase, options) for phase in range(len(schedule.edges))]
    options.refuse_unused()
    passes = ModelPasses(model, wanting, schedule.edges, grid, options.metadata)
    names = {item.name for item in targets}
    applied = Applied(
        model,
        replaced,
        [item.name for item in found if item.name not in names],
        [(item.module, item.module.processor) for item in targets],
        passes,
    )
    try:
        _load(applied, dict(zip((item.name for item in targets), processors, strict=True)), checkpoint)
    except BaseException:
        passes.remove()
        raise
    for item, processor in zip(targets, processors, strict=True):
        item.module.set_processor(processor)
    _logger.info("%s", applied)
    return applied


class _Options:
    """Options for several backends at once: each takes those that it knows, and one that nobody knows is refused."""

    def __init__(self, impl_args: dict[str, Any], metadata: dict[str, Any]) -> None:
        self.impl_args = impl_args
        self.metadata = metadata
        self._used: set[tuple[str, str]] = set()

    def for_impl(self, backend: type[AttentionBackend], layer: int) -> dict[str, Any]:
        init: Any = backend.get_impl_cls().__init__
        # impls that act by the layer's index look for it in the prefix, where not every model has it
        index = {"layer_idx": layer} if layer >= 0 and "layer_idx" in inspect.signature(init).parameters else {}
        return {**index, **self._known("impl_args", self.impl_args, init)}

    def for_builder(self, backend: type[AttentionBackend]) -> dict[str, Any]:
        return self._known("metadata", self.metadata, backend.get_builder_cls().build)

    def _known(self, kind: str, options: dict[str, Any], function: Any) -> dict[str, Any]:
        known = inspect.signature(function).parameters
        mine = {name: value for name, value in options.items() if name in known}
        self._used |= {(kind, name) for name in mine}
        return mine

    def refuse_unused(self) -> None:
        for kind, options in (("impl_args", self.impl_args), ("metadata", self.metadata)):
            if unused := sorted(name for name in options if (kind, name) not in self._used):
                raise UnsupportedRequestError(
                    f"{kind}: no backend that was chosen takes {', '.join(unused)}; remove it, or choose the backend it belongs to"
                )


def _select(
    item: AttentionModule, plan: LayerPlan, softmax_scale: float | None, device: str | None, model: nn.Module
) -> dict[str | None, Selection]:
    """Return the selection of each backend of a plan, under the name that the plan gives."""
    weight = item.module.to_q.weight
    selections: dict[str | None, Selection] = {}
    for name in dict.fromkeys(plan.backends):
        request = AttentionRequest(
            head_size=item.head_size,
            dtype=str(weight.dtype),
            device=str(weight.device) if device is None else device,
            num_heads=item.num_heads,
            num_kv_heads=item.num_kv_heads,
            cross_attention=item.role == "cross",
            # what is named is held to it at the call, so that a model in train mode may still be used for inference
            needs_backward=model.training and name is None,
            role=item.role,
            softmax_scale=softmax_scale,
        )
        try:
            selections[name] = select_backend(request, backend=name)
        except AttnmuxError as error:
            text = f"{item.name} ({item.role} attention): {error}"
            if device is None and weight.device.type == "cpu" and torch.cuda.is_available():
                text += (
                    " The model is on the CPU; where it will run on a GPU, move it first or give apply(device='cuda')."
                )
            error.args = (text, *error.args[1:])
            raise
    return selections


def _processor(
    item: AttentionModule,
    plan: LayerPlan,
    selections: Mapping[str | None, Selection],
    softmax_scale: float | None,
    held: Mapping[str, bool],
    options: _Options,
) -> AttnmuxProcessor:
    query = item.module.to_q
    layers: dict[str, LocalAttention] = {}
    needs_gate = False
    for selection in selections.values():
        needs_gate |= GATE in selection.spec.capabilities.extra_inputs and item.role != "cross"
        layer = LocalAttention(
            item.num_heads,
            item.head_size,
            item.num_kv_heads,
            softmax_scale,
            backend=selection.spec.name,
            dtype=query.weight.dtype,
            prefix=item.name,
            **options.for_impl(selection.backend_class, item.layer),
        )
        layers[selection.spec.name] = layer.to(query.weight.device)
    gate = None
    if needs_gate:
        gate = nn.Linear(
            query.in_features, item.num_heads * item.head_size, device=query.weight.device, dtype=query.weight.dtype
        )
        # a gate of zeros leaves the branch out, so that the model starts from what it was
        nn.init.zeros_(gate.weight)
        nn.init.zeros_(gate.bias)
    order = [selections[name].spec.name for name in plan.backends]
    processor = make_processor(item.module.processor, layers, order, gate, **held)
    return processor.train(item.module.training)


def _by_name(selections: Mapping[str | None, Selection]) -> dict[str, Selection]:
    return {selection.spec.name: selection for selection in selections.values()}


def _wanting_metadata(
    replaced: Sequence[Replacement], phase: int, options: _Options
) -> dict[str, type[AttentionBackend]]:
    """Return the backends of a phase that cannot run without metadata, or for which there are options."""
    wanting = {}
    for item in replaced:
        name = item.plan.backends[phase]
        selection = item.selections[str(name)]
        has_options = bool(options.for_builder(selection.backend_class))
        if selection.spec.capabilities.needs_metadata or has_options:
            wanting[str(name)] = selection.backend_class
    return wanting


def _load(applied: Applied, processors: Mapping[str, AttnmuxProcessor], checkpoint: str | Path | None) -> None:
    names = [f"{path}.processor.{name}" for path, processor in processors.items() for name in processor.state_dict()]
    loaded = [] if checkpoint is None else load_parameters(processors, checkpoint)
    applied.loaded = tuple(loaded)
    applied.initialised = tuple(name for name in names if name not in set(loaded))
    if checkpoint is not None and applied.initialised:
        warnings.warn(
            f"{checkpoint} holds {len(loaded)} of the {len(names)} parameters that the backends bring; these keep their initial "
            f"values and need training: {', '.join(applied.initialised)}",
            stacklevel=3,
        )
