"""The block-sparse kernels of flash-attn 4 (`flash_attn.cute`) on sm90, forward and backward.

The library takes two families of lists, blocks to mask inside and blocks to attend to whole, each as counts [B, H, N] and
padded rows [B, H, N, K] that may be narrower than the number of blocks and may have a batch or head dimension of 1. Our lists
are the second family, as they are; the first is empty. The library masks the end of the sequence in the last entry of a row
alone, which ascending rows make the right one. A row without entries gives output 0 and LSE -inf.

Source: flash-attn-4 4.0.0b36, flash_attn/cute/block_sparsity.py, block_sparse_utils.py and interface.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attnmux.backends.flash_attn import FLASH_ATTN_4_LOCK
from attnmux.errors import UnsupportedRequestError
from attnmux.spec import Reason

if TYPE_CHECKING:
    from attnmux_blocksparse.kernels.arguments import IndexTensors


def launch_fa4_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    index: IndexTensors,
    *,
    softmax_scale: float,
) -> None:
    """Write out [B, S_q, H, D] and lse [B, H, S_q], both contiguous."""
    from flash_attn.cute.interface import _flash_attn_fwd

    num_key_blocks = -(-k.shape[1] // index.block_k)
    # A list may be wider than there are key blocks, which the library refuses; what is cut off is never an entry.
    lists = _whole_blocks(index.counts, index.blocks[..., :num_key_blocks], index)
    # Packing the query heads of a key head into one tile is for short sequences; it would need shared lists.
    with FLASH_ATTN_4_LOCK:
        _flash_attn_fwd(
            q.detach(),
            k.detach(),
            v.detach(),
            softmax_scale=softmax_scale,
            pack_gqa=False,
            block_sparse_tensors=lists,
            return_lse=True,
            out=out,
            lse=lse,
        )


def launch_fa4_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    dout: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    index: IndexTensors,
    *,
    softmax_scale: float,
) -> None:
    """Write dq, dk and dv, contiguous, in the shapes of q, k and v.

    Numerics: dQ, and with grouped heads dK and dV, are summed in float32 by atomic additions, so their last bits may differ
    from run to run.

    Raises:
        UnsupportedRequestError: PyTorch was told to use deterministic algorithms.
    """
    from flash_attn.cute.interface import _flash_attn_bwd

    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        reason = Reason(
            "deterministic",
            "torch.use_deterministic_algorithms(True) is set; flash-attn 4 has no deterministic block-sparse backward on sm90",
            "use engine='hopper' or 'triton'",
        )
        raise UnsupportedRequestError(f"engine 'fa4' cannot run this call: {reason}.", [reason])
    assert index.offsets is not None
    assert index.entries is not None
    counts, rows = padded_rows(index.offsets, index.entries, index.blocks.shape[2])
    with FLASH_ATTN_4_LOCK:
        _flash_attn_bwd(
            q.detach(),
            k.detach(),
            v.detach(),
            out,
            dout,
            lse,
            softmax_scale=softmax_scale,
            deterministic=False,
            dq=dq,
            dk=dk,
            dv=dv,
            block_sparse_tensors=_whole_blocks(counts, rows, index),
            dlse=None if dlse is None else dlse.contiguous(),
        )


def _whole_blocks(counts: torch.Tensor, rows: torch.Tensor, index: IndexTensors) -> Any:
    """The library's tuple for lists of blocks that are attended to whole; it wants a family of masked blocks too."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    return BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(counts),
        mask_block_idx=rows,
        full_block_cnt=counts,
        full_block_idx=rows,
        block_size=(index.block_q, index.block_k),
    )


def padded_rows(
    offsets: torch.Tensor, entries: torch.Tensor, num_query_blocks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Transposed lists as the library's backward takes them.

    The longest row is known to the device alone, so rows are N_q wide, an [N_k, N_q] tensor, rather than waiting for it:
    17 MB for 600 x 600 blocks and 12 heads (76800 tokens), and 35 MB for positions while it is made. The library's own
    float32 dQ takes 472 MB there.

    Args:
        offsets: int32 [B or 1, H or 1, N_k + 1].
        entries: int32 [B or 1, H or 1, N_q * K].
        num_query_blocks: N_q.

    Returns:
        counts int32 [B or 1, H or 1, N_k] and rows int32 [B or 1, H or 1, N_k, N_q]; a row is specified up to its count.
    """
    place = offsets[..., :-1, None] + torch.arange(num_query_blocks, device=offsets.device)
    place.clamp_(max=entries.shape[-1] - 1)
    rows = entries.gather(-1, place.flatten(-2)).unflatten(-1, place.shape[-2:])
    return offsets.diff(dim=-1), rows
