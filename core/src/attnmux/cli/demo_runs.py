"""Runs the tokens of a clip through every backend that can serve them, and measures what comes out."""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from attnmux.cli.demo_probe import find_kept_keys, probe_queries
from attnmux.errors import AttnmuxError, BackendNotInstalledError, UnsupportedRequestError
from attnmux.layers import LocalAttention
from attnmux.registry import LoadFailure, Registry, install_command
from attnmux.selector import select_backend
from attnmux.spec import AttentionBackendEnum, AttentionRequest

if TYPE_CHECKING:
    from attnmux.backend import AttentionBackend, AttentionMetadata
    from attnmux.selector import Selection
    from attnmux.testing.clip import ClipTokens

__all__ = ["DENSE", "BackendRun", "DemoSettings", "NotRun", "build_metadata", "candidate_names", "run_backend"]

DENSE = "TORCH_SDPA"
"""The backend that the others are compared with."""

# the step the metadata are built for: late, because some backends stay dense for the first steps of a denoising run
_LATE_STEP = 49
# seconds after which a backend is not timed again, and its runs at most
_TIMING_BUDGET_S = 5.0
_TIMED_RUNS = 3

Progress = Callable[[str], None]


@dataclass(frozen=True)
class DemoSettings:
    """What holds for every backend of one demo.

    Attributes:
        device: Where attention runs.
        sparsity: Fraction of keys that sparse backends are asked to leave out, in [0, 1).
        query: Token whose kept keys are shown.
    """

    device: torch.device
    sparsity: float
    query: int


class NotRun(NamedTuple):
    """A backend that did not run: its name, why, and whether it broke (as opposed to having refused)."""

    name: str
    reason: str
    has_failed: bool = False


@dataclass(frozen=True)
class BackendRun:
    """One backend's result.

    Attributes:
        name: Backend.
        distribution: Who ships it.
        version: Its version.
        exactness: What its capabilities declare.
        engine: What ran, in the backend's words; may be empty.
        dtype: Of q, k and v.
        milliseconds: Median over `timed_runs`, after one run that is not counted.
        timed_runs: How many runs were timed.
        output: `[1, S, H, value channels]` float32 on the CPU.
        frames: `[T, height, width, 3]`.
        psnr: Of the frames, in dB.
        kept_fraction: Share of the keys that a query attends to, in (0, 1], as measured; None if it was not.
        kept: Keys that the settings' query attends to, bool `[S]`; None if unknown.
    """

    name: str
    distribution: str
    version: str
    exactness: str
    engine: str
    dtype: str
    milliseconds: float
    timed_runs: int
    output: torch.Tensor
    frames: torch.Tensor
    psnr: float
    kept_fraction: float | None
    kept: torch.Tensor | None

    def compared_with(self, dense: BackendRun) -> dict[str, float]:
        """Return speed, cosine similarity and relative L1 distance against the dense result."""
        ours, theirs = self.output.double().flatten(), dense.output.double().flatten()
        return {
            "speed": dense.milliseconds / self.milliseconds,
            "cosine": float(torch.dot(ours, theirs) / (ours.norm() * theirs.norm())),
            "relative_l1": float((ours - theirs).abs().sum() / theirs.abs().sum()),
        }


def candidate_names(registry: Registry, wanted: list[str]) -> list[str]:
    """Return the backends to try, the dense one first: those that are wanted, else all known and discovered ones.

    Raises:
        UnknownBackendError: A wanted name is neither known nor discovered.
    """
    if wanted:
        names = [registry.resolve(name) for name in wanted]
    else:
        names = sorted({*registry.records(), *AttentionBackendEnum.__members__} - {"NO_ATTENTION"})
    return [DENSE, *(name for name in dict.fromkeys(names) if name != DENSE)]


def run_backend(
    registry: Registry, name: str, tokens: ClipTokens, settings: DemoSettings, progress: Progress
) -> BackendRun | NotRun:
    """Run one backend, or say why it did not.

    Args:
        registry: Where backends come from.
        name: Backend.
        tokens: The clip.
        settings: See `DemoSettings`.
        progress: Is told what comes next, twice.
    """
    try:
        dtype = _choose_dtype(registry.spec(name).capabilities.dtypes, settings.device)
        request = AttentionRequest(
            head_size=tokens.head_size,
            dtype=dtype,
            device=str(settings.device),
            num_heads=tokens.num_heads,
            softmax_scale=tokens.softmax_scale,
        )
        selection = select_backend(request, backend=name)
        metadata = build_metadata(selection.backend_class, tokens.grid, settings)
    except BackendNotInstalledError:
        return NotRun(name, f"not installed: {install_command(name)}")
    except AttnmuxError as error:
        return NotRun(name, error.reasons_about(name))
    # whatever a backend raises is recorded, and the others go on
    claim = registry.records()[name].claim
    result = registry.guard(
        claim, name, "demo", lambda: _measure(selection, dtype, metadata, tokens, settings, progress)
    )
    if isinstance(result, LoadFailure):
        return NotRun(name, f"it raised {result.cause}", has_failed=True)
    run: BackendRun = result
    return run


