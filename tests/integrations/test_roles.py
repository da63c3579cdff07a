"""Which attention modules of a model are self-attention, where it does not say."""

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention

from attnmux import UnsupportedRequestError
from attnmux.integrations.diffusers import apply


def ltx():
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=64, cross_attention_dim=128, num_layers=2,
        caption_channels=16, qk_norm="rms_norm_across_heads",
    ).eval()  # fmt: skip


@pytest.mark.parametrize(("role", "last"), [("self", "attn1"), ("cross", "attn2")])
def test_names_tell_where_modules_do_not_say_it(role, last):
    model = ltx()
    assert not hasattr(model.transformer_blocks[0].attn2, "is_cross_attention")
    with apply(model, "TORCH_SDPA", modules=role) as handle:
        assert [item.name for item in handle.replaced] == [f"transformer_blocks.{layer}.{last}" for layer in (0, 1)]


class NearbyProcessor:
    """Somebody's processor that attends to the first tokens only."""

    _attention_backend = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        query, key, value = (
            layer(hidden_states).unflatten(-1, (-1, 64)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        out = dispatch_attention_fn(query, key[:, :4], value[:, :4], backend=self._attention_backend)
        return attn.to_out[0](out.flatten(2))


class NearbyModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Attention(32, heads=2, dim_head=64, processor=NearbyProcessor())])

    def forward(self, hidden_states):
        return self.blocks[0](hidden_states)


@torch.no_grad()
def test_what_was_chosen_as_self_attention_is_held_to_it():
    model, tokens = NearbyModel(), torch.randn(1, 9, 32)
    own = model(tokens)
    text = "blocks.0 was chosen as self-attention, and it attends from 9 tokens to 4"
    with apply(model, "TORCH_SDPA"), pytest.raises(UnsupportedRequestError, match=text):
        model(tokens)
    for modules in ("all", "blocks.*", ["self", "blocks.0"]):
        with apply(model, "TORCH_SDPA", modules=modules):
            assert torch.equal(model(tokens), own)
