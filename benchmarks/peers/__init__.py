"""Other projects' attention, measured next to ours.

Every peer is a function from a case, and for block-sparse ones a BlockIndex, to a `Workload`. Its package is imported inside, so a
peer that is not installed raises ImportError, and a case that it does not take raises UnsupportedRequestError: both become rows
with the reason.
"""

from peers.fastvideo import fastvideo_triton, sla_triton
from peers.flash_attn_4 import flash_attn_4, flash_attn_4_sparse
from peers.flex import flex_attention
from peers.sage import sage_attention
from peers.sdpa import sdpa_cudnn, sdpa_flash

DENSE_PEERS = {
    "SDPA_CUDNN": sdpa_cudnn,
    "SDPA_FLASH": sdpa_flash,
    "FLASH_ATTN_4": flash_attn_4,
    "SAGEATTENTION": sage_attention,
}
BLOCK_SPARSE_PEERS = {
    "FASTVIDEO_TRITON": fastvideo_triton,
    "SLA_TRITON": sla_triton,
    "FLEX_ATTENTION": flex_attention,
    "FLASH_ATTN_4_SPARSE": flash_attn_4_sparse,
}
