"""What the conformance suite must know of this backend: its definition, and where it equals dense attention."""

from attnmux.testing import BackendConformance, DenseLimit
from attnmux_window.reference import window_attention


class Conformance(BackendConformance):
    backend = "WINDOW_ATTN"
    impl_args = {"window": 16}

    def oracle(self, q, k, v, metadata, *, softmax_scale, causal, attn_mask, impl):
        return window_attention(q, k, v, window=impl.window, softmax_scale=softmax_scale)

    def dense_limit(self, q, k):
        return DenseLimit(impl_args={"window": k.shape[1]})
