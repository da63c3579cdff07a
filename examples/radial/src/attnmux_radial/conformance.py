"""What the conformance suite must know: a grid, the definition, and where the method equals dense attention."""

from attnmux.testing import BackendConformance, DenseLimit, dense_attention_oracle
from attnmux_radial.backend import RadialBuilder
from attnmux_radial.reference import visible_tokens


def grid_of(length):
    frames = next((frames for frames in (5, 3, 2) if length % frames == 0), 1)
    return frames, 1, length // frames


class Conformance(BackendConformance):
    backend = "RADIAL_ATTN"
    # three frames of two blocks, the second one short
    typical_length = 210

    def make_metadata(self, seq_len_q, seq_len_k, *, batch, device, width=0.2):
        return RadialBuilder().build(
            raw_latent_shape=grid_of(seq_len_q), patch_size=(1, 1, 1), width=width, device=device
        )

    def oracle(self, q, k, v, metadata, *, softmax_scale, causal, attn_mask, impl):
        visible = visible_tokens(grid_of(q.shape[1]), 0.2).to(q.device)
        return dense_attention_oracle(q, k, v, softmax_scale=softmax_scale, attn_mask=visible)

    def dense_limit(self, q, k):
        return DenseLimit(metadata=self.make_metadata(q.shape[1], k.shape[1], batch=1, device=q.device, width=1e6))
