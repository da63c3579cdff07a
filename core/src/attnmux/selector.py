"""Which backend serves a request: precedence, capabilities, and a report that says why.

Precedence: `backend=` argument, `use_backend` scope, global force, ATTNMUX_BACKEND, `default_backend=`, automatic. The
first four are explicit: honoured, or refused with the reasons. A default is its layer author's preference: where it
cannot serve, automatic choice follows and the report says so. Automatic choice takes exact backends only.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from attnmux.candidates import Candidates, Choice, Selection
from attnmux.errors import AttnmuxError, UnsupportedRequestError
from attnmux.hooks import get_hook_runner
from attnmux.registry import get_registry
from attnmux.settings import (
    ENV_BACKEND,
    EnvironmentSnapshot,
    get_env_variable_attn_backend,
    get_global_forced_attn_backend,
    global_force_attn_backend,
    global_force_attn_backend_context_manager,
    raw_environment,
    read_environment,
    scoped_backend,
    use_backend,
)
from attnmux.spec import AttentionBackendEnum, AttentionRequest, backend_name_to_enum

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from attnmux.backend import AttentionBackend
    from attnmux.report import SelectionReport

__all__ = [
    "AttentionBackendEnum",
    "Selection",
    "backend_name_to_enum",
    "explain",
    "get_attn_backend",
    "get_env_variable_attn_backend",
    "get_global_forced_attn_backend",
    "global_force_attn_backend",
    "global_force_attn_backend_context_manager",
    "select_backend",
    "use_backend",
]

_CACHE_LIMIT = 4096


_cache: dict[tuple[object, ...], Selection] = {}


def select_backend(
    request: AttentionRequest,
    *,
    backend: AttentionBackendEnum | str | None = None,
    supported: Iterable[AttentionBackendEnum | str] | None = None,
    default_backend: AttentionBackendEnum | str | None = None,
) -> Selection:
    """Choose the backend for a request.

    Args:
        request: What is asked; device "cuda" means the current one.
        backend: Explicit choice, by member or name; wins over scope, force and variable.
        supported: The layer's allow-list; None = no restriction.
        default_backend: Preference of the layer's author.

    Returns:
        The backend with its report. A repeated call with the same inputs takes under 2 microseconds.

    Raises:
        UnknownBackendError: A name that is neither known nor discovered.
        BackendNotInstalledError: A known backend whose distribution is missing; names the pip command.
        BackendUnavailableError: It cannot run on this machine, or a variable disables it.
        UnsupportedRequestError: It cannot serve the request, is outside `supported`, or nothing can serve it; all
            reasons are listed.
        PluginLoadError, PluginApiError, PluginConflictError: Its plugin is broken or claimed twice.
    """
    allowed = supported if supported is None or type(supported) is tuple else _as_tuple(supported)
    # every input of the choice, and of the registry beneath it
    key = (
        request,
        backend,
        allowed,
        default_backend,
        scoped_backend(),
        get_global_forced_attn_backend(),
        raw_environment(),
        get_registry().generation,
        _current_cuda_device() if request.device == "cuda" else None,
    )
    selection = _cache.get(key)
    if selection is None:
        selection = _select(request, backend, allowed, default_backend)
        if len(_cache) >= _CACHE_LIMIT:
            _cache.clear()
        _cache[key] = selection
    return selection


def get_attn_backend(
    head_size: int,
    dtype: torch.dtype | str,
    supported_attention_backends: Sequence[AttentionBackendEnum | str] | None = None,
    *,
    backend: AttentionBackendEnum | str | None = None,
    default_backend: AttentionBackendEnum | str | None = None,
    request: AttentionRequest | None = None,
) -> type[AttentionBackend]:
    """Return the class of the backend for a head size and dtype.

    Args:
        head_size: Channels of one head.
        dtype: Of q, k and v.
        supported_attention_backends: The layer's allow-list; None = no restriction.
        backend: Explicit choice.
        default_backend: Preference of the layer's author.
        request: Everything else that is asked; its head_size and dtype must agree. Without one: the current CUDA device
            if there is one, else the CPU, and no further wishes.

    Raises:
        UnsupportedRequestError: `request` disagrees with `head_size` or `dtype`; otherwise as `select_backend`.
    """
    if request is None:
        request = _plain_request(head_size, dtype, current_device())
    elif request.head_size != head_size or request.dtype != str(dtype).removeprefix("torch."):
        raise UnsupportedRequestError(
            f"request= says head_size={request.head_size}, dtype={request.dtype}; the arguments say "
            f"head_size={head_size}, dtype={dtype}. Make them agree"
        )
    return select_backend(
        request, backend=backend, supported=supported_attention_backends, default_backend=default_backend
    ).backend_class


def explain(
    request: AttentionRequest,
    *,
    backend: AttentionBackendEnum | str | None = None,
    supported: Iterable[AttentionBackendEnum | str] | None = None,
    default_backend: AttentionBackendEnum | str | None = None,
) -> SelectionReport:
    """Return the report of a selection, also where it fails for want of a backend; arguments as `select_backend`.

    Raises:
        AttnmuxError: The failure has no report: an unknown name, an empty allow-list.
    """
    try:
        return select_backend(request, backend=backend, supported=supported, default_backend=default_backend).report
    except AttnmuxError as error:
        if error.report is None:
            raise
        return error.report


@functools.lru_cache(maxsize=512)
def _plain_request(head_size: int, dtype: torch.dtype | str, device: str) -> AttentionRequest:
    return AttentionRequest(head_size=head_size, dtype=dtype, device=device)  # type: ignore[arg-type]


@functools.cache
def _cuda() -> Any:
    """Return the module torch.cuda where there is a device, else None."""
    import torch

    return torch.cuda if torch.cuda.is_available() else None


@functools.cache
def _only_device() -> str | None:
    """Return the device where there is no choice: "cpu" without a CUDA device, "cuda:0" with one."""
    cuda = _cuda()
    if cuda is None:
        return "cpu"
    return "cuda:0" if cuda.device_count() == 1 else None


def _current_cuda_device() -> int | None:
    """Return the current CUDA device's index, without making a CUDA context; None where there is no device."""
    cuda = _cuda()
    if cuda is None:
        return None
    # asking torch takes 3 us on the host of an H100, more than all the rest of a cached selection
    if _only_device() or not cuda.is_initialized():
        return 0
    return int(cuda.current_device())


