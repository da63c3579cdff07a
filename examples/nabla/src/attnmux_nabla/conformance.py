"""What the conformance suite must know: a grid, the definition, and where the method equals dense attention."""

import torch

from attnmux.testing import BackendConformance, DenseLimit, dense_attention_oracle
from attnmux_nabla.backend import NablaBuilder
from attnmux_nabla.reference import visible_tokens


def grid_of(length):
    rows = max(rows for rows in range(1, 9) if length % rows == 0)
    return 1, rows, length // rows


class Conformance(BackendConformance):
    backend = "NABLA_ATTN"
    # patches of six rows, the last one narrow
    typical_length = 150

    def make_metadata(self, seq_len_q, seq_len_k, *, batch, device, threshold=0.5):
        return NablaBuilder().build(
            raw_latent_shape=grid_of(seq_len_q), patch_size=(1, 1, 1), threshold=threshold, device=device
        )

    def oracle(self, q, k, v, metadata, *, softmax_scale, causal, attn_mask, impl):
        visible = visible_tokens(q, k, grid_of(q.shape[1]), softmax_scale, metadata.threshold)
        return dense_attention_oracle(q, k, v, softmax_scale=softmax_scale, attn_mask=visible)

    def dense_limit(self, q: torch.Tensor, k: torch.Tensor) -> DenseLimit:
        return DenseLimit(metadata=self.make_metadata(q.shape[1], k.shape[1], batch=1, device=q.device, threshold=1.0))
