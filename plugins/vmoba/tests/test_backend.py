"""Metadata, layer cycle, dense steps and layers, refusals, compat switches."""

import pytest
import torch
from vmoba_oracle import GRID, make_tensors

from attnmux.backends.sdpa import SDPAImpl
from attnmux.errors import UnsupportedRequestError
from attnmux_vmoba import VMOBAAttentionImpl, VMOBAAttentionMetadataBuilder, moba_attention

CHUNKS = {"temporal_chunk_size": 1, "spatial_chunk_size": (2, 3), "st_chunk_size": (2, 2, 3)}
TOPK = {"temporal_topk": 2, "spatial_topk": 2, "st_topk": 3}


def build(step=0, **options):
    return VMOBAAttentionMetadataBuilder().build(step, GRID, (1, 1, 1), **(CHUNKS | TOPK | options))


def run(layer, metadata, tensors):
    q, k, v, _ = tensors
    return VMOBAAttentionImpl(q.shape[2], q.shape[3], prefix=f"blocks.{layer}.attn").forward(q, k, v, metadata)


def test_layers_take_turns():
    tensors = make_tensors()
    metadata = build(temporal_layer=2, spatial_layer=1, st_layer=1, first_full_layer=1)
    kinds = [None, *("temporal", "temporal", "spatial", "st") * 2]
    for layer, kind in enumerate(kinds):
        if kind is None:
            expected = SDPAImpl(2, 8, 8**-0.5, False).forward(*tensors[:3])
        else:
            expected = moba_attention(
                *tensors[:3], patch_resolution=GRID, chunk_size=CHUNKS[f"{kind}_chunk_size"], topk=TOPK[f"{kind}_topk"]
            )
        assert torch.equal(run(layer, metadata, tensors), expected)


def test_first_steps_are_dense():
    tensors = make_tensors()
    dense = SDPAImpl(2, 8, 8**-0.5, False).forward(*tensors[:3])
    results = [run(0, build(step, first_full_step=2), tensors) for step in range(4)]
    assert [torch.equal(x, dense) for x in results] == [True, True, False, False]


@pytest.mark.parametrize(("axis", "chunk"), [("T", (3, 2, 3)), ("H", (2, 3, 3)), ("W", (2, 2, 4))])
def test_a_chunk_that_does_not_divide_is_refused_by_axis(axis, chunk):
    with pytest.raises(UnsupportedRequestError, match=rf"\b{axis}\b"):
        build(st_chunk_size=chunk)


def test_own_chunk_alone_unless_the_quirk_is_wanted():
    tensors = make_tensors()
    options = {"temporal_topk": 1, "spatial_layer": 0, "st_layer": 0}
    dense = SDPAImpl(2, 8, 8**-0.5, False).forward(*tensors[:3])
    assert torch.equal(run(0, build(**options, topk1_is_dense=True), tensors), dense)
    own = run(0, build(**options), tensors)
    first = SDPAImpl(2, 8, 8**-0.5, False).forward(*(x[:, :24] for x in tensors[:3]))
    torch.testing.assert_close(own[:, :24], first)


@pytest.mark.parametrize("prefix", ["encoder.attn", "blocks.x.attn"])
def test_a_prefix_without_an_index_is_refused(prefix):
    with pytest.raises(UnsupportedRequestError, match="names no layer as blocks.<i>"):
        VMOBAAttentionImpl(2, 8, prefix=prefix)


def test_an_index_may_be_given_instead():
    assert VMOBAAttentionImpl(2, 8, prefix="encoder.attn", layer_idx=3).layer_idx == 3


@pytest.mark.parametrize(("name", "value"), [("first_full_step", -1), ("temporal_layer", 1.5), ("moba_threshold", 1.1)])
def test_numbers_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(UnsupportedRequestError, match=name.removeprefix("moba_")):
        build(**{name: value})


def test_unknown_arguments_are_refused_by_name():
    with pytest.raises(UnsupportedRequestError, match="sparsity"):
        build(sparsity=0.5)


def test_another_length_is_refused():
    q, k, v, _ = make_tensors(grid=(4, 4, 5))
    with pytest.raises(UnsupportedRequestError, match="80 tokens, but the grid of the metadata has 96"):
        VMOBAAttentionImpl(2, 8).forward(q, k, v, build())


def test_a_compiled_layer_is_one_graph_with_the_same_result():
    q, k, v, _ = make_tensors(dtype=torch.float32)
    compiled = torch.compile(
        lambda *x: moba_attention(*x, patch_resolution=GRID, chunk_size=(2, 3), topk=2),
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(q, k, v), moba_attention(q, k, v, patch_resolution=GRID, chunk_size=(2, 3), topk=2))
