"""What one forward pass of the model needs around it: the step, the metadata of the video's grid, the schedule's phase."""

from __future__ import annotations

import bisect
import dataclasses
import inspect
import threading
from typing import TYPE_CHECKING, Any

import torch

from attnmux.context import get_forward_context, set_forward_context
from attnmux.errors import ForwardContextError, UnsupportedRequestError
from attnmux.integrations.diffusers.processor import phase

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from attnmux.backend import AttentionBackend, AttentionMetadata

__all__ = ["ModelPasses", "PassState"]

Grid = tuple[int, int, int]

_FACTS = ("current_timestep", "raw_latent_shape", "patch_size", "device")
"""Arguments of metadata builders that are known here."""

_STEPS = (0, *range(1, 100), 10**6)
"""Steps by which options that depend on the step are told from those that do not."""

# Where frames, rows and columns are in the latents that a model takes, if not at 2, 3 and 4.
_VIDEO_AXES = {"CogVideoXTransformer3DModel": (1, 3, 4)}


class PassState:
    """Makes the step, the metadata and the phase current; enters again for every recomputation of a block."""

    def __init__(self, step: int, metadata: AttentionMetadata | None, phase_index: int) -> None:
        self._context = {"current_timestep": step, "attn_metadata": metadata}
        self._phase = phase_index

    def enter(self) -> tuple[set_forward_context, int]:
        """Make it current and return what `leave` takes."""
        context = set_forward_context(**self._context)  # type: ignore[arg-type]
        context.__enter__()
        previous = phase.index
        phase.index = self._phase
        return context, previous

    @staticmethod
    def leave(entered: tuple[set_forward_context, int]) -> None:
        """Bring back what was current before."""
        context, phase.index = entered
        context.__exit__(None, None, None)


class _InPass:
    """A block that runs within a pass, whenever it is called: activation checkpointing calls it again in backward."""

    def __init__(self, block: Callable[..., Any], state: PassState) -> None:
        self._block = block
        self._state = state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        entered = self._state.enter()
        try:
            return self._block(*args, **kwargs)
        finally:
            self._state.leave(entered)


class _Running(threading.local):
    """The passes of this thread that have begun and not ended; here and not in `ModelPasses`, which may be copied."""

    def __init__(self) -> None:
        self.stacks: dict[int, list[Any]] = {}


_running = _Running()


