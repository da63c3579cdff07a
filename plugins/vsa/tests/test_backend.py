import inspect
import pickle
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch

import attnmux_vsa
from attnmux.backend import REQUIRED_METHODS, AttentionBackend, AttentionImpl, AttentionMetadata
from attnmux.errors import AttnmuxError, ForwardContextError, UnsupportedRequestError
from attnmux.testing import conformance_class
from attnmux_vsa import (
    VideoSparseAttentionBackend,
    VideoSparseAttentionImpl,
    VideoSparseAttentionMetadata,
    VideoSparseAttentionMetadataBuilder,
    select_tiles,
    video_sparse_attention,
)
from attnmux_vsa.plugin import SPEC
from attnmux_vsa.prepare import build_video_tiling

GRID = (5, 7, 3)
S = 105


def build(step=3, latent=GRID, patch=(1, 1, 1), sparsity=0.5, device="cpu", **more):
    return VideoSparseAttentionMetadataBuilder().build(step, latent, patch, sparsity, device, **more)


def tensor(B=1, length=S, H=2, D=8, dtype=torch.float32):
    return torch.randn(B, length, H, D, generator=torch.Generator().manual_seed(B + H + D)).to(dtype)


class TestSpec:
    def test_entry_point_is_the_spec(self):
        (entry,) = entry_points(group="attnmux.backends", name="VIDEO_SPARSE_ATTN")
        assert entry.load() is SPEC
        assert SPEC.name == entry.name
        assert SPEC.aliases == ("VSA",)

    def test_target_is_the_backend(self):
        module, _, name = SPEC.target.partition(":")
        assert getattr(__import__(module, fromlist=[name]), name) is VideoSparseAttentionBackend

    def test_extra_inputs_are_the_keywords_of_forward(self):
        parameters = inspect.signature(VideoSparseAttentionImpl.forward).parameters.values()
        assert SPEC.capabilities.extra_inputs == {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}

    def test_capabilities_promise_no_exactness_and_no_masks(self):
        assert SPEC.capabilities.exactness == "sparse"
        assert not SPEC.capabilities.masks
        assert not SPEC.capabilities.causal
        assert not SPEC.capabilities.cross_attention

    def test_reading_the_spec_loads_no_torch(self):
        code = "import sys, attnmux_vsa.plugin, attnmux_vsa; dir(attnmux_vsa); assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_importing_the_backend_loads_no_triton(self):
        code = (
            "import sys, torch; before = set(sys.modules); import attnmux_vsa.backend; "
            "assert not [name for name in set(sys.modules) - before if name.startswith('triton')]"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


class TestPackage:
    def test_public_names_are_there_once(self):
        assert len(set(attnmux_vsa.__all__)) == len(attnmux_vsa.__all__)
        assert {name for name in attnmux_vsa.__all__ if getattr(attnmux_vsa, name, None) is None} == set()
        assert set(attnmux_vsa.__all__) <= set(dir(attnmux_vsa))

    def test_unknown_name_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match="module 'attnmux_vsa' has no attribute 'flex_attention'"):
            attnmux_vsa.flex_attention  # noqa: B018

    def test_backend_has_every_required_method(self):
        assert issubclass(VideoSparseAttentionBackend, AttentionBackend)
        for method in REQUIRED_METHODS:
            assert method in vars(VideoSparseAttentionBackend)
        assert VideoSparseAttentionBackend.get_name() == SPEC.name
        assert VideoSparseAttentionBackend.get_impl_cls() is VideoSparseAttentionImpl
        assert VideoSparseAttentionBackend.get_metadata_cls() is VideoSparseAttentionMetadata
        assert VideoSparseAttentionBackend.get_builder_cls() is VideoSparseAttentionMetadataBuilder
        assert VideoSparseAttentionBackend.get_supported_head_sizes() == []
        assert issubclass(VideoSparseAttentionImpl, AttentionImpl)

    def test_check_command_finds_the_conformance_class(self):
        assert conformance_class("VSA") is VideoSparseAttentionBackend.get_conformance_cls()


