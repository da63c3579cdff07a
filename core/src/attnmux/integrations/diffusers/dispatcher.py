"""attnmux backends under a name of diffusers' own dispatcher: `model.set_attention_backend("attnmux_torch_sdpa")`.

For backends without parameters and metadata. diffusers keeps its names in an enumeration and a registry of the process;
`register_backend` adds to both and `unregister_backend` takes away again. diffusers itself skips models whose processors do
not pass through its dispatcher, and keeps what was set for one model active for others; `apply` does neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnmux.errors import UnsupportedRequestError
from attnmux.integrations.layer_cache import LayerCache, stateless_spec
from attnmux.integrations.versions import require

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from attnmux.spec import AttentionBackendEnum

__all__ = ["register_backend", "unregister_backend"]


def register_backend(backend: AttentionBackendEnum | str) -> str:
    """Register a backend with diffusers and return its name there, "attnmux_" and the backend's name in lower case.

    Args:
        backend: A backend without parameters and metadata. Twice does nothing.

    Raises:
        MissingPackageError: diffusers is not installed, or too old.
        UnsupportedRequestError: The backend cannot be served by a plain function.
    """
    dispatch = _dispatch_module()
    spec = stateless_spec(backend)
    name = f"attnmux_{spec.name.lower()}"
    names = dispatch.AttentionBackendName
    if name in names._value2member_map_:
        return name
    member = str.__new__(names, name)
    member._name_, member._value_ = name.upper(), name
    names._member_map_[member._name_] = member
    names._member_names_.append(member._name_)
    names._value2member_map_[name] = member
    dispatch._AttentionBackendRegistry.register(member)(_function(spec.name))
    return name


def unregister_backend(name: str) -> None:
    """Take a name that `register_backend` gave out of diffusers again.

    Raises:
        UnsupportedRequestError: It is not registered, or still diffusers' active backend.
    """
    dispatch = _dispatch_module()
    names, registry = dispatch.AttentionBackendName, dispatch._AttentionBackendRegistry
    member = names._value2member_map_.get(name)
    if member is None or not name.startswith("attnmux_"):
        raise UnsupportedRequestError(f"{name!r} is not a name that attnmux registered with diffusers")
    if registry._active_backend is member:
        raise UnsupportedRequestError(
            f"{name!r} is diffusers' active backend, which model.set_attention_backend() sets for the process; set another first"
        )
    del names._value2member_map_[name], names._member_map_[member._name_]
    names._member_names_.remove(member._name_)
    for table in (registry._backends, registry._constraints, registry._supported_arg_names):
        table.pop(member, None)


def _dispatch_module() -> Any:
    require("diffusers")
    from diffusers.models import attention_dispatch

    return attention_dispatch


def _function(backend: str) -> Callable[..., torch.Tensor]:
    cache = LayerCache(backend)

    # diffusers drops what a function does not name, so every argument is named and refused here if need be
    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        _parallel_config: object = None,
    ) -> torch.Tensor:
        for is_so, what in (
            (dropout_p, f"dropout_p={dropout_p}"),
            (return_lse, "return_lse=True"),
            (_parallel_config is not None, "context parallelism"),
        ):
            if is_so:
                raise UnsupportedRequestError(
                    f"attnmux's {backend} does not serve {what} through diffusers' dispatcher"
                )
        layer = cache.layer(query, key, scale=scale, causal=is_causal)
        extra = {} if attn_mask is None else {"attn_mask": attn_mask}
        return layer(query, key, value, **extra)  # type: ignore[no-any-return]

    return attend
