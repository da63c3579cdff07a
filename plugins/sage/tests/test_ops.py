import pytest
import torch
from sage_scenarios import Scenario, make_lists, make_tensors

from attnmux.errors import UnsupportedRequestError
from attnmux_blocksparse import BlockIndex
from attnmux_sage import kernels, sage_attention
from attnmux_sage.kernels import KernelRequest, choose_engine, default_pv, is_supported
from attnmux_sage.ops import emulate

SCENARIO = Scenario(len_q=300, len_k=200, dtype=torch.float32, head_size=32)


def make_index(scenario, **options):
    blocks, counts = make_lists(scenario.but(is_listed=True))
    sizes = {"num_key_blocks": -(-scenario.len_k // 64), "block_q": 128, "block_k": 64, **options}
    return BlockIndex(blocks, counts, **sizes)


class TestCalls:
    def test_operator_is_the_emulation_on_a_cpu(self):
        q, k, v = make_tensors(SCENARIO)
        index = make_index(SCENARIO)
        for options, extra in (
            ({}, {}),
            ({"pv": "bf16"}, {"pv": "bf16"}),
            ({"index": index}, {"blocks": index.blocks, "counts": index.counts}),
        ):
            out, lse = sage_attention(q, k, v, softmax_scale=0.3, return_lse=True, **options)
            wanted, wanted_lse = emulate(q, k, v, softmax_scale=0.3, **extra)
            assert torch.equal(out, wanted)
            assert torch.equal(lse, wanted_lse)

    def test_default_scale_is_that_of_the_head(self):
        q, k, v = make_tensors(SCENARIO)
        assert torch.equal(sage_attention(q, k, v), sage_attention(q, k, v, softmax_scale=32**-0.5))

    def test_lists_of_all_blocks_are_dense_attention(self):
        q, k, v = make_tensors(SCENARIO)
        blocks = torch.arange(4, dtype=torch.int32).expand(1, 1, 3, 4).contiguous()
        index = BlockIndex(
            blocks, torch.full((1, 1, 3), 4, dtype=torch.int32), num_key_blocks=4, block_q=128, block_k=64
        )
        assert torch.equal(sage_attention(q, k, v, index=index), sage_attention(q, k, v))

    def test_autocast_changes_no_bit(self):
        q, k, v = make_tensors(SCENARIO)
        expected = sage_attention(q, k, v)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(sage_attention(q, k, v), expected)

    def test_inference_mode_works(self):
        q, k, v = make_tensors(SCENARIO)
        with torch.inference_mode():
            out = sage_attention(q, k, v)
        assert torch.equal(out, sage_attention(q, k, v))

    def test_gradients_are_fine_where_none_is_recorded(self):
        q, k, v = make_tensors(SCENARIO)
        with torch.no_grad():
            sage_attention(q.requires_grad_(), k, v)

    def test_lists_and_dense_compile_without_a_break(self):
        q, k, v = make_tensors(SCENARIO)
        index = make_index(SCENARIO)

        def call(q, k, v, blocks, counts):
            listed = BlockIndex(blocks, counts, num_key_blocks=4, block_q=128, block_k=64)
            return sage_attention(q, k, v, index=listed), sage_attention(q, k, v, causal=True)

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        arguments = (q, k, v, index.blocks, index.counts)
        assert all(map(torch.equal, compiled(*arguments), call(*arguments)))


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"q": lambda x: x[0]}, "q must have 4 dimensions, got shape"),
            ({"q": lambda x: x.double()}, "q has dtype torch.float64; supported: torch.float16"),
            ({"k": lambda x: x.half()}, "k is torch.float16 on cpu, q is torch.float32 on cpu"),
            ({"v": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)}, "last dimension of v must be contiguous"),
            ({"k": lambda x: x[:, :0]}, "k is empty: shape"),
            ({"v": lambda x: x[:, 1:]}, "k and v must have one shape"),
            ({"q": lambda x: x[..., :16]}, "must have the batch and head size of q, 1 and 16, got 1 and 32"),
            ({"q": lambda x: x[:, :, :1]}, "q has 1 heads and k has 2; H must be a multiple of H_kv"),
        ],
    )
    def test_tensors_that_do_not_fit_are_named(self, change, text):
        tensors = dict(zip("qkv", make_tensors(SCENARIO), strict=True))
        for name, function in change.items():
            tensors[name] = function(tensors[name])
        with pytest.raises(UnsupportedRequestError, match=text):
            sage_attention(**tensors)

    @pytest.mark.parametrize("head_size", [8, 20, 136])
    def test_other_head_sizes_are_refused(self, head_size):
        tensors = (torch.zeros(1, 3, 1, head_size) for _ in range(3))
        with pytest.raises(
            UnsupportedRequestError, match=f"head_dim={head_size} is not supported; head sizes are 16 to 128"
        ):
            sage_attention(*tensors)

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"softmax_scale": float("nan")}, "softmax_scale must be finite, got nan"),
            ({"pv": "int8"}, "pv='int8' is not known; expected one of fp8, bf16"),
            ({"engine": "cuda"}, "engine='cuda' is not known; engines are reference, triton, hopper, official"),
            ({"index": 3}, "index must be a BlockIndex; got int"),
        ],
    )
    def test_unknown_options_are_refused(self, options, text):
        with pytest.raises(UnsupportedRequestError, match=text):
            sage_attention(*make_tensors(SCENARIO), **options)

    @pytest.mark.parametrize("name", ["q", "k", "v"])
    def test_a_call_that_would_be_recorded_is_refused(self, name):
        tensors = dict(zip("qkv", make_tensors(SCENARIO), strict=True))
        tensors[name].requires_grad_()
        with pytest.raises(
            UnsupportedRequestError, match=r"computes no gradients.*torch.no_grad.*TORCH_SDPA.*SLA_ATTN"
        ):
            sage_attention(**tensors)

    def test_lists_exclude_causal(self):
        with pytest.raises(UnsupportedRequestError, match="causal=True is given together with an index"):
            sage_attention(*make_tensors(SCENARIO), causal=True, index=make_index(SCENARIO))

    def test_lists_for_other_blocks_are_refused(self):
        tensors = make_tensors(SCENARIO)
        with pytest.raises(
            UnsupportedRequestError, match="index has blocks of 64 queries and 64 keys; supported: 128 and 64"
        ):
            sage_attention(*tensors, index=make_index(SCENARIO, block_q=64))
        lengths = torch.full((4,), 40, dtype=torch.int32)
        with pytest.raises(UnsupportedRequestError, match="index has q_lengths or k_lengths"):
            sage_attention(*tensors, index=make_index(SCENARIO, k_lengths=lengths))

    def test_lists_of_another_shape_are_refused(self):
        tensors = make_tensors(SCENARIO)
        for change, text in (
            ({"batch": 3}, "index has 3 batches and 2 heads; needed: 1 or 1, and 1 or 2"),
            ({"heads": 3, "heads_k": 3}, "index has 1 batches and 3 heads"),
            ({"len_q": 500}, "index lists 4 query blocks; 300 query tokens make 3"),
            ({"len_k": 1000}, "index is for 16 key blocks; 200 key tokens make 4"),
        ):
            with pytest.raises(UnsupportedRequestError, match=text):
                sage_attention(*tensors, index=make_index(SCENARIO.but(**change)))


