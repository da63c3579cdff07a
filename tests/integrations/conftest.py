"""Tiny random models of diffusers, with heads of 64 channels, and calls for them."""

import gc
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'attnmux[integrations]'")


@dataclass
class TinyModel:
    """A model and the arguments of one call of it."""

    model: Any
    latents: torch.Tensor
    arguments: dict[str, Any] = field(default_factory=dict)

    def __call__(self, latents=None, timestep=500.0):
        latents = self.latents if latents is None else latents
        times = torch.full((latents.shape[0],), float(timestep), device=latents.device)
        return self.model(hidden_states=latents, timestep=times, **self.arguments, return_dict=False)[0]

    def gradients(self):
        """Return the gradient of every parameter for a loss that all of the output counts in."""
        self.model.zero_grad()
        self().square().mean().backward()
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    @torch.no_grad()
    def denoise(self, steps=3, handle=None):
        """Return the latents after some steps of a real scheduler."""
        is_cog = type(self.model).__name__.startswith("CogVideoX")
        scheduler = diffusers.CogVideoXDDIMScheduler() if is_cog else diffusers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(steps)
        latents = self.latents
        for step, timestep in enumerate(scheduler.timesteps):
            if handle is not None:
                handle.step = step
            latents = scheduler.step(self(latents, timestep), timestep, latents, return_dict=False)[0]
        return latents

    def to(self, dtype, device="cpu"):
        """Go over to another precision and device; what is no floating-point tensor keeps its dtype."""
        self.model.to(device, dtype)
        self.latents = self.latents.to(device, dtype)
        self.arguments = {
            name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
            for name, value in self.arguments.items()
        }
        return self

    def double(self):
        """Go over to float64, the oracle's precision."""
        return self.to(torch.float64)


def _normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _wan():
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=64, num_layers=3, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    return TinyModel(model, _normal(1, 4, 5, 12, 16), {"encoder_hidden_states": _normal(1, 7, 16)})


def _hunyuan_video():
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=64, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(16, 24, 24),
    )  # fmt: skip
    arguments = {
        "encoder_hidden_states": _normal(1, 9, 16),
        "pooled_projections": _normal(1, 8),
        # padding at the end of the text
        "encoder_attention_mask": torch.arange(9)[None] < 6,
        "guidance": torch.full((1,), 6.0),
    }
    return TinyModel(model, _normal(1, 4, 3, 6, 6), arguments)


def _cogvideox():
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16,
        num_layers=2, sample_width=8, sample_height=8, sample_frames=9, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=8,
    )  # fmt: skip
    return TinyModel(model, _normal(1, 3, 4, 8, 8), {"encoder_hidden_states": _normal(1, 8, 16)})


def _flux():
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(6.0), torch.arange(6.0))
    arguments = {
        "encoder_hidden_states": _normal(1, 9, 16),
        "pooled_projections": _normal(1, 8),
        "img_ids": places,
        "txt_ids": torch.zeros(9, 3),
    }
    return TinyModel(model, _normal(1, 36, 4), arguments)


MODELS = {"wan": _wan, "hunyuan_video": _hunyuan_video, "cogvideox": _cogvideox, "flux": _flux}


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def make():
    """Return a function that makes one of `MODELS` with the same weights every time."""

    def make_model(name="wan"):
        torch.manual_seed(1)
        tiny = MODELS[name]()
        with torch.no_grad():
            # scale-and-shift tables and biases start at or near zero, where attention would hardly be seen
            for parameter in tiny.model.parameters():
                if parameter.dim() != 2:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        tiny.model.eval()
        return tiny

    return make_model


@pytest.fixture(params=list(MODELS))
def tiny(request, make):
    return make(request.param)


@pytest.fixture
def compiled_afresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    gc.collect()