class TestBuilder:
    def test_metadata_describes_the_grid(self):
        described = build(7, (5, 14, 6), (1, 2, 2), 0.5)
        assert described.current_timestep == 7
        assert described.dit_seq_shape == GRID
        assert described.tile_size == (4, 4, 4)
        assert described.num_tiles == (2, 2, 1)
        assert described.total_seq_length == S
        assert described.topk == 2
        assert described.sparsity == 0.5
        assert described.device == torch.device("cpu")
        assert described.variable_block_sizes.tolist() == [48, 36, 12, 9]

    def test_timestep_is_the_first_field(self):
        assert next(iter(inspect.signature(VideoSparseAttentionMetadata).parameters)) == "current_timestep"
        assert issubclass(VideoSparseAttentionMetadata, AttentionMetadata)

    def test_topk_goes_instead_of_the_sparsity(self):
        described = build(sparsity=None, topk=3)
        assert (described.topk, described.sparsity) == (3, None)

    def test_steps_share_the_tables(self):
        assert build(0).slot_of_token is build(1).slot_of_token
        assert build(0, sparsity=0.9).slot_of_token is build(1).slot_of_token

    def test_prepare_may_be_called_between_batches(self):
        builder = VideoSparseAttentionMetadataBuilder()
        builder.prepare()
        assert builder.build(0, GRID, (1, 1, 1), 0.5, "cpu") == build(0)

    def test_equality_sees_the_step_and_the_grid(self):
        assert build(0) == build(0)
        assert build(0) != build(1)
        assert build(0) != build(0, latent=(7, 5, 3))

    def test_pickle_gives_the_same_metadata_and_results(self):
        described = build()
        back = pickle.loads(pickle.dumps(described))
        assert back == described
        q = tensor()
        assert torch.equal(video_sparse_attention(q, q, q, back), video_sparse_attention(q, q, q, described))

    def test_asdict_zerocopy_gives_the_same_objects(self):
        described = build()
        fields = described.asdict_zerocopy(skip_fields={"device"})
        assert "device" not in fields
        assert fields["slot_of_token"] is described.slot_of_token
        assert next(iter(fields)) == "current_timestep"

    def test_unknown_argument_is_refused_by_name(self):
        with pytest.raises(
            UnsupportedRequestError, match=r"build does not know the argument cache_tile_buf, tau; it takes"
        ):
            build(tau=1, cache_tile_buf=True)

    def test_latent_that_the_patch_does_not_divide_is_refused(self):
        with pytest.raises(
            UnsupportedRequestError, match=r"axis H of the latent has size 7, which the patch size 2 does"
        ):
            build(patch=(1, 2, 1))

    def test_sparsity_that_is_no_fraction_is_refused(self):
        with pytest.raises(UnsupportedRequestError, match=r"sparsity=nan is the fraction of tiles left out"):
            build(sparsity=float("nan"))

    def test_missing_sparsity_is_refused(self):
        with pytest.raises(UnsupportedRequestError, match="neither a sparsity nor topk was given"):
            build(sparsity=None)


class TestImpl:
    def test_impl_is_the_operator(self):
        q, k, v, gate = (tensor(H=H) for H in (4, 2, 2, 4))
        impl = VideoSparseAttentionImpl(4, 8, softmax_scale=0.2, num_kv_heads=2, prefix="blocks.0")
        expected = video_sparse_attention(q, k, v, build(), softmax_scale=0.2, gate_compress=gate)
        assert torch.equal(impl.forward(q, k, v, build(), gate_compress=gate), expected)

    def test_default_scale_is_that_of_the_head_size(self):
        q = tensor()
        impl = VideoSparseAttentionImpl(2, 8)
        assert torch.equal(impl.forward(q, q, q, build()), video_sparse_attention(q, q, q, build()))

    def test_tokens_stay_in_raster_order_around_forward(self):
        impl, q = VideoSparseAttentionImpl(2, 8), tensor()
        assert impl.preprocess_qkv(q, build()) is q
        assert impl.postprocess_output(q, build()) is q

    def test_causal_is_refused(self):
        with pytest.raises(UnsupportedRequestError, match=r"VIDEO_SPARSE_ATTN cannot run causal=True.*TORCH_SDPA"):
            VideoSparseAttentionImpl(2, 8, causal=True)

    def test_unknown_argument_is_refused_by_name(self):
        with pytest.raises(
            UnsupportedRequestError, match="VideoSparseAttentionImpl does not know the argument topk_ratio"
        ):
            VideoSparseAttentionImpl(2, 8, topk_ratio=0.1)

    def test_mask_is_refused_by_name(self):
        q = tensor()
        with pytest.raises(TypeError, match="attn_mask"):
            VideoSparseAttentionImpl(2, 8).forward(q, q, q, build(), attn_mask=torch.ones(S, S, dtype=torch.bool))

    def test_missing_metadata_says_how_to_build_it(self):
        q = tensor()
        with pytest.raises(
            ForwardContextError, match=r"got no metadata; build it with VideoSparseAttentionMetadataBuilder"
        ):
            VideoSparseAttentionImpl(2, 8).forward(q, q, q, None)

    def test_metadata_of_another_backend_is_refused_by_type(self):
        q = tensor()
        with pytest.raises(
            UnsupportedRequestError, match=r"needs VideoSparseAttentionMetadata, got AttentionMetadata; build"
        ):
            VideoSparseAttentionImpl(2, 8).forward(q, q, q, AttentionMetadata(0))

    def test_another_head_size_is_refused(self):
        q = tensor(D=4)
        with pytest.raises(UnsupportedRequestError, match=r"head_dim=4, but this layer was built with head_size=8"):
            VideoSparseAttentionImpl(2, 8).forward(q, q, q, build())


