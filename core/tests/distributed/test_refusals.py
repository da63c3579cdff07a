"""What the distributed layers and groups refuse, before any rank is asked."""

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

TWO = SPGroup("no group of torch's: nothing is exchanged", 0, 2)
Q = torch.ones(1, 4, 4, 8)


def layer(sp=TWO, **arguments):
    return DistributedAttention(4, 8, sp_group=sp, backend="TORCH_SDPA", **arguments)


def refused(text, function, *arguments, **options):
    with pytest.raises(UnsupportedRequestError, match=text):
        function(*arguments, **options)


@pytest.mark.parametrize("sp", [TWO, SPGroup.local()], ids=["two ranks", "one rank"])
@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        ("ring", "no backend's log-sum-exp has a gradient"),
        ("usp", "ulysses times ring"),
        ("allgather_kv", "the gather of the keys"),
    ],
)
def test_a_strategy_that_is_not_implemented_is_refused_by_name_with_the_reason(sp, strategy, reason):
    refused(f"strategy '{strategy}' is not implemented: .*{reason}.*use 'ulysses'", layer, sp, strategy=strategy)
    with pytest.raises(UnsupportedRequestError, match=f"strategy '{strategy}' is not implemented"):
        DistributedAttention_VSA(4, 8, sp_group=sp, strategy=strategy)


def test_an_unknown_strategy_is_refused():
    refused("strategy 'magic' is unknown; 'ulysses' is implemented, 'ring', 'usp', 'allgather_kv' are not", layer,
            strategy="magic")  # fmt: skip


def test_a_backend_without_sequence_parallelism_is_refused():
    pytest.importorskip("attnmux_blocksparse")
    refused("split over 2 ranks", DistributedAttention, 4, 64, sp_group=TWO, backend="BLOCK_SPARSE_ATTN")


def test_a_backend_that_declares_only_another_strategy_is_refused(install):
    capabilities = Capabilities(
        dtypes={"float32"}, head_sizes=range(1, 257), devices={"cpu"}, exactness="exact", sequence_parallel={"ring"}
    )
    install("RING_ATTN", capabilities=capabilities)
    refused(
        "RING_ATTN cannot share a sequence of 2 ranks by 'ulysses', the only strategy there is; it declares ring",
        DistributedAttention, 4, 8, sp_group=TWO, backend="RING_ATTN",
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


def test_without_a_group_the_layer_is_local():
    assert layer(None).sp == SPGroup.local()
