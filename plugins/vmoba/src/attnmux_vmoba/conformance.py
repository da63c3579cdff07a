"""What the conformance suite of attnmux needs to know of this backend: its metadata, its oracle, its dense limit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attnmux.testing import BackendConformance, DenseLimit
from attnmux_vmoba.backend import VMOBAAttentionImpl, VMOBAAttentionMetadata, VMOBAAttentionMetadataBuilder
from attnmux_vmoba.ops import attend_chunks

if TYPE_CHECKING:
    from collections.abc import Iterable

    from attnmux.backend import AttentionMetadata

__all__ = ["VMOBAAttentionConformance"]


class VMOBAAttentionConformance(BackendConformance):
    """Holds VMOBA_ATTN to the reference in float64, and to dense attention where every chunk is kept."""

    backend = "VMOBA_ATTN"
    typical_length = 210

    def make_metadata(
        self, seq_len_q: int, seq_len_k: int, *, batch: int, device: torch.device
    ) -> VMOBAAttentionMetadata:
        """Return a video of that many tokens in 1-D chunks, the last one short, three of them kept."""
        return _describe(seq_len_q, 3)

    def oracle(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: AttentionMetadata | None, **options: Any
    ) -> torch.Tensor:
        """Return the reference in the float64 of its inputs."""
        assert isinstance(metadata, VMOBAAttentionMetadata)
        impl = options["impl"]
        assert isinstance(impl, VMOBAAttentionImpl)
        kind = metadata.kind_of_layer(impl.layer_idx)
        assert kind is not None
        chunks = metadata.chunks[kind]
        assert chunks is not None
        return attend_chunks(
            q, k, v, chunks, metadata.selection(kind), softmax_scale=options["softmax_scale"], engine="reference"
        )

    def dense_limit(self, q: torch.Tensor, k: torch.Tensor) -> DenseLimit:
        """Return the call that keeps every chunk."""
        return DenseLimit(metadata=_describe(q.shape[1], q.shape[1]))

    def custom_ops(self, device: torch.device) -> Iterable[tuple[Any, tuple[Any, ...]]]:
        """Return the operators with arguments of every mode."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        q, k, v, dout = torch.randn(4, 1, 96, 2, 16, device=device, dtype=dtype).unbind(0)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        geometry = ([4, 4, 6], [2, 2, 3])
        ops = torch.ops.attnmux_vmoba
        for how in (("topk", "query_head", 3, 0.25, False), ("threshold", "query_head", 1, 0.4, False)):
            words = ops.select(q, k, *geometry, *how, "")
            yield ops.select, (q.detach(), k.detach(), *geometry, *how, "")
            rest = (*geometry, how[2] if how[0] == "topk" else 0, 0.25, "")
            yield ops.forward, (q, k, v, words, *rest)
            with torch.no_grad():
                out, lse = ops.forward(q, k, v, words, *rest)
            yield ops.backward, (dout, *(x.detach() for x in (q, k, v)), out, lse, words, *rest)


def _describe(length: int, topk: int) -> VMOBAAttentionMetadata:
    """Return the metadata of a grid of `length` tokens with 1-D chunks of about a sixth of them."""
    frames = max(n for n in range(1, length + 1) if length % n == 0 and n**2 <= length)
    per_chunk = -(-length // 6) + 3
    return VMOBAAttentionMetadataBuilder().build(
        0,
        (frames, 1, length // frames),
        (1, 1, 1),
        temporal_chunk_size=(per_chunk + 0.5) * frames / length,
        temporal_topk=topk,
        spatial_layer=0,
        st_layer=0,
    )
