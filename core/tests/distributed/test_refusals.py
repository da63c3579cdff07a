"""What the distributed layers and groups refuse, before any rank is asked."""

import copy

import pytest
import torch

from attnmux import (
    Capabilities,
    DistributedAttention,
    DistributedAttention_VSA,
    SeqPlan,
    SequenceParallelError,
    SPGroup,
    UnsupportedRequestError,
    init_sequence_parallel,
    use_sp,
)
from attnmux.backends.flash_attn import FlashAttentionMetadata

TWO = SPGroup("no group of torch's: nothing is exchanged", 0, 2)
Q = torch.ones(1, 4, 4, 8)


def layer(sp=TWO, **arguments):
    return DistributedAttention(4, 8, sp_group=sp, backend="TORCH_SDPA", **arguments)


def refused(text, function, *arguments, **options):
    with pytest.raises(UnsupportedRequestError, match=text):
        function(*arguments, **options)


FOUR_OF_TWO = SPGroup("", 1, 4, ulysses=SPGroup("inner", 1, 2), ring=SPGroup("outer", 0, 2))
NOT_MERGED = "declared: ulysses; it returns no log-sum-exp to merge parts by"


def test_an_unknown_strategy_is_refused():
    refused("strategy 'magic' is unknown; there are ulysses, ring, usp, allgather_kv", layer, strategy="magic")


def test_a_strategy_goes_with_the_group_that_it_divides():
    refused(
        "'usp' is ulysses within and a ring across groups of ranks, and this group is not divided",
        layer,
        strategy="usp",
    )
    for strategy in ("ulysses", "ring", "allgather_kv"):
        refused(f"divided into ring and ulysses.*strategy is '{strategy}'", layer, FOUR_OF_TWO, strategy=strategy)
    assert layer(FOUR_OF_TWO).strategy == "usp"
    assert layer().strategy == "ulysses"
    assert layer(SPGroup.local(), strategy="usp").strategy == "usp"


@pytest.mark.parametrize(
    ("sp", "strategy", "why"),
    [(TWO, "ring", NOT_MERGED), (FOUR_OF_TWO, None, NOT_MERGED), (TWO, "allgather_kv", "declared: ulysses")],
    ids=["ring", "usp", "allgather_kv"],
)
@pytest.mark.parametrize("backend", ["VIDEO_SPARSE_ATTN", "SLA_ATTN", "VMOBA_ATTN"])
def test_a_backend_that_needs_the_whole_sequence_is_refused_with_the_reason(backend, sp, strategy, why):
    pytest.importorskip({"VIDEO_SPARSE_ATTN": "attnmux_vsa", "SLA_ATTN": "attnmux_sla"}.get(backend, "attnmux_vmoba"))
    text = rf"a sequence split over {sp.size} ranks by '{strategy or 'usp'}' \({why}\)"
    refused(text, DistributedAttention, 4, 64, sp_group=sp, backend=backend, strategy=strategy)


def test_a_declaration_of_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="'ring' and 'usp' merge parts by their log-sum-exp: declare returns_lse"):
        Capabilities(sequence_parallel={"ring"})
    with pytest.raises(ValueError, match="'allgather_kv' has more keys than queries: declare cross_attention"):
        Capabilities(sequence_parallel={"allgather_kv"})


def parts(**more):
    known = {
        "dtypes": {"float32"}, "head_sizes": range(1, 257), "devices": {"cpu"}, "exactness": "exact", "returns_lse": True,
        "causal": True, "sequence_parallel": {"ring", "usp"},
    }  # fmt: skip
    return Capabilities(**{**known, **more})


def test_a_backend_that_declares_only_another_strategy_is_refused(install):
    install("RING_ATTN", capabilities=parts())
    refused(
        r"a sequence split over 2 ranks by 'ulysses' \(declared: ring, usp\)",
        DistributedAttention, 4, 8, sp_group=TWO, backend="RING_ATTN",
    )  # fmt: skip


def test_the_automatic_choice_is_among_those_that_declare_the_strategy(install):
    install("RING_ATTN", capabilities=parts(), priority=99)
    assert DistributedAttention(4, 8, sp_group=TWO).backend_name == "TORCH_SDPA"
    assert DistributedAttention(4, 8, sp_group=TWO, strategy="ring").backend_name == "RING_ATTN"


