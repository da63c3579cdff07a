"""attnmux backends as attention implementations of Hugging Face transformers.

    from attnmux.integrations.transformers import register

    model = AutoModel.from_pretrained(path, attn_implementation=register("TORCH_SDPA"))

The name is registered with the interface of attention functions and with that of masks: a name that only the first one knows
gets no mask at all, without a word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnmux.errors import MissingPackageError, UnsupportedRequestError
from attnmux.integrations.layer_cache import LayerCache, stateless_spec

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    from attnmux.spec import AttentionBackendEnum

__all__ = ["register"]

# What models pass along that changes nothing in attention over given q, k and v, or is in the mask already.
_HARMLESS = frozenset(
    {
        "cache_position",
        "inputs_embeds",
        "input_ids",
        "labels",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "position_ids",
        "return_dict",
        "sliding_window",
        "use_cache",
    }
)


def register(backend: AttentionBackendEnum | str, name: str | None = None) -> str:
    """Register a backend with transformers and return the name for `attn_implementation=`.

    Args:
        backend: A backend without parameters and metadata.
        name: Name to register; None = "attnmux_" and the backend's name in lower case.

    Raises:
        MissingPackageError: transformers is not installed.
        UnsupportedRequestError: The backend cannot be served by a plain function, or takes no mask of the form that
            transformers makes (bool).
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise MissingPackageError("this needs transformers >= 4.53: pip install transformers") from error
    spec = stateless_spec(backend)
    if "bool" not in spec.capabilities.masks:
        raise UnsupportedRequestError(
            f"{spec.name} takes no bool mask, which transformers makes for padding; use TORCH_SDPA, or another backend with masks"
        )
    name = name or f"attnmux_{spec.name.lower()}"
    AttentionInterface.register(name, _function(spec.name))
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def _function(backend: str) -> Callable[..., tuple[torch.Tensor, None]]:
    cache = LayerCache(backend)

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """Return the output `[B, S_q, H, D]` of q `[B, H, S_q, D]`, k and v `[B, H_kv, S_k, D]`, and no weights."""
        unknown = sorted(key for key, value in options.items() if value not in (None, False) and key not in _HARMLESS)
        if unknown:
            raise UnsupportedRequestError(
                f"attnmux's {backend} does not serve {', '.join(unknown)}, which the model passes"
            )
        if dropout:
            raise UnsupportedRequestError(
                f"attnmux's {backend} computes no dropout={dropout} inside attention; set the model's attention_dropout to 0"
            )
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if attention_mask is None:
            causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            # one query is the newest token, and sees every key
            causal = bool(causal) and query.shape[1] > 1
            extra = {}
        else:
            causal, extra = False, {"attn_mask": attention_mask}
        return cache.layer(query, key, scale=scaling, causal=causal)(query, key, value, **extra), None

    return attend
