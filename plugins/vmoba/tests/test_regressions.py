"""One test for each defect of the published implementation."""

import pytest
import torch
from vmoba_oracle import GRID, PAIRS, make_tensors

from attnmux.errors import UnsupportedRequestError
from attnmux_vmoba import VMOBAAttentionImpl, VMOBAAttentionMetadataBuilder, moba_attention, select_chunks
from attnmux_vmoba.ops import attend_chunks
from attnmux_vmoba.prepare import Selection, resolve_chunks

CHUNK = (2, 3)


def choose(q, k, mode, scope, **options):
    return select_chunks(
        q, k, patch_resolution=GRID, chunk_size=CHUNK, select_mode=mode, threshold_type=scope, **options
    )


THRESHOLD_SCOPES = [scope for mode, scope in PAIRS if mode == "threshold"]


@pytest.mark.parametrize("scope", THRESHOLD_SCOPES)
def test_a_threshold_of_one_keeps_every_chunk(scope):
    q, k, *_ = make_tensors()
    assert choose(q, k, "threshold", scope, threshold=1.0).all()


@pytest.mark.parametrize("scope", THRESHOLD_SCOPES)
def test_a_threshold_of_zero_keeps_the_own_chunk_alone(scope):
    q, k, *_ = make_tensors()
    assert (choose(q, k, "threshold", scope, threshold=0.0).sum(2) == 1).all()


@pytest.mark.parametrize("scope", THRESHOLD_SCOPES)
def test_equal_gates_are_not_cut_arbitrarily(scope):
    q, k, *_ = make_tensors()
    assert choose(q * 0, k, "threshold", scope, threshold=0.3).all()


def test_a_large_budget_of_a_head_takes_nothing_of_another_sample():
    q, k, v, _ = make_tensors(B=2)
    options = {
        "patch_resolution": GRID, "chunk_size": CHUNK, "topk": 3, "select_mode": "topk", "threshold_type": "head_global",
    }  # fmt: skip
    both = moba_attention(q, k, v, **options)
    k[1], v[1] = k[1] + 100.0, float("nan")
    changed = moba_attention(q, k, v, **options)
    assert torch.equal(both[0], changed[0])
    assert changed[1].isnan().all()


def test_own_chunks_do_not_swallow_small_differences():
    # the own gate is not raised by a large number, which would round the others away
    q, k, *_ = make_tensors(dtype=torch.float32)
    exact = choose(q.double(), k.double(), "topk", "head_global", topk=3)
    assert torch.equal(choose(q, k, "topk", "head_global", topk=3), exact)


def test_a_head_with_a_part_of_the_budget_is_refused():
    q, k, v, _ = make_tensors(H=2, dtype=torch.float32)
    metadata = VMOBAAttentionMetadataBuilder().build(0, GRID, (1, 1, 1), moba_threshold_type="overall")
    impl = VMOBAAttentionImpl(4, q.shape[3])
    with pytest.raises(UnsupportedRequestError, match="2 of the layer's 4 heads.*number of ranks"):
        impl.forward(q, k, v, metadata)


def test_gradients_are_those_of_the_forward():
    q, k, v, dout = make_tensors()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = moba_attention(*leaves, patch_resolution=GRID, chunk_size=CHUNK, topk=2)
    grads = torch.autograd.grad(out, leaves, dout)
    # v enters linearly: dout . out = v . dv
    torch.testing.assert_close((grads[2] * v).sum(), (dout * out).sum())
    assert all(x.abs().amax() > 0 for x in grads)


def test_autocast_changes_no_bit_forward_or_backward():
    q, k, v = (torch.randn(1, 256, 2, 32) for _ in range(3))
    chunks = resolve_chunks((4, 8, 8), (4, 4))
    results = []
    for enabled in (False, True):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = attend_chunks(*leaves, chunks, Selection(topk=2))
            results.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
