"""Specs of the core's own backends."""

from __future__ import annotations

from importlib.util import find_spec

from attnmux.spec import BackendSpec, Capabilities

__all__ = ["FLASH_ATTN", "TORCH_SDPA"]

TORCH_SDPA = BackendSpec(
    "TORCH_SDPA",
    target="attnmux.backends.sdpa:SDPABackend",
    capabilities=Capabilities(
        dtypes=frozenset({"float16", "bfloat16", "float32", "float64"}),
        head_sizes=range(1, 1025),
        devices=frozenset({"cpu", "cuda"}),
        cuda_archs=frozenset({"any"}),
        causal=True,
        gqa=True,
        cross_attention=True,
        masks=frozenset({"bool", "additive", "key_padding"}),
        softmax_scale=True,
        backward=True,
        returns_lse=True,
        exactness="exact",
        compile="fullgraph",
        sequence_parallel=frozenset({"ulysses", "ring", "usp", "allgather_kv"}),
        extra_inputs=frozenset({"attn_mask"}),
    ),
    priority=0,
    aliases=("SDPA",),
    summary="PyTorch's own scaled dot-product attention; every shape, mask and device",
)


def probe_flash_attn() -> str | None:
    """Return None if one of the flash-attn distributions can be found, else why not."""
    for module in ("flash_attn.cute", "flash_attn_interface", "flash_attn.flash_attn_interface"):
        try:
            found = find_spec(module)
        except ModuleNotFoundError:
            continue
        if found is not None:
            return None
    return "no flash-attn is installed: pip install 'attnmux[flash]' (version 4: sm_90, sm_100) or 'attnmux[flash2]'"


FLASH_ATTN = BackendSpec(
    "FLASH_ATTN",
    target="attnmux.backends.flash_attn:FlashAttentionBackend",
    capabilities=Capabilities(
        dtypes=frozenset({"float16", "bfloat16"}),
        head_sizes=range(8, 257, 8),
        devices=frozenset({"cuda"}),
        cuda_archs=frozenset({80, 86, 87, 89, 90, 100, 103, 120}),
        causal=True,
        gqa=True,
        cross_attention=True,
        varlen=True,
        softmax_scale=True,
        backward=True,
        returns_lse=True,
        exactness="exact",
        compile="fullgraph",
        sequence_parallel=frozenset({"ulysses", "ring", "usp", "allgather_kv"}),
    ),
    priority=10,
    aliases=("FLASH",),
    probe="attnmux.backends.plugin:probe_flash_attn",
    summary="flash-attn 4, 3 or 2, whichever is installed and fits the device",
)