def test_a_ring_refuses_what_it_would_get_wrong(install, make_backend):
    shifted = make_backend("RING_ATTN")
    shifted.get_impl_cls().preprocess_qkv = lambda self, x, metadata: x.roll(1, 1)
    install("RING_ATTN", backend=shifted, capabilities=parts(trainable_parameters=True))
    options = {"sp_group": TWO, "strategy": "ring", "backend": "RING_ATTN"}
    refused("rearranges the whole sequence, of which 'ring' shows it a part", DistributedAttention, 4, 8, **options)
    del shifted.get_impl_cls().preprocess_qkv
    refused("has parameters, and causal 'ring' takes two impls", DistributedAttention, 4, 8, causal=True, **options)


@pytest.mark.parametrize("strategy", ["ring", "allgather_kv"])
def test_what_describes_the_whole_sequence_is_refused_where_keys_are_split(strategy):
    words = dict.fromkeys(("replicated_q", "replicated_k", "replicated_v"), Q)
    causal = layer(strategy=strategy, causal=True)
    refused(
        f"replicated tokens of a causal layer go with the strategy 'ulysses', not '{strategy}'",
        causal,
        Q,
        Q,
        Q,
        **words,
    )
    described = layer(strategy=strategy)
    described._metadata_cls = FlashAttentionMetadata
    packed = FlashAttentionMetadata(0, torch.tensor([0, 8], dtype=torch.int32), max_seqlen_q=8)
    refused(
        "TORCH_SDPA: cu_seqlens_k, cu_seqlens_q, max_seqlen_k, max_seqlen_q of the metadata describes the whole sequence",
        described, Q, Q, Q, attn_metadata=packed,
    )  # fmt: skip


def test_a_gate_goes_with_ulysses_alone():
    vsa = DistributedAttention_VSA(4, 8, sp_group=TWO, backend="TORCH_SDPA", strategy="ring")
    vsa._extra_inputs = frozenset({"gate_compress"})
    refused("gate_compress goes with the strategy 'ulysses', not 'ring'", vsa, Q, Q, Q, None, gate_compress=Q)


