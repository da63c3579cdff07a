"""attnmux backends as attention implementations of Hugging Face transformers.

    from attnmux.integrations.transformers import register

    model = AutoModel.from_pretrained(path, attn_implementation=register("TORCH_SDPA"))

The name is registered with the interface of attention functions and with that of masks: a name that only the first one knows
gets no mask at all, without a word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnmux.errors import UnsupportedRequestError
from attnmux.integrations.layer_cache import LayerCache, stateless_spec
from attnmux.integrations.versions import require
from attnmux.schedule import Schedule

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


def register(backend: AttentionBackendEnum | str | Schedule, name: str | None = None) -> str:
    """Register a backend with transformers and return the name for `attn_implementation=`.

    Args:
        backend: A backend without parameters and metadata, or a schedule of such by layer.
        name: Name to register; None = "attnmux_" and the backend's name in lower case; a schedule needs one.

    Raises:
        MissingPackageError: transformers is not installed, or too old.
        UnsupportedRequestError: The backend cannot be served by a plain function, or takes no mask of the form that
            transformers makes (bool); a schedule depends on steps or names no default.
    """
    require("transformers")
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    schedule = backend if isinstance(backend, Schedule) else Schedule(default=backend)
    if schedule.default is None or len(schedule.edges) > 1:
        raise UnsupportedRequestError(
            "a schedule for transformers names a default and no steps: its models do not know denoising steps"
        )
    specs = [stateless_spec(each) for each in (schedule.default, *(rule.backend for rule in schedule.rules))]
    for spec in specs:
        if "bool" not in spec.capabilities.masks:
            raise UnsupportedRequestError(
                f"{spec.name} takes no bool mask, which transformers makes for padding; use TORCH_SDPA, or another backend "
                "with masks"
            )
    if name is None:
        if schedule is backend:
            raise UnsupportedRequestError("a schedule is registered under a name of yours; give name=")
        name = f"attnmux_{specs[0].name.lower()}"
    AttentionInterface.register(name, _function(schedule))
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def _function(schedule: Schedule) -> Callable[..., tuple[torch.Tensor, None]]:
    names = {str(schedule.default), *(str(rule.backend) for rule in schedule.rules)}
    caches = {name: LayerCache(name) for name in names}
    if len(caches) == 1:
        only = next(iter(caches.values()))

    def cache_of(module: Any) -> LayerCache:
        if len(caches) == 1:
            return only
        plan = schedule.resolve(module.layer_idx, module.config.num_hidden_layers, "self")
        return caches[str(plan.backends[0])]

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
        cache = cache_of(module)
        unknown = sorted(
            key for key, value in options.items() if key not in _HARMLESS and value is not None and value is not False
        )
        if unknown:
            raise UnsupportedRequestError(
                f"attnmux's {cache.backend} does not serve {', '.join(unknown)}, which the model passes"
            )
        if dropout:
            raise UnsupportedRequestError(
                f"attnmux's {cache.backend} computes no dropout={dropout} inside attention; set the model's attention_dropout to 0"
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
