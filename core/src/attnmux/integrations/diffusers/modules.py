"""What of a diffusers transformer attends: its attention modules, their roles, their places and their sizes."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import nn

from attnmux.errors import UnsupportedRequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ROLES", "AttentionModule", "chosen", "chosen_as_self", "find_attention"]

ROLES = ("self", "cross", "other")
"""self: over the tokens of the video or image, text joined or not; cross: from them to a context; other: outside the stack
of transformer blocks, such as in an encoder of the text."""


@dataclass(frozen=True)
class AttentionModule:
    """One attention module of a model.

    Attributes:
        name: Its path in the model.
        module: The module; it has `processor` and `set_processor`.
        role: One of `ROLES`.
        layer: Index of its block, counted through all stacks of the model; -1 outside of them.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_size: Channels of one head.
    """

    name: str
    module: Any
    role: str
    layer: int
    num_heads: int
    num_kv_heads: int
    head_size: int


def find_attention(model: nn.Module) -> tuple[list[AttentionModule], int]:
    """Return a model's attention modules and the number of its blocks.

    Raises:
        UnsupportedRequestError: There is none.
    """
    places: dict[str, int] = {}
    for stack, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            for position in range(len(child)):
                places[f"{stack}.{position}"] = len(places)
    found = []
    for name, module in model.named_modules():
        if not (hasattr(module, "processor") and callable(getattr(module, "set_processor", None))):
            continue
        block = ".".join(name.split(".")[:2])
        layer = places.get(block, -1)
        role = "other" if layer < 0 else "cross" if _is_cross(model, name, module) else "self"
        found.append(AttentionModule(name, module, role, layer, *_sizes(module)))
    if not found:
        raise UnsupportedRequestError(
            f"{type(model).__name__} has no attention module with a processor, so that nothing can be replaced; pass the "
            "transformer of a diffusers pipeline (pipe.transformer)"
        )
    return found, len(places)


def _is_cross(model: nn.Module, name: str, module: Any) -> bool:
    declared = getattr(module, "is_cross_attention", None)
    if declared is not None:
        return bool(declared)
    # where a module does not say it, diffusers' names do: attn1 attends to the tokens themselves, attn2 beside it to a context
    parent, _, last = name.rpartition(".")
    return last.endswith("attn2") and hasattr(model.get_submodule(parent), f"{last[:-1]}1")


def _sizes(module: Any) -> tuple[int, int, int]:
    heads = int(module.heads)
    head_size = int(getattr(module, "head_dim", 0) or module.inner_dim // heads)
    return heads, int(getattr(module, "inner_kv_dim", heads * head_size)) // head_size, head_size


def chosen(found: Sequence[AttentionModule], modules: str | Sequence[str]) -> list[AttentionModule]:
    """Return the modules that a choice names.

    Args:
        found: All of them.
        modules: "all", roles, or patterns of paths as in a shell ("blocks.*.attn1"); one or several.

    Raises:
        UnsupportedRequestError: An entry names none; lists what there is.
    """
    wanted = [modules] if isinstance(modules, str) else list(modules)
    taken: set[str] = set()
    for entry in wanted:
        names = {item.name for item in found if entry in ("all", item.role) or fnmatchcase(item.name, entry)}
        if not names:
            kinds = ", ".join(f"{sum(item.role == role for item in found)} {role}" for role in ROLES)
            raise UnsupportedRequestError(
                f"modules={modules!r}: 0 of {len(found)} attention modules match {entry!r}; there are {kinds}, such as "
                f"{found[0].name!r}. Give 'self', 'cross', 'other', 'all' or a pattern of paths"
            )
        taken |= names
    return [item for item in found if item.name in taken]


def chosen_as_self(item: AttentionModule, modules: str | Sequence[str]) -> bool:
    """Whether nothing but the role "self" chose a module."""
    wanted = [modules] if isinstance(modules, str) else list(modules)
    return item.role == "self" and not any(entry == "all" or fnmatchcase(item.name, entry) for entry in wanted)
