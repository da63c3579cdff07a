"""The fa4 engine: its refusals, and the lists it hands over, proven with a stand-in that computes from them alone."""

import importlib.machinery
import sys
import types
from importlib.util import find_spec
from typing import NamedTuple

import pytest
import torch
from blocksparse_scenarios import Scenario, assert_call_is_right, make_tensors, oracle

from attnmux.errors import UnsupportedRequestError
from attnmux_blocksparse import BlockIndex, block_sparse_attention, kernels
from attnmux_blocksparse.kernels import KernelRequest, choose_engine, is_supported
from attnmux_blocksparse.kernels.configs import AUTOMATIC_ORDER
from attnmux_blocksparse.kernels.fa4 import padded_rows

BASE = Scenario(len_q=300, len_k=650, heads=2, head_dim=64, block_q=128, block_k=128, dtype=torch.float16)
CASES = {
    "odd_lengths": BASE,
    "whole_blocks": BASE.but(len_q=512, len_k=384),
    "one_token": BASE.but(len_q=1, len_k=1),
    "key_127": BASE.but(len_q=129, len_k=127),
    "query_blocks_256": BASE.but(block_q=256, len_q=700),
    "gqa": BASE.but(heads=4, heads_k=2),
    "gqa_shared": BASE.but(heads=4, heads_k=1, shared=True),
    "empty_rows": BASE.but(empty_rows=True, len_q=650),
    "sparse": BASE.but(keep=0.1, len_q=1000, len_k=1000),
    "full": BASE.but(keep=1.0),
    "heads_first": BASE.but(layout="bhsd"),
    "packed": BASE.but(layout="packed", len_q=300, len_k=300),
    "scale_16": BASE.but(magnitude=16.0),
    "d128": BASE.but(head_dim=128),
}


class StandInLists(NamedTuple):
    """The fields of the library's tuple, in its order."""

    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    cu_total_m_blocks: torch.Tensor | None = None
    cu_block_idx_offsets: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None
    dq_write_order: torch.Tensor | None = None
    dq_write_order_full: torch.Tensor | None = None
    spt: bool | None = None


def block_mask(lists, batch, heads, rows, columns):
    """bool [B, H, rows, columns] from counts and padded rows, after the library's own checks of their shapes."""
    # The compiled kernels read both families, and mask inside the blocks of the first.
    counts, entries = lists.full_block_cnt, lists.full_block_idx
    assert lists.mask_block_cnt.shape == counts.shape and lists.mask_block_idx.shape == entries.shape
    assert lists.mask_block_cnt.dtype == lists.mask_block_idx.dtype == torch.int32
    assert not lists.mask_block_cnt.any()
    assert counts.dtype == entries.dtype == torch.int32
    assert counts.shape == entries.shape[:3] and entries.stride(3) == 1
    assert counts.shape[0] in (1, batch) and counts.shape[1] in (1, heads) and counts.shape[2] == rows
    assert entries.shape[3] <= columns
    mask = torch.zeros(*counts.shape, columns, dtype=torch.bool)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
        used = entries[tuple(place)][: counts[tuple(place)]].long()
        # The end of the sequence is masked in the last entry alone.
        assert used.diff().gt(0).all()
        mask[tuple(place)][used] = True
    return mask.expand(batch, heads, rows, columns)


def token_weights(q, k, mask, blocks, scale):
    """Weights [B, H, S_q, S_k] in float64, 0 in rows without a key, and the LSE."""
    tokens = mask.repeat_interleave(blocks[0], 2)[:, :, : q.shape[1]].repeat_interleave(blocks[1], 3)
    tokens = tokens[..., : k.shape[1]]
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), wide(k, q)) * scale
    scores = scores.masked_fill(~tokens, float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0), scores.logsumexp(-1)


