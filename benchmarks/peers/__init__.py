"""Other projects' attention, measured next to ours.

A peer is a function from a case, and for block-sparse ones a BlockIndex, to a `Workload`. Its package is imported inside: a peer
that is not installed raises ImportError, and a case that it does not take UnsupportedRequestError; both become rows with the
reason. Keys are the backend and engine of the rows.
"""

from peers.fastvideo import fastvideo_triton, sla_triton
from peers.flash_attn_4 import flash_attn_4, flash_attn_4_sparse
from peers.flex import flex_attention
from peers.sage import sage_attention
from peers.sdpa import sdpa_cudnn, sdpa_flash

DENSE_PEERS = {
    ("SDPA", "cudnn"): sdpa_cudnn,
    ("SDPA", "flash"): sdpa_flash,
    ("FLASH_ATTN_4", "cute"): flash_attn_4,
    ("SAGEATTENTION", "triton"): sage_attention,
}
BLOCK_SPARSE_PEERS = {
    ("FASTVIDEO", "triton"): fastvideo_triton,
    ("SLA", "triton"): sla_triton,
    ("FLEX_ATTENTION", "triton"): flex_attention,
    ("FLASH_ATTN_4", "cute, block-sparse"): flash_attn_4_sparse,
}
