"""Merging parts in one process: order, empty parts, precision; and copying them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnmux.distributed.merge import merge_part
from attnmux.distributed.words import copy_words
from attnmux.testing import assert_close_to_oracle, dense_attention_baseline, dense_attention_oracle

MINUS_INFINITY = float("-inf")


def parts_of(q, k, v, sizes, mask=None):
    for key, value, seen in zip(k.split(sizes, 1), v.split(sizes, 1), mask.split(sizes, -1), strict=True):
        yield dense_attention_oracle(q, key, value, attn_mask=seen, return_lse=True)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 2**31), st.floats(0.2, 1.0))
def test_parts_in_any_order_make_the_whole(sizes, seed, keep):
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    q, k, v = (torch.randn(2, n, 3, 4, generator=generator, dtype=torch.float64) for n in (5, total, total))
    # queries that see nothing of a part, or nothing at all, are among them
    mask = torch.rand(2, 3, 5, total, generator=generator) < keep
    want, want_lse = dense_attention_oracle(q, k, v, attn_mask=mask, return_lse=True)
    parts = list(parts_of(q, k, v, sizes, mask))
    merged = None
    for place in torch.randperm(len(parts), generator=generator).tolist():
        merged = merge_part(merged, *parts[place])
    assert_close_to_oracle(merged[0], want, want)
    empty = want_lse == MINUS_INFINITY
    assert (merged[1][empty] == MINUS_INFINITY).all()
    assert not merged[0].transpose(1, 2)[empty].any()
    assert_close_to_oracle(merged[1][~empty], want_lse[~empty], want_lse[~empty])


@pytest.mark.parametrize("count", [2, 8])
def test_half_precision_parts_are_merged_in_float32(count):
    q, k, v = (torch.randn(1, 64, 2, 32, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3))
    merged = None
    for key, value in zip(k.chunk(count, 1), v.chunk(count, 1), strict=True):
        output, lse = dense_attention_oracle(q, key, value, return_lse=True)
        merged = merge_part(merged, output.bfloat16(), lse.float())
    assert merged[0].dtype == merged[1].dtype == torch.float32
    oracle = dense_attention_oracle(q, k, v)
    assert_close_to_oracle(merged[0].bfloat16(), oracle, dense_attention_baseline(q, k, v))


def test_the_last_part_rounds_once():
    generator = torch.Generator().manual_seed(0)
    parts = [
        (torch.randn(1, 9, 2, 8, generator=generator).bfloat16(), torch.randn(1, 2, 9, generator=generator))
        for _ in range(3)
    ]
    begun = merge_part(merge_part(None, *parts[0]), *parts[1])
    want, lse = merge_part(begun, *parts[2])
    found, found_lse = merge_part(begun, *parts[2], dtype=torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, want.bfloat16())
    assert torch.equal(found_lse, lse)


def test_merging_changes_neither_part():
    output, lse = torch.ones(1, 2, 1, 4), torch.zeros(1, 1, 2)
    merged = merge_part(merge_part(None, output, lse), output, lse)
    assert (output == 1).all() and (lse == 0).all()
    assert merged[0].data_ptr() != output.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [1, 6, 8])
def test_copies_in_words_are_copies_whatever_the_strides(dtype, dim):
    memory = torch.randn(3, 5, 7, 2 * dim + 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    sources = [
        memory[..., :dim],
        memory[..., 3 : 3 + dim],
        memory[:, ::2, 1:, dim : 2 * dim],
        memory[..., :dim].contiguous(),
    ]
    sources += [x.transpose(0, 1) for x in sources]
    for source in sources:
        for into in (
            torch.empty_like(source),
            torch.empty(*source.shape[:-1], 3 * dim, dtype=dtype)[..., dim : 2 * dim],
        ):
            copy_words(into, source)
            assert torch.equal(into, source)