def wide(x, q):
    return x.double().repeat_interleave(q.shape[2] // x.shape[2], 2)


def stand_in_forward(q, k, v, *, softmax_scale, pack_gqa, block_sparse_tensors, return_lse, out, lse):
    assert return_lse and not pack_gqa
    blocks = block_sparse_tensors.block_size
    rows, columns = -(-q.shape[1] // blocks[0]), -(-k.shape[1] // blocks[1])
    mask = block_mask(block_sparse_tensors, q.shape[0], q.shape[2], rows, columns)
    weights, exact_lse = token_weights(q, k, mask, blocks, softmax_scale)
    out.copy_(torch.einsum("bhqk,bkhd->bqhd", weights, wide(v, q)))
    lse.copy_(exact_lse)
    return out, lse, None, None, None


def stand_in_backward(q, k, v, out, dout, lse, *, softmax_scale, deterministic, dq, dk, dv, block_sparse_tensors, dlse):
    assert not deterministic
    assert out.is_contiguous() and lse.is_contiguous()
    blocks = block_sparse_tensors.block_size
    columns, rows = -(-q.shape[1] // blocks[0]), -(-k.shape[1] // blocks[1])
    mask = block_mask(block_sparse_tensors, q.shape[0], q.shape[2], rows, columns).transpose(2, 3)
    weights, _ = token_weights(q, k, mask, blocks, softmax_scale)
    delta = (out.double() * dout.double()).sum(-1).transpose(1, 2)
    if dlse is not None:
        delta = delta - dlse.double()
    dscores = weights * (torch.einsum("bqhd,bkhd->bhqk", dout.double(), wide(v, q)) - delta[..., None]) * softmax_scale
    groups = (k.shape[2], q.shape[2] // k.shape[2])
    dq.copy_(torch.einsum("bhqk,bkhd->bqhd", dscores, wide(k, q)))
    dk.copy_(torch.einsum("bhqk,bqhd->bkhd", dscores, q.double()).unflatten(2, groups).sum(3))
    dv.copy_(torch.einsum("bhqk,bqhd->bkhd", weights, dout.double()).unflatten(2, groups).sum(3))
    return dq, dk, dv


@pytest.fixture
def without_library(monkeypatch):
    """A Hopper card and no flash-attn."""
    for name in [n for n in sys.modules if n.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(kernels, "device_capability", lambda x: (9, 0))
    real = kernels.find_spec

    def find(name):
        if name.startswith("flash_attn"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name)

    monkeypatch.setattr(kernels, "find_spec", find)


@pytest.fixture
def library(monkeypatch):
    """A Hopper card and the stand-in."""
    contents = {
        "flash_attn": {},
        "flash_attn.cute": {},
        "flash_attn.cute.block_sparsity": {"BlockSparseTensorsTorch": StandInLists},
        "flash_attn.cute.interface": {"_flash_attn_fwd": stand_in_forward, "_flash_attn_bwd": stand_in_backward},
    }
    for name, content in contents.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(kernels, "device_capability", lambda x: (9, 0))


def call_backward(dout, dlse, q, k, v, out, lse, index, scale):
    """The backward operator with the index's transposed lists, which a CPU call does not build."""
    tensors = (index.blocks, index.counts, index.q_lengths, index.k_lengths, *index.transpose())
    options = (index.block_q, index.block_k, index.finite_padding, index.even_rows, scale, "fa4")
    return torch.ops.attnmux_blocksparse.backward(dout, dlse, q, k, v, out, lse, *tensors, *options)


def attend(q, k, v, index, scale=0.125):
    return block_sparse_attention(q, k, v, index, softmax_scale=scale, return_lse=True, engine="fa4")


@pytest.mark.parametrize("name", CASES)
def test_lists_handed_over_describe_the_index(name, library):
    scenario = CASES[name]
    q, k, v, dout, index = make_tensors(scenario, seed=len(name))
    out, lse = attend(q, k, v, index, scenario.scale)
    grads = call_backward(dout, None, q, k, v, out, lse, index, scenario.scale)
    assert_call_is_right(q, k, v, dout, index, scenario.scale, out, lse, grads)


def test_gradient_of_the_lse_is_handed_over(library):
    q, k, v, dout, index = make_tensors(BASE.but(empty_rows=True))
    dlse = torch.randn(2, 2, 300)
    out, lse = attend(q, k, v, index)
    grads = call_backward(dout, dlse, q, k, v, out, lse, index, 0.125)
    exact = oracle(q, k, v, dout, index, 0.125, dlse.double())[2:]
    without = oracle(q, k, v, dout, index, 0.125)[2:]
    for got, want, other in zip(grads[:2], exact, without[:2], strict=False):
        assert (got.double() - want).norm() < 0.01 * (other - want).norm()


def test_a_list_wider_than_the_sequence_is_cut(library):
    q, k, v, _, index = make_tensors(BASE)
    padded = BlockIndex.from_block_mask(index.to_block_mask(), block_q=128, block_k=128, width=40)
    for got, want in zip(attend(q, k, v, padded), attend(q, k, v, index), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("shared", [False, True])
def test_padded_rows_hold_the_transposed_lists(shared):
    _, _, _, _, index = make_tensors(BASE.but(len_q=1000, len_k=1700, empty_rows=True, shared=shared, keep=0.3))
    offsets, entries, _ = index.transpose()
    counts, rows = padded_rows(offsets, entries, index.num_query_blocks)
    lists = StandInLists(torch.zeros_like(counts), rows, counts, rows)
    batch, heads = counts.shape[:2]
    assert rows.dtype == counts.dtype == torch.int32
    assert int(rows.min()) >= 0 and int(rows.max()) < index.num_query_blocks
    got = block_mask(lists, batch, heads, index.num_key_blocks, index.num_query_blocks)
    assert torch.equal(got.transpose(2, 3), index.to_block_mask())


def test_missing_library_is_refused_and_never_replaced(without_library):
    q, k, v, _, index = make_tensors(BASE)
    message = (
        r"engine 'fa4' cannot run this call: flash-attn-4 is not installed \(pip install 'flash-attn-4>=4\.0\.0b36'\)\."
    )
    with pytest.raises(UnsupportedRequestError, match=message) as caught:
        attend(q, k, v, index)
    assert [reason.code for reason in caught.value.reasons] == ["flash_attn"]


@pytest.mark.parametrize(
    ("changes", "scale", "message"),
    [
        ({"head_dim": 80}, 0.1, r"head_dim=80; supported: \[64, 96, 128\]"),
        ({"block_q": 64}, 0.1, r"block_q=64; supported: \[128, 256\]"),
        ({"block_k": 64}, 0.1, r"block_k=64; supported: \[128\]"),
        ({"block_k": 256}, 0.1, r"block_k=256; supported: \[128\]"),
        ({"dtype": torch.float32}, 0.1, r"q is torch.float32; supported: bfloat16, float16"),
        ({}, -0.1, r"softmax_scale=-0\.1; a positive scale is needed"),
        ({}, 0.0, r"softmax_scale=0\.0; a positive scale is needed"),
        (
            {"partial": True},
            0.1,
            r"the index has q_lengths or k_lengths; whole blocks are needed \(use engine='triton'\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes, scale, message, library):
    q, k, v, _, index = make_tensors(BASE.but(**changes))
    with pytest.raises(UnsupportedRequestError, match=rf"engine 'fa4' cannot run this call: {message}"):
        attend(q, k, v, index, scale)


@pytest.mark.parametrize(
    ("capability", "message"),
    [
        (None, r"q is on 'cpu'; an NVIDIA GPU is needed"),
        ((8, 9), r"compute capability \(8, 9\); at least \(9, 0\) is needed"),
        ((10, 0), r"the kernels use instructions of sm90 alone \(use engine='triton'\)"),
    ],
)
def test_other_devices_are_refused(capability, message, library, monkeypatch):
    monkeypatch.setattr(kernels, "device_capability", lambda x: capability)
    q, k, v, _, index = make_tensors(BASE)
    with pytest.raises(UnsupportedRequestError, match=message):
        attend(q, k, v, index)


def test_a_stride_that_tma_cannot_step_over_is_refused(library):
    q, k, v, _, index = make_tensors(BASE)
    k = torch.zeros(2, 650, 2, 68, dtype=torch.float16)[..., :64]
    with pytest.raises(UnsupportedRequestError, match=r"k has a stride of 68 elements \(136 bytes\)"):
        attend(q, k, v, index)


def test_deterministic_backward_is_refused(library):
    q, k, v, dout, index = make_tensors(BASE)
    out, lse = attend(q, k, v, index)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(UnsupportedRequestError, match=r"flash-attn 4 has no deterministic block-sparse backward"):
            call_backward(dout, None, q, k, v, out, lse, index, 0.125)
    finally:
        torch.use_deterministic_algorithms(False)


def test_it_is_chosen_by_name_alone(library):
    q, k, v, *_ = make_tensors(BASE)
    request = KernelRequest(q, k, v, 128, 128, 0.125)
    assert is_supported("fa4", request) == []
    assert choose_engine("fa4", request) == "fa4"
    assert "fa4" not in AUTOMATIC_ORDER


def has_flash_attn_4() -> bool:
    try:
        return find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False


ON_GPU = BASE.but(len_q=1000, len_k=1000, head_dim=128, dtype=torch.bfloat16)
GPU_CASES = {
    "128x128": ON_GPU,
    "256x128": ON_GPU.but(block_q=256),
    "whole_blocks": ON_GPU.but(len_q=1024, len_k=1024),
    "one_token": ON_GPU.but(len_q=1, len_k=1, batch=1, heads=1, heads_k=1),
    "63x65": ON_GPU.but(len_q=63, len_k=65),
    "127x640": ON_GPU.but(len_q=127, len_k=640),
    "gqa": ON_GPU.but(heads=8, heads_k=2),
    "gqa_shared": ON_GPU.but(heads=8, heads_k=2, shared=True),
    "empty_rows": ON_GPU.but(empty_rows=True),
    "empty_gqa": ON_GPU.but(empty_rows=True, heads=4, heads_k=1),
    "shared": ON_GPU.but(shared=True),
    "sparse": ON_GPU.but(keep=0.1, len_q=4000, len_k=4000),
    "heads_first": ON_GPU.but(layout="bhsd"),
    "packed": ON_GPU.but(layout="packed"),
    "fp16": ON_GPU.but(dtype=torch.float16),
    "scale_4": ON_GPU.but(magnitude=4.0),
    "scale_16": ON_GPU.but(magnitude=16.0),
    "d64": ON_GPU.but(head_dim=64),
    "d64_256": ON_GPU.but(head_dim=64, block_q=256),
    "d96": ON_GPU.but(head_dim=96),
}
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(not has_flash_attn_4(), reason="flash-attn-4 is not installed"),
]


def gpu_marked(test):
    for mark in on_gpu:
        test = mark(test)
    return test


def skip_unless_sm90():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs sm90")


def run_on_gpu(q, k, v, dout, index, scale):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = attend(*leaves, index, scale)
    grads = torch.autograd.grad(out, leaves, dout)
    return out.detach(), lse.detach(), grads


@gpu_marked
@pytest.mark.parametrize("name", GPU_CASES)
def test_library_agrees_with_the_oracle(name):
    skip_unless_sm90()
    scenario = GPU_CASES[name]
    q, k, v, dout, index = make_tensors(scenario, "cuda", seed=len(name))
    out, lse, grads = run_on_gpu(q, k, v, dout, index, scenario.scale)
    assert_call_is_right(q, k, v, dout, index, scenario.scale, out, lse, grads)


@gpu_marked
def test_library_forward_gives_the_same_bits():
    skip_unless_sm90()
    q, k, v, _, index = make_tensors(ON_GPU, "cuda")
    first = attend(q, k, v, index)
    for _ in range(19):
        for a, b in zip(first, attend(q, k, v, index), strict=True):
            assert torch.equal(a, b)


@gpu_marked
def test_handing_over_does_not_wait_for_the_device():
    skip_unless_sm90()
    q, k, v, dout, index = make_tensors(ON_GPU, "cuda")
    run_on_gpu(q, k, v, dout, index, 0.1)
    fresh = BlockIndex(
        index.blocks.clone(), index.counts.clone(), num_key_blocks=index.num_key_blocks, block_q=128, block_k=128
    )
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_on_gpu(q, k, v, dout, fresh, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