def test_a_backend_without_sequence_parallelism_is_refused(install):
    install("ALPHA_ATTN")
    refused(
        r"split over 2 ranks by 'ulysses' \(declared: none\)",
        DistributedAttention, 4, 64, sp_group=TWO, backend="ALPHA_ATTN",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"original_seq_len": 0}, "original_seq_len must be >= 1 or None, got 0"),
        ({"original_seq_len": 9}, r"original_seq_len=9 must be in \[1, 8\]: 2 ranks hold 4 rows each"),
        ({"original_seq_len": 7, "plan": SeqPlan.balanced(8, 2)}, "original_seq_len=7, but the plan has 8 tokens"),
        ({"plan": SeqPlan.balanced(9, 2)}, r"the plan is for 2 ranks with \(5, 4\) rows; this is rank 0 of 2 with 4 rows"),
        ({"plan": SeqPlan.balanced(4, 1)}, "the plan is for 1 ranks"),
        ({"replicated_q": Q}, "replicated_q, replicated_k and replicated_v come together; one or two are missing"),
        ({"replicated_q": Q, "replicated_k": Q, "replicated_v": Q[:, :, :3]}, r"v must be \[B, S, 4, 8\]|k and v must agree"),
        ({"replicated_q": Q, "replicated_k": Q[:, 1:], "replicated_v": Q[:, 1:]}, "the batch size 1 and one length"),
        (dict.fromkeys(("replicated_q", "replicated_k", "replicated_v"), Q.double()), "must be torch.float32 on cpu as q is"),
        ({"freqs_cis": torch.ones(8, 4)}, r"freqs_cis must be the pair \(cos, sin\), got Tensor"),
        ({"freqs_cis": (torch.ones(4, 4),) * 2}, r"freqs_cis cos must cover the whole sequence of 8 tokens, got \[4, 4\]"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(options, text):
    refused(text, layer(), Q, Q, Q, **options)


def test_queries_and_keys_of_different_lengths_are_refused():
    refused("q has 4 rows and k 3: one sequence is shared", layer(), Q, Q[:, 1:], Q[:, 1:])


def test_a_plan_of_impossible_numbers_is_refused():
    refused("a plan needs lengths and rows of every rank", SeqPlan, (4, 4), (4,))
    refused(r"lengths must be in \[0, rows\] on every rank", SeqPlan, (5, 4), (4, 4))
    refused("a plan needs length >= 1 and size >= 1, got 0 and 2", SeqPlan.balanced, 0, 2)


def test_the_vsa_layer_refuses_text_and_a_gate_that_does_not_fit():
    pytest.importorskip("attnmux_vsa")
    vsa = DistributedAttention_VSA(4, 8, sp_group=TWO, backend="VIDEO_SPARSE_ATTN")
    refused("takes no replicated tokens; use DistributedAttention", vsa, Q, Q, Q, None, replicated_k=Q)
    refused(r"gate_compress must be \[1, 4, 4, 8\]", vsa, Q, Q, Q, None, gate_compress=Q[:, :3])


def test_the_vsa_layer_refuses_a_gate_for_a_backend_that_takes_none():
    dense = DistributedAttention_VSA(4, 8, sp_group=TWO, backend="TORCH_SDPA")
    refused("TORCH_SDPA does not take gate_compress", dense, Q, Q, Q, None, gate_compress=Q)


def test_a_group_of_another_type_is_refused():
    refused("sp_group must be an SPGroup, ProcessGroup or DeviceMesh, got int", layer, 2)
    with pytest.raises(UnsupportedRequestError, match="got str"), use_sp("sp"):
        pass


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_a_timeout_that_never_or_always_ends_is_refused(timeout):
    refused("timeout must be > 0 seconds", init_sequence_parallel, timeout=timeout)


def test_without_torchrun_the_message_says_so(monkeypatch):
    for variable in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(SequenceParallelError, match="start the program with torchrun"):
        init_sequence_parallel(backend="gloo", timeout=1.0)


def test_the_impl_is_built_for_the_heads_of_its_rank_and_knows_which():
    last = DistributedAttention(5, 8, sp_group=SPGroup("", 1, 2), backend="TORCH_SDPA")
    assert last.attn_impl.num_heads == 2
    assert (last.attn_impl.head_range, last.attn_impl.total_num_heads) == ((3, 5), 5)


def test_the_impl_of_a_group_of_heads_shares_the_parameters_and_knows_its_heads():
    pytest.importorskip("attnmux_sla")
    sla = DistributedAttention(7, 16, sp_group=SPGroup("", 0, 2), backend="SLA_ATTN", overlap=3)
    impls = sla._group_impls
    assert [impl.head_range for impl in impls] == [(0, 2), (2, 3), (3, 4)]
    assert [(impl.num_heads, impl.num_kv_heads, impl.total_num_heads) for impl in impls] == [
        (2, 2, 7),
        (1, 1, 7),
        (1, 1, 7),
    ]
    assert sla.attn_impl.head_range == (0, 4)
    sla.load_state_dict({name: torch.full_like(x, 0.3) for name, x in sla.state_dict().items()}, assign=True)
    for each in (sla, copy.deepcopy(sla.double())):
        assert len(each.state_dict()) == len(list(each.attn_impl.parameters())) > 0
        for impl in each._group_impls:
            assert all(x is y for x, y in zip(impl.parameters(), each.attn_impl.parameters(), strict=True))
    assert not any(impl.training for impl in sla.eval()._group_impls)


def test_an_overlap_that_cannot_be_is_refused():
    for overlap in (0, -1, 1.5, True):
        refused(f"overlap must be an integer >= 1, got {overlap}", layer, overlap=overlap)
    refused(
        "overlap=2 divides the exchange of heads of the strategy 'ulysses', not 'ring'",
        layer,
        strategy="ring",
        overlap=2,
    )
    refused("overlap=3 groups of key heads and their queries, and no rank has more key heads than 2", layer, overlap=3)
    assert layer(SPGroup.local(), overlap=3).overlap == 3


def test_settings_are_one_line():
    # inductor of torch 2.11 copies them into comments of its code, a second line of which is code
    for settings in layer()._settings:
        assert "backend=TORCH_SDPA" in settings
        assert "\n" not in settings


def test_without_a_group_the_layer_is_local():
    assert layer(None).sp == SPGroup.local()