class ModelPasses:
    """Hooks on a model's forward.

    Args:
        model: The transformer.
        backends: Backend classes by name, of every phase those that want metadata.
        edges: First steps of the phases.
        grid: Tokens of the video (T, H, W); None = from the latents of each call.
        metadata: Options of the metadata builders.

    Raises:
        UnsupportedRequestError: Two backends of one phase want metadata, or an option belongs to no builder.
    """

    def __init__(
        self,
        model: nn.Module,
        backends: Sequence[Mapping[str, type[AttentionBackend]]],
        edges: Sequence[int],
        grid: Grid | None,
        metadata: Mapping[str, Any],
    ) -> None:
        self.step: int | None = None
        self._model = model
        self._edges = list(edges)
        self._grid = grid
        self._builders = [self._builder(wanting, metadata) for wanting in backends]
        self._goes_by_step: dict[int, bool] = {}
        self._checkpointing = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        self._handles: list[Any] = []
        # where nothing changes from pass to pass the model stays free of hooks, and compiles as a whole
        if len(self._edges) > 1 or any(self._builders):
            self._handles = [
                model.register_forward_pre_hook(self._before, with_kwargs=True),
                model.register_forward_hook(self._after, always_call=True),
            ]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    @staticmethod
    def _builder(wanting: Mapping[str, type[AttentionBackend]], options: Mapping[str, Any]) -> Any:
        if len(wanting) > 1:
            raise UnsupportedRequestError(
                f"{' and '.join(wanting)} want metadata in the same step, and a forward pass carries those of one backend; "
                "use one of them, or separate them by steps"
            )
        for name, backend in wanting.items():
            builder = backend.get_builder_cls()()
            known = inspect.signature(builder.build).parameters
            facts = [fact for fact in _FACTS if fact in known]
            mine = {key: value for key, value in options.items() if key in known}
            missing = [
                key
                for key, parameter in known.items()
                if parameter.default is parameter.empty
                and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
                and key not in facts
                and key not in mine
            ]
            if missing:
                raise UnsupportedRequestError(
                    f"the metadata of {name} need {', '.join(missing)}; give apply(metadata={{{missing[0]!r}: ...}})"
                )
            return builder, facts, mine
        return None

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            raise UnsupportedRequestError(
                "the metadata of a forward pass are made on the host, outside of compiled code: compile the model block by "
                "block, model.compile_repeated_blocks(fullgraph=True)"
            )
        step, metadata = self._step()
        index = bisect.bisect_right(self._edges, step or 0) - 1
        if step is None and len(self._edges) > 1:
            raise _untold("the schedule depends")
        if metadata is None and self._builders[index] is not None:
            metadata = self._build(index, step, args, kwargs)
        state = PassState(step or 0, metadata, index)
        wrapped = []
        for holder in self._checkpointing:
            inner = getattr(holder, "_gradient_checkpointing_func", None)
            if holder.gradient_checkpointing and inner is not None:
                holder._gradient_checkpointing_func = _within(inner, state)  # type: ignore[assignment]
                wrapped.append((holder, inner))
        self._stack().append((state.enter(), wrapped))

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        stack = _running.stacks.get(id(self))
        if not stack:
            # the pre-hook raised
            return
        entered, wrapped = stack.pop()
        if not stack:
            del _running.stacks[id(self)]
        for holder, inner in wrapped:
            holder._gradient_checkpointing_func = inner
        PassState.leave(entered)

    def _build(self, index: int, step: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        builder, names, options = self._builders[index]
        facts = self._facts(names, step or 0, args, kwargs)
        if step is None and "current_timestep" in facts:
            if index not in self._goes_by_step:
                made = (_comparable(builder.build(**{**facts, "current_timestep": at}, **options)) for at in _STEPS)
                first = next(made)
                self._goes_by_step[index] = any(other != first for other in made)
            if self._goes_by_step[index]:
                raise _untold(f"metadata={options!r} depend")
        return builder.build(**facts, **options)

    def _stack(self) -> list[Any]:
        return _running.stacks.setdefault(id(self), [])

    def _step(self) -> tuple[int | None, AttentionMetadata | None]:
        """Return the step and the metadata that the caller's own context gives; else the handle's step."""
        try:
            context = get_forward_context()
        except ForwardContextError:
            return self.step, None
        return context.current_timestep, context.attn_metadata

    def _facts(
        self, wanted: Sequence[str], step: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, object]:
        latents = kwargs.get("hidden_states", args[0] if args else None)
        if not isinstance(latents, torch.Tensor):
            raise UnsupportedRequestError(
                f"{type(self._model).__name__} was called without hidden_states, from which the grid is read"
            )
        facts: dict[str, object] = {"current_timestep": step, "device": latents.device}
        if "raw_latent_shape" in wanted or "patch_size" in wanted:
            facts["raw_latent_shape"], facts["patch_size"] = self._geometry(latents)
        return {name: facts[name] for name in wanted}

    def _geometry(self, latents: torch.Tensor) -> tuple[Grid, Grid]:
        if self._grid is not None:
            return self._grid, (1, 1, 1)
        config: Any = getattr(self._model, "config", None)
        patch = getattr(config, "patch_size", None)
        if latents.dim() != 5 or patch is None:
            raise UnsupportedRequestError(
                f"{type(self._model).__name__} takes hidden_states {list(latents.shape)}, from which no video grid can be "
                "read; give apply(grid=(frames, rows, columns)) in tokens"
            )
        if isinstance(patch, int):
            patch = (getattr(config, "patch_size_t", None) or 1, patch, patch)
        frames, rows, columns = (
            int(latents.shape[axis]) for axis in _VIDEO_AXES.get(type(self._model).__name__, (2, 3, 4))
        )
        return (frames, rows, columns), (int(patch[0]), int(patch[1]), int(patch[2]))


def _untold(what: str) -> ForwardContextError:
    return ForwardContextError(
        f"{what} on the denoising step, and nothing says which one this is: pass callback_on_step_end=handle.on_step_end to the "
        "pipeline and set handle.step = 0, or wrap the model call in attnmux.set_forward_context(current_timestep=...)"
    )


def _comparable(value: Any) -> Any:
    """Return what two metadata can be compared by, without reading tensors or the step itself."""
    if isinstance(value, torch.Tensor):
        return value.shape
    if isinstance(value, (list, tuple)):
        return [_comparable(item) for item in value]
    if dataclasses.is_dataclass(value):
        fields = (field.name for field in dataclasses.fields(value) if field.name != "current_timestep")
        return [(name, _comparable(getattr(value, name))) for name in fields]
    return value


def _within(inner: Callable[..., Any], state: PassState) -> Callable[..., Any]:
    def checkpoint(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return inner(_InPass(block, state), *args, **kwargs)

    return checkpoint
