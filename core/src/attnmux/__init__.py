"""attnmux: one attention layer, many backends, one select line.

    from attnmux import LocalAttention, use_backend

    with use_backend("VIDEO_SPARSE_ATTN"):
        layer = LocalAttention(num_heads=12, head_size=128)

Importing this package loads no torch; names that need it are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnmux.errors import (
    AttnmuxError,
    BackendNotInstalledError,
    BackendUnavailableError,
    ForwardContextError,
    MissingPackageError,
    PluginApiError,
    PluginConflictError,
    PluginLoadError,
    SequenceParallelError,
    UnknownBackendError,
    UnsupportedRequestError,
)
from attnmux.spec import (
    AttentionBackendEnum,
    AttentionRequest,
    BackendSpec,
    Capabilities,
    Reason,
    backend_name_to_enum,
)

if TYPE_CHECKING:
    from attnmux.backend import (
        AttentionBackend,
        AttentionImpl,
        AttentionMetadata,
        AttentionMetadataBuilder,
        DenseMetadataBuilder,
    )
    from attnmux.context import ForwardContext, get_forward_context, set_forward_context
    from attnmux.distributed import SeqPlan, SPGroup, init_sequence_parallel, use_sp
    from attnmux.hookspecs import hookimpl
    from attnmux.layers import DistributedAttention, DistributedAttention_VSA, LocalAttention
    from attnmux.report import SelectionReport
    from attnmux.selector import (
        Selection,
        explain,
        get_attn_backend,
        get_env_variable_attn_backend,
        get_global_forced_attn_backend,
        global_force_attn_backend,
        global_force_attn_backend_context_manager,
        select_backend,
        use_backend,
    )

__all__ = [
    "AttentionBackend",
    "AttentionBackendEnum",
    "AttentionImpl",
    "AttentionMetadata",
    "AttentionMetadataBuilder",
    "AttentionRequest",
    "AttnmuxError",
    "BackendNotInstalledError",
    "BackendSpec",
    "BackendUnavailableError",
    "Capabilities",
    "DenseMetadataBuilder",
    "DistributedAttention",
    "DistributedAttention_VSA",
    "ForwardContext",
    "ForwardContextError",
    "LocalAttention",
    "MissingPackageError",
    "PluginApiError",
    "PluginConflictError",
    "PluginLoadError",
    "Reason",
    "SPGroup",
    "Selection",
    "SelectionReport",
    "SeqPlan",
    "SequenceParallelError",
    "UnknownBackendError",
    "UnsupportedRequestError",
    "__version__",
    "backend_name_to_enum",
    "explain",
    "get_attn_backend",
    "get_env_variable_attn_backend",
    "get_forward_context",
    "get_global_forced_attn_backend",
    "global_force_attn_backend",
    "global_force_attn_backend_context_manager",
    "hookimpl",
    "init_sequence_parallel",
    "select_backend",
    "set_forward_context",
    "use_backend",
    "use_sp",
]

__version__ = "0.1.0"

_LAZY = {
    "attnmux.backend": (
        "AttentionBackend",
        "AttentionImpl",
        "AttentionMetadata",
        "AttentionMetadataBuilder",
        "DenseMetadataBuilder",
    ),
    "attnmux.context": ("ForwardContext", "get_forward_context", "set_forward_context"),
    "attnmux.hookspecs": ("hookimpl",),
    "attnmux.distributed": ("SPGroup", "SeqPlan", "init_sequence_parallel", "use_sp"),
    "attnmux.layers": ("DistributedAttention", "DistributedAttention_VSA", "LocalAttention"),
    "attnmux.report": ("SelectionReport",),
    "attnmux.selector": (
        "Selection",
        "explain",
        "get_attn_backend",
        "get_env_variable_attn_backend",
        "get_global_forced_attn_backend",
        "global_force_attn_backend",
        "global_force_attn_backend_context_manager",
        "select_backend",
        "use_backend",
    ),
}
_HOME = {name: module for module, names in _LAZY.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'attnmux' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
