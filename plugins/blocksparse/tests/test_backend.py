"""The backend's glue: lists come through the metadata, and what cannot be honoured is refused."""

import pickle

import pytest
import torch

from attnmux import AttentionMetadata, ForwardContextError, LocalAttention, UnsupportedRequestError, set_forward_context
from attnmux_blocksparse import BlockIndex, BlockSparseAttentionImpl, block_sparse_attention
from attnmux_blocksparse.backend import BlockSparseAttentionMetadata, BlockSparseAttentionMetadataBuilder


@pytest.fixture
def index():
    generator = torch.Generator().manual_seed(0)
    return BlockIndex.from_block_mask(torch.rand(3, 3, generator=generator) < 0.6, block_q=64, block_k=64)


def qkv(length=150, heads=2, size=16):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, length, heads, size, generator=generator) for _ in range(3)]


def test_layer_runs_the_operator_on_the_contexts_lists(index):
    layer = LocalAttention(2, 16, softmax_scale=0.3, backend="BLOCK_SPARSE_ATTN")
    metadata = BlockSparseAttentionMetadataBuilder().build(index=index, current_timestep=3)
    with set_forward_context(current_timestep=3, attn_metadata=metadata):
        out = layer(*qkv())
    assert torch.equal(out, block_sparse_attention(*qkv(), index, softmax_scale=0.3))


def test_metadata_survive_pickling(index):
    metadata = BlockSparseAttentionMetadata(0, index)
    again = pickle.loads(pickle.dumps(metadata))
    assert again == metadata
    assert again.index is not index
    assert again.index != BlockIndex.from_block_mask(index.to_block_mask() ^ True, block_q=64, block_k=64)


def test_missing_metadata_say_what_to_do():
    with pytest.raises(ForwardContextError, match=r"got no metadata; pass attn_metadata=BlockSparseAttentionMetadata"):
        BlockSparseAttentionImpl(2, 16).forward(*qkv())


def test_metadata_of_another_class_are_refused():
    with pytest.raises(UnsupportedRequestError, match="needs BlockSparseAttentionMetadata, got AttentionMetadata"):
        BlockSparseAttentionImpl(2, 16).forward(*qkv(), AttentionMetadata(0))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"causal": True}, "cannot run causal=True"),
        ({"head_size": 40}, "16 to 256 in steps of 16, got head_size=40"),
        ({"engine": "cuda"}, "engine='cuda' is not known; engines are reference, triton, hopper"),
        ({"window": 3}, "does not know the argument window"),
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused(arguments, text):
    with pytest.raises(UnsupportedRequestError, match=text):
        BlockSparseAttentionImpl(**{"num_heads": 2, "head_size": 16, **arguments})


def test_named_engine_is_never_replaced(index):
    impl = BlockSparseAttentionImpl(2, 16, engine="hopper")
    with pytest.raises(UnsupportedRequestError, match="hopper"):
        impl.forward(*qkv(), BlockSparseAttentionMetadata(0, index))


def test_builder_refuses_what_it_does_not_know(index):
    builder = BlockSparseAttentionMetadataBuilder()
    builder.prepare()
    with pytest.raises(UnsupportedRequestError, match="does not know the argument VSA_sparsity"):
        builder.build(index=index, VSA_sparsity=0.5)
    with pytest.raises(UnsupportedRequestError, match="index must be a BlockIndex, got list"):
        builder.build(index=[])


def test_other_dtypes_are_refused(index):
    impl = BlockSparseAttentionImpl(2, 16)
    with pytest.raises(UnsupportedRequestError, match="dtype torch.int64"):
        impl.forward(*(x.long() for x in qkv()), BlockSparseAttentionMetadata(0, index))
