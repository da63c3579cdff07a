"""Torch's own dense attention, by kernel; takes [B, H, S, D]."""

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnmux.bench import DensePattern, Workload


def _workload(case, engine, kernel):
    uses_gqa = case.H_kv != case.H

    def attend(q, k, v):
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=uses_gqa)

    return Workload(
        case=case,
        backend="SDPA",
        engine=engine,
        attend=attend,
        pattern=DensePattern(case),
        is_peer=True,
        layout="BHSD",
        extra={"version": torch.__version__, "cudnn": torch.backends.cudnn.version()},
    )


def sdpa_cudnn(case):
    return _workload(case, "cudnn", SDPBackend.CUDNN_ATTENTION)


def sdpa_flash(case):
    return _workload(case, "flash", SDPBackend.FLASH_ATTENTION)
