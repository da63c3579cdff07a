"""The abstract classes' own behaviour."""

import pytest
import torch

from attnmux import (
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    DenseMetadataBuilder,
    UnsupportedRequestError,
)
from attnmux.backend import LayerPlace, layer_index


class Impl(AttentionImpl):
    def forward(self, query, key, value, attn_metadata):
        return query


def test_defaults():
    impl = Impl(8, 64)
    assert impl.softmax_scale == 64**-0.5
    assert impl.num_kv_heads == 8
    x = torch.ones(1)
    assert impl.preprocess_qkv(x, None) is x
    assert impl.postprocess_output(x, None) is x


def test_scale_of_zero_is_a_value():
    assert Impl(8, 64, softmax_scale=0.0).softmax_scale == 0.0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"window_size": 3, "alibi": 1}, "Impl does not know the argument alibi, window_size"),
        ({"num_heads": 0}, "num_heads must be an integer >= 1, got 0"),
        ({"num_kv_heads": 3}, "num_heads=8 is not a multiple of num_kv_heads=3"),
        ({"softmax_scale": float("nan")}, "softmax_scale must be finite, got nan"),
    ],
)
def test_bad_constructor_arguments_are_refused_by_name(arguments, text):
    with pytest.raises(UnsupportedRequestError, match=text):
        Impl(**{"num_heads": 8, "head_size": 64, **arguments})


def test_metadata_as_dictionary_shares_its_objects():
    metadata = AttentionMetadata(3)
    assert metadata.asdict_zerocopy() == {"current_timestep": 3}
    assert metadata.asdict_zerocopy({"current_timestep"}) == {}
    metadata.current_timestep = payload = [1]
    assert metadata.asdict_zerocopy()["current_timestep"] is payload


def test_abstract_classes_cannot_be_made():
    with pytest.raises(TypeError):
        AttentionImpl(8, 64)
    with pytest.raises(TypeError):
        AttentionMetadataBuilder()


def test_dense_builder_refuses_what_it_has_no_use_for():
    builder = DenseMetadataBuilder()
    builder.prepare()
    assert builder.build(current_timestep=4).current_timestep == 4
    with pytest.raises(UnsupportedRequestError, match="dense attention has no use for VSA_sparsity"):
        builder.build(current_timestep=4, VSA_sparsity=0.5)


@pytest.mark.parametrize(
    ("prefix", "layer_idx", "index"),
    [
        ("", None, None),
        ("blocks.3.attn", None, 3),
        ("model.blocks.12", None, 12),
        ("myblocks.3", None, None),
        ("blocks.3", 0, 0),
    ],
)
def test_layer_index_is_that_of_the_prefix_unless_it_is_given(prefix, layer_idx, index):
    assert layer_index(prefix, layer_idx) == index


@pytest.mark.parametrize("layer_idx", [-1, True, 1.5])
def test_layer_index_out_of_range_is_refused(layer_idx):
    with pytest.raises(UnsupportedRequestError, match=r"layer_idx=.* must be an integer >= 0"):
        layer_index("", layer_idx)


@pytest.mark.parametrize("index", [0, 1, 5, 255, 256, 300])
def test_place_of_a_layer_is_within_what_holds_it(index):
    place = LayerPlace(index)
    assert place.is_known
    for first, last in ((0, 0), (0, 1), (5, 5), (2, 254), (2, 255), (255, 400), (256, 256), (300, 300)):
        assert place.is_within(first, last) is (first <= index <= last)


def test_layer_without_an_index_is_within_nothing():
    place = LayerPlace(None)
    assert not place.is_known
    assert not place.is_within(0, 10)
    assert not place.is_within(0, 1000)
