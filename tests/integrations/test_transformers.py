"""Backends of attnmux as attention implementations of transformers."""

import pytest
import torch

from attnmux import BackendSpec, Capabilities, UnsupportedRequestError
from attnmux.backends.sdpa import SDPAImpl
from attnmux.integrations.transformers import register
from attnmux.schedule import Rule, Schedule
from attnmux.testing import installed, make_backend

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM  # noqa: E402


@pytest.fixture
def name():
    return register("TORCH_SDPA")


def llama(implementation, *, kv_heads=2, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, attn_implementation=implementation, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokens():
    ids = torch.randint(0, 64, (2, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("padded", [True, False])
def test_equals_sdpa_bit_for_bit(name, kv_heads, padded):
    batch = tokens() if padded else {"input_ids": tokens()["input_ids"]}
    ours, theirs = (llama(kind, kv_heads=kv_heads)(**batch).logits for kind in (name, "sdpa"))
    assert torch.equal(ours, theirs)


@torch.no_grad()
def test_mask_would_be_seen_missing(name):
    padded, whole = (llama(name)(**batch).logits for batch in (tokens(), {"input_ids": tokens()["input_ids"]}))
    assert not torch.equal(padded[0], whole[0])


@torch.no_grad()
def test_generation_with_a_cache_equals_sdpa(name):
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(*(llama(kind).generate(**tokens(), **options) for kind in (name, "sdpa")))


def test_gradients_equal_sdpa(name):
    grads = []
    for kind in (name, "sdpa"):
        model = llama(kind)
        model(**tokens()).logits.square().mean().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_registers_attention_and_mask_under_one_name():
    assert register("TORCH_SDPA", "my_sdpa") == "my_sdpa"
    assert "my_sdpa" in AttentionInterface()
    assert "my_sdpa" in AttentionMaskInterface()


@pytest.mark.parametrize(
    ("backend", "text"),
    [
        ("VIDEO_SPARSE_ATTN", "needs metadata"),
        ("FLASH_ATTN", "takes no bool mask"),
        ("WINDOW_ATTN", "takes no bool mask"),
    ],
)
def test_backends_that_would_lose_something_are_refused(backend, text):
    with pytest.raises(UnsupportedRequestError, match=text):
        register(backend)


def test_dropout_and_unknown_arguments_are_refused(name):
    attend = AttentionInterface()[name]
    q, k, v = torch.randn(3, 1, 2, 5, 64)
    with pytest.raises(UnsupportedRequestError, match="dropout=0.1"):
        attend(torch.nn.Module(), q, k, v, None, dropout=0.1)
    with pytest.raises(UnsupportedRequestError, match="does not serve softcap"):
        attend(torch.nn.Module(), q, k, v, None, softcap=30.0)


@torch.no_grad()
def test_schedule_by_layer_reaches_each_layer():
    capabilities = Capabilities(
        dtypes={"float32"}, head_sizes={64}, devices={"cpu"}, masks={"bool"}, causal=True, gqa=True, exactness="exact"
    )
    spec = BackendSpec("COUNTED_ATTN", target="made:Backend", capabilities=capabilities)
    calls = []

    class Counted(SDPAImpl):
        def forward(self, *tensors, **options):
            calls.append(self)
            return super().forward(*tensors, **options)

    with installed(spec, make_backend("COUNTED_ATTN", Counted)):
        schedule = Schedule(default="TORCH_SDPA", rules=(Rule("COUNTED_ATTN", layers=(-1, None)),))
        register(schedule, "by_layer")
        ours, theirs = (llama(kind)(input_ids=tokens()["input_ids"]).logits for kind in ("by_layer", "sdpa"))
    assert torch.equal(ours, theirs)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (Schedule(default="TORCH_SDPA", rules=(Rule("TORCH_SDPA", steps=(0, 2)),)), "names a default and no steps"),
        (Schedule(), "names a default and no steps"),
        (Schedule(default="TORCH_SDPA"), "give name="),
    ],
)
def test_schedules_that_make_no_sense_there_are_refused(schedule, text):
    with pytest.raises(UnsupportedRequestError, match=text):
        register(schedule)


def test_scale_is_passed(name):
    q, k, v = torch.randn(3, 1, 2, 5, 64)
    ours, weights = AttentionInterface()[name](torch.nn.Module(), q, k, v, None, scaling=0.5, is_causal=False)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)
    assert torch.equal(ours, expected.transpose(1, 2))
    assert weights is None