def current_device() -> str:
    """Return the device that layers are built for: the current CUDA device if there is one, else the CPU."""
    return _only_device() or f"cuda:{_current_cuda_device()}"


def _cuda_arch(request: AttentionRequest) -> int | None:
    """Return the compute capability of the request's device as 10 * major + minor, or None."""
    cuda = _cuda()
    if request.device_type != "cuda" or cuda is None:
        return None
    index = int(request.device.partition(":")[2] or _current_cuda_device() or 0)
    if index >= cuda.device_count():
        return None
    major, minor = cuda.get_device_capability(index)
    return int(major * 10 + minor)


def _as_tuple(supported: Iterable[AttentionBackendEnum | str]) -> tuple[AttentionBackendEnum | str, ...]:
    if isinstance(supported, str):
        raise UnsupportedRequestError(
            f"supported_attention_backends is a list of backends, got the string {supported!r}; write [{supported!r}]"
        )
    return tuple(supported)


def _explicit_choice(backend: AttentionBackendEnum | str | None, environment: EnvironmentSnapshot) -> Choice | None:
    """Return the explicit choice of the highest rank, or None."""
    if backend is not None:
        return Choice(backend, "argument", "")
    if (scoped := scoped_backend()) is not None:
        return Choice(scoped, "scope", "use_backend")
    if (forced := get_global_forced_attn_backend()) is not None:
        return Choice(forced, "forced", "global_force_attn_backend")
    if environment.backend is not None:
        return Choice(environment.backend, "environment", ENV_BACKEND)
    return None


def _select(
    request: AttentionRequest,
    backend: AttentionBackendEnum | str | None,
    supported: tuple[AttentionBackendEnum | str, ...] | None,
    default_backend: AttentionBackendEnum | str | None,
) -> Selection:
    if supported is not None and not supported:
        raise UnsupportedRequestError(
            "supported_attention_backends is empty, so that no backend could ever serve; leave it out to allow every one"
        )
    environment = read_environment()
    candidates = Candidates(get_registry(), environment, request, supported, _cuda_arch(request))
    explicit = _explicit_choice(backend, environment)
    selection = candidates.honour(explicit) if explicit else candidates.prefer(default_backend)
    get_hook_runner(candidates.registry, environment).call("attnmux_selected", report=selection.report)
    return selection
