"""The cases of `attnmux bench`: lists of every kind are valid, and the gate's pattern means what the operator computes."""

import dataclasses

import pytest
import torch

from attnmux.testing import dense_attention_oracle
from attnmux_blocksparse import block_sparse_attention
from attnmux_blocksparse.bench import CASES, LIST_KINDS, ListPattern, make_index

CPU = torch.device("cpu")


def small(kind, block_q, block_k):
    (case, *_) = (case for case in CASES["BLOCK_SPARSE_ATTN"] if case.lists == kind)
    length = 1000 if kind == "ragged" else 1024
    return dataclasses.replace(case, S_q=length, S_k=length, H=2, H_kv=2, D=16, block_q=block_q, block_k=block_k)


def masks(case, pattern):
    positions = torch.arange(case.S_q), torch.arange(case.S_k)
    return torch.stack([pattern.visible(0, head, *positions) for head in range(case.H)])


@pytest.mark.parametrize("kind", LIST_KINDS)
@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (128, 128)])
def test_pattern_counts_what_it_shows(kind, blocks):
    case = small(kind, *blocks)
    index = make_index(case, CPU)
    index.check_values()
    pattern = ListPattern(index, case)
    assert pattern.pairs() == int(masks(case, pattern).sum())


@pytest.mark.parametrize("kind", LIST_KINDS)
def test_pattern_is_the_mask_of_the_operator(kind):
    case = small(kind, 128, 64)
    index = make_index(case, CPU)
    q, k, v = torch.randn(3, 1, case.S_q, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = dense_attention_oracle(q, k, v, attn_mask=masks(case, ListPattern(index, case)))
    assert torch.allclose(block_sparse_attention(q, k, v, index), expected, atol=1e-12)
