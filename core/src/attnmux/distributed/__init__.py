"""Attention over a sequence that several ranks share: groups, plans and the exchange of tokens for heads."""

from attnmux.distributed.collective import Traffic, count_traffic
from attnmux.distributed.group import SPGroup, init_sequence_parallel, use_sp
from attnmux.distributed.plan import HeadPlan, SeqPlan, split_evenly

__all__ = [
    "HeadPlan",
    "SPGroup",
    "SeqPlan",
    "Traffic",
    "count_traffic",
    "init_sequence_parallel",
    "split_evenly",
    "use_sp",
]