class TestOperator:
    def test_topk_and_sparsity_of_the_call_win_over_the_metadata(self):
        q, k, v = tensor(), tensor(D=8, H=2) + 1, tensor()
        four, two = build(sparsity=0.0), build(sparsity=0.5)
        expected = video_sparse_attention(q, k, v, two)
        assert torch.equal(video_sparse_attention(q, k, v, four, topk=2), expected)
        assert torch.equal(video_sparse_attention(q, k, v, four, sparsity=0.5), expected)
        assert torch.equal(select_tiles(q, k, four, topk=2), select_tiles(q, k, two))
        assert not torch.equal(video_sparse_attention(q, k, v, four), expected)

    def test_tiling_without_a_step_will_do(self):
        q = tensor()
        tiling = build_video_tiling(GRID, sparsity=0.5)
        assert torch.equal(
            video_sparse_attention(q, q, q, tiling, engine="reference"), video_sparse_attention(q, q, q, build())
        )

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (
                {"engine": "fast"},
                r"engine='fast' is unknown to VIDEO_SPARSE_ATTN; expected None or one of reference, triton",
            ),
            ({"engine": "triton"}, r"engine 'triton' cannot run this call: q is on cpu; Triton and an NVIDIA GPU"),
            ({"conform": "fp8"}, r"conform='fp8' is not known; expected None or one of bf16-scores"),
            ({"topk": 5}, r"topk=5 .* integer in \[1, 4\]"),
            ({"topk": 0}, r"topk=0 .* integer in \[1, 4\]"),
            ({"sparsity": 1.5}, r"sparsity=1\.5 .* must lie in \[0, 1\]"),
            ({"topk": 1, "sparsity": 0.5}, r"topk=1 and a sparsity of 0\.5 both say"),
            ({"softmax_scale": float("inf")}, r"softmax_scale must be finite, got inf"),
            ({"softmax_scale": float("nan")}, r"softmax_scale must be finite, got nan"),
            ({"q": torch.zeros(S, 2, 8)}, r"q must be \[batch, sequence, heads, head_dim\], got shape \(105, 2, 8\)"),
            ({"k": torch.zeros(1, S, 16)}, r"k must be \[batch, sequence, heads, head_dim\], got shape \(1, 105, 16\)"),
            ({"v": torch.zeros(S)}, r"v must be \[batch, sequence, heads, head_dim\], got shape \(105,\)"),
            (
                {"q": tensor(length=104)},
                r"q has 104 tokens, but the grid of the metadata is T x H x W = 5 x 7 x 3 = 105",
            ),
            ({"k": tensor(length=60)}, r"k has 60 tokens and q has 105: both must be the same grid 5 x 7 x 3"),
            ({"k": tensor(H=3)}, r"q has 2 heads and k has 3; H must be a multiple of H_kv"),
            ({"k": tensor(H=0)}, r"q has 2 heads and k has 0"),
            (
                {"k": tensor(B=2)},
                r"k must have shape \(1, 105, 2, 8\) to go with q of shape \(1, 105, 2, 8\), got \(2, 105,",
            ),
            ({"k": tensor(D=4)}, r"k must have shape \(1, 105, 2, 8\) .*, got \(1, 105, 2, 4\)"),
            ({"v": tensor(length=60)}, r"v must have shape \(1, 105, 2, 8\) .*, got \(1, 60, 2, 8\)"),
            ({"v": tensor(H=1)}, r"v must have shape \(1, 105, 2, 8\) .*, got \(1, 105, 1, 8\)"),
            (
                {"gate_compress": tensor(H=1)},
                r"gate_compress must have shape \(1, 105, 2, 8\) .*, got \(1, 105, 1, 8\)",
            ),
            ({"gate_compress": torch.zeros(16)}, r"gate_compress must have shape \(1, 105, 2, 8\) .*, got \(16,\)"),
            ({"q": tensor().int()}, r"q has dtype torch\.int32; VIDEO_SPARSE_ATTN computes torch\.float16,"),
            ({"k": tensor().double()}, r"k has dtype torch\.float64 and q torch\.float32; cast them to one dtype"),
            ({"v": tensor().half()}, r"v has dtype torch\.float16 and q torch\.float32"),
            ({"gate_compress": tensor().bfloat16()}, r"gate_compress has dtype torch\.bfloat16 and q torch\.float32"),
            ({"k": tensor().to("meta")}, r"k is on meta and q on cpu; move them to one device"),
            ({"gate_compress": tensor().to("meta")}, r"gate_compress is on meta and q on cpu"),
            (
                {"metadata": build(device="meta")},
                r"q is on cpu and the metadata on meta; build the metadata with device='cpu'",
            ),
            ({"metadata": None}, r"needs the grid of the video and got no metadata"),
            ({"metadata": object()}, r"needs VideoSparseAttentionMetadata, got object"),
        ],
    )
    def test_what_cannot_be_honoured_is_refused_with_the_numbers(self, change, text):
        call = {"q": tensor(), "k": tensor(), "v": tensor(), "metadata": build(), **change}
        with pytest.raises(AttnmuxError, match=text):
            video_sparse_attention(call.pop("q"), call.pop("k"), call.pop("v"), call.pop("metadata"), **call)

    def test_select_tiles_refuses_the_same(self):
        with pytest.raises(UnsupportedRequestError, match="q has 104 tokens"):
            select_tiles(tensor(length=104), tensor(length=104), build())
