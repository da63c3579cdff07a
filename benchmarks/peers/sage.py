"""sageattention: dense attention with 8-bit queries and keys; no backward; takes [B, S, H, D]."""

import dataclasses

from attnmux.bench import DensePattern, Workload
from peers.requirements import installed_version, refuse_unless

DISTRIBUTION = "sageattention"

ERROR_ALLOWED = 0.05
"""Relative L2; 8 bits measured 0.014 (relative L1) on unit normal inputs."""


def sage_attention(case):
    refuse_unless(case.H_kv == case.H, "as many key heads as query heads")
    from sageattention import sageattn

    return Workload(
        case=dataclasses.replace(case, directions=("forward",)),
        backend="SAGEATTENTION",
        engine="triton",
        attend=lambda q, k, v: sageattn(q, k, v, tensor_layout="NHD", is_causal=case.causal),
        pattern=DensePattern(case),
        is_peer=True,
        limit=ERROR_ALLOWED,
        extra={"version": installed_version(DISTRIBUTION)},
    )