def build_metadata(
    backend: type[AttentionBackend], grid: tuple[int, int, int], settings: DemoSettings
) -> AttentionMetadata:
    """Build a backend's metadata for a grid of tokens, knowing nothing of the backend.

    The parameters of its builder's `build` tell by their names what they want: `raw_latent_shape` the grid, `patch_size`
    one token, `device`, `current_timestep` a late step, a name that ends in `sparsity` the fraction left out, and
    `topk_ratio` the fraction kept. Parameters with other names keep their defaults.

    Raises:
        UnsupportedRequestError: A parameter of another name has no default.
    """
    known: dict[str, Any] = {
        "current_timestep": _LATE_STEP,
        "raw_latent_shape": grid,
        "patch_size": (1, 1, 1),
        "device": settings.device,
        "topk_ratio": 1 - settings.sparsity,
    }
    builder = backend.get_builder_cls()()
    builder.prepare()
    arguments: dict[str, Any] = {}
    unknown = []
    for name, parameter in inspect.signature(builder.build).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name.lower().endswith("sparsity"):
            arguments[name] = settings.sparsity
        elif name in known:
            arguments[name] = known[name]
        elif parameter.default is parameter.empty:
            unknown.append(name)
    if unknown:
        raise UnsupportedRequestError(
            f"{type(builder).__name__}.build needs {', '.join(unknown)}, of which the demo knows nothing; give them "
            f"defaults. The demo can fill in: {', '.join(known)}, and names that end in 'sparsity'"
        )
    return builder.build(**arguments)  # type: ignore[no-any-return]


def _choose_dtype(declared: frozenset[str], device: torch.device) -> str:
    """Return the dtype to run in: full precision on a CPU, half on a GPU, as far as the backend declares it."""
    order = ("float32", "bfloat16", "float16", "float64")
    if device.type != "cpu":
        order = ("bfloat16", "float16", "float32", "float64")
    return next((dtype for dtype in order if dtype in declared), order[0])


def _measure(
    selection: Selection,
    dtype: str,
    metadata: AttentionMetadata,
    tokens: ClipTokens,
    settings: DemoSettings,
    progress: Progress,
) -> BackendRun:
    spec, row = selection.spec, selection.report[selection.spec.name]
    progress(f"{spec.name}: attention")
    tokens = tokens.to(settings.device, getattr(torch, dtype))
    layer = LocalAttention(
        tokens.num_heads,
        tokens.head_size,
        softmax_scale=tokens.softmax_scale,
        backend=spec.name,
        dtype=getattr(torch, dtype),
    ).to(settings.device)

    def attend() -> torch.Tensor:
        with torch.no_grad():
            output: torch.Tensor = layer(tokens.q, tokens.k, tokens.v, attn_metadata=metadata)
        return output

    output, times = _timed(attend, settings.device)
    frames = tokens.frames(output)

    progress(f"{spec.name}: kept keys")
    kept_fraction: float | None = None
    kept: torch.Tensor | None = None
    if spec.capabilities.exactness == "exact":
        kept_fraction = 1.0
    else:
        weighted = find_kept_keys(
            spec, tokens, metadata, probe_queries(tokens, settings.query), seconds_per_run=statistics.median(times)
        )
        if weighted is not None:
            kept_fraction, kept = float(weighted.double().mean()), weighted[0, 0].cpu()
    return BackendRun(
        name=spec.name,
        distribution=row.distribution,
        version=row.version,
        exactness=spec.capabilities.exactness or "undeclared",
        engine=selection.engine,
        dtype=dtype,
        milliseconds=statistics.median(times) * 1000,
        timed_runs=len(times),
        output=output[..., : tokens.value_channels].float().cpu(),
        frames=frames,
        psnr=tokens.psnr(frames),
        kept_fraction=kept_fraction,
        kept=kept,
    )


def _timed(attend: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, list[float]]:
    """Return the output, and the seconds of every run after the first; of the first where it took all the time there is."""

    def timed_call() -> tuple[torch.Tensor, float]:
        _synchronize(device)
        started = time.perf_counter()
        output = attend()
        _synchronize(device)
        return output, time.perf_counter() - started

    output, spent = timed_call()
    # what warming up costs is lost in so long a run
    times = [spent] if spent >= _TIMING_BUDGET_S else []
    while len(times) < _TIMED_RUNS and (not times or spent < _TIMING_BUDGET_S):
        _, seconds = timed_call()
        times.append(seconds)
        spent += seconds
    if not math.isfinite(float(output.double().sum())):
        raise ArithmeticError("its output holds numbers that are not finite")
    return output, times


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