class TestEngines:
    def request(self, **options):
        return KernelRequest(*make_tensors(SCENARIO.but(dtype=torch.float16)), **{"pv": "fp8", **options})

    def on(self, monkeypatch, capability):
        monkeypatch.setattr(kernels, "device_capability", lambda x: capability)

    @pytest.mark.parametrize(
        ("capability", "pv", "engine"),
        [((8, 0), "bf16", "triton"), ((8, 0), "fp8", "reference"), ((8, 9), "fp8", "triton"), ((9, 0), "fp8", "hopper"),
         ((9, 0), "bf16", "hopper"), ((10, 0), "fp8", "triton"), ((12, 0), "fp8", "triton"), ((7, 5), "bf16", "reference")],
    )  # fmt: skip
    def test_the_fastest_that_serves_is_taken(self, monkeypatch, capability, pv, engine):
        self.on(monkeypatch, capability)
        assert choose_engine("", self.request(pv=pv)) == engine

    def test_causal_calls_are_for_plain_triton(self, monkeypatch):
        self.on(monkeypatch, (9, 0))
        assert choose_engine("", self.request(causal=True)) == "triton"
        with pytest.raises(
            UnsupportedRequestError, match=r"'hopper' cannot run this call: causal=True is not served \(use"
        ):
            choose_engine("hopper", self.request(causal=True))

    @pytest.mark.parametrize(("capability", "pv"), [(None, "fp8"), ((8, 6), "bf16"), ((8, 9), "fp8"), ((9, 0), "fp8")])
    def test_default_is_e4m3_where_the_card_has_it(self, monkeypatch, capability, pv):
        self.on(monkeypatch, capability)
        assert default_pv(torch.zeros(1)) == pv

    def test_a_named_engine_is_refused_with_every_reason(self):
        q, k, v = make_tensors(SCENARIO)
        with pytest.raises(
            UnsupportedRequestError, match=r"engine 'triton' cannot run this call: q is on 'cpu'.*torch.float32"
        ):
            sage_attention(q, k, v, engine="triton")
        with pytest.raises(UnsupportedRequestError, match="engine='cuda' is not known"):
            choose_engine("cuda", self.request())

    def test_what_tma_cannot_address_is_for_plain_triton(self, monkeypatch):
        self.on(monkeypatch, (9, 0))
        q, k, v = make_tensors(SCENARIO.but(dtype=torch.float16))
        wide = torch.zeros(*v.shape[:3], 33, dtype=v.dtype)[..., :32]
        assert [r.code for r in is_supported("hopper", KernelRequest(q, k, wide, "bf16"))] == ["strides"]
        assert not is_supported("hopper", KernelRequest(q, k, wide, "fp8"))
        assert choose_engine("", KernelRequest(q, k, wide, "bf16")) == "triton"

    def test_a_missing_triton_is_a_reason(self, monkeypatch):
        self.on(monkeypatch, (9, 0))
        monkeypatch.setattr(kernels, "find_spec", lambda name: None)
        assert "pip install triton" in str(is_supported("triton", self.request())[0])
        assert choose_engine("", self.request()) == "reference"
