"""Models on a GPU: kernels inside of them, masks that nothing waits for, compiled blocks. Run with `pytest -m gpu`."""

import subprocess
import sys

import pytest
import torch

from attnmux.integrations.diffusers import apply
from attnmux.testing import assert_close_to_oracle

pytestmark = pytest.mark.gpu

DENSE = {
    "TORCH_SDPA": {},
    "VIDEO_SPARSE_ATTN": {"metadata": {"VSA_sparsity": 0.0}},
    "SLA_ATTN": {"impl_args": {"topk_ratio": 1.0}},
    "VMOBA_ATTN": {"metadata": {"topk_ratio": 1.0}},
}


@pytest.fixture
def device():
    return torch.device("cuda")


@torch.no_grad()
@pytest.mark.parametrize("backend", DENSE)
def test_denoises_like_the_models_own_attention_at_the_dense_limit(make, device, backend):
    oracle = make().to(torch.float64, device).denoise()
    tiny = make().to(torch.bfloat16, device)
    own = tiny.denoise()
    with apply(tiny.model, backend, **DENSE[backend]):
        assert_close_to_oracle(tiny.denoise(), oracle, own)


@torch.no_grad()
def test_hunyuan_video_without_padding_goes_without_its_masks(make, device):
    def whole(dtype):
        tiny = make("hunyuan_video")
        tiny.arguments["encoder_attention_mask"] = torch.ones(1, 9, dtype=torch.bool)
        return tiny.to(dtype, device)

    oracle, tiny = whole(torch.float64).denoise(), whole(torch.bfloat16)
    own = tiny.denoise()
    with apply(tiny.model, "SLA_ATTN", **DENSE["SLA_ATTN"], assume_full_masks=True):
        assert_close_to_oracle(tiny.denoise(), oracle, own)


@torch.no_grad()
def test_nothing_waits_for_a_full_mask(make, device):
    tiny = make().to(torch.bfloat16, device)
    q, k, v = torch.randn(3, 1, 5, 2, 64, device=device, dtype=torch.bfloat16)
    mask = torch.ones(1, 1, 1, 5, dtype=torch.bool, device=device)
    with apply(tiny.model, "SLA_ATTN", assume_full_masks=True):
        attend = tiny.model.blocks[0].attn1.processor.attend
        plain = attend(q, k, v, None, None, 0.0, is_causal=False, scale=None)
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            output = attend(q, k, v, None, mask, 0.0, is_causal=False, scale=None)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    assert torch.equal(output, plain)


# a failed assertion ends a process's use of the device
HIDING = """
import torch
from attnmux.integrations.diffusers.processor import _hold_to_full

mask = torch.ones(1, 1, 1, 5, dtype=torch.bool, device="cuda")
_hold_to_full(mask, "SLA_ATTN")
torch.cuda.synchronize()
print("full", flush=True)
mask[..., -1] = False
_hold_to_full(mask, "SLA_ATTN")
torch.cuda.synchronize()
print("passed")
"""


def test_mask_that_hides_a_key_does_not_pass():
    done = subprocess.run([sys.executable, "-c", HIDING], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stdout.split() == ["full"]
    assert "a mask that hides keys" in done.stderr


@torch.no_grad()
@pytest.mark.parametrize("backend", ["VIDEO_SPARSE_ATTN", "SLA_ATTN"])
def test_compiled_blocks_are_right(make, device, backend, compiled_afresh):
    oracle = make().to(torch.float64, device)()
    tiny = make().to(torch.bfloat16, device)
    own = tiny()
    with apply(tiny.model, backend, **DENSE[backend]):
        tiny.model.compile_repeated_blocks(fullgraph=True)
        assert_close_to_oracle(tiny(), oracle, own)
