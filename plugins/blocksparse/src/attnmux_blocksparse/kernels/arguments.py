"""What the launchers share: index tensors with their strides, and TMA descriptors of [B, S, H, D] tensors."""

from dataclasses import dataclass

import torch

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class IndexTensors:
    """The tensors of a `BlockIndex` as the kernels take them.

    blocks: int32 [B or 1, H or 1, N_q, K], last dimension contiguous. counts: int32 [B or 1, H or 1, N_q], likewise.
    block_q, block_k: tokens per block. q_lengths, k_lengths: int32 [B or 1, N], valid tokens of each block, or None.
    finite_padding: tokens beyond a valid length are known to hold finite numbers, so that they may be read.
    even_rows: all counts are known to be about equal.
    offsets: int32 [B or 1, H or 1, N_k + 1], entries: int32 [B or 1, H or 1, N_q * K], order: int32 [B or 1, H or 1, N_k]:
    the transposed lists; backward only.
    """

    blocks: torch.Tensor
    counts: torch.Tensor
    block_q: int
    block_k: int
    q_lengths: torch.Tensor | None = None
    k_lengths: torch.Tensor | None = None
    finite_padding: bool = False
    even_rows: bool = False
    offsets: torch.Tensor | None = None
    entries: torch.Tensor | None = None
    order: torch.Tensor | None = None

    @property
    def has_valid_lengths(self) -> bool:
        """Whether blocks may be partial."""
        return self.q_lengths is not None or self.k_lengths is not None

    def streams_whole_rows(self, side: str) -> bool:
        """Whether blocks of this side may be read without masking each row (what lies past the tensor reads as 0)."""
        lengths = self.q_lengths if side == "q" else self.k_lengths
        return lengths is None or self.finite_padding

    def list_strides(self) -> tuple[int, int, int]:
        """Batch, head and row stride of the lists."""
        return (*broadcast_strides(self.blocks), self.blocks.stride(2))

    def count_strides(self) -> tuple[int, int]:
        """Batch and head stride of the counts."""
        return broadcast_strides(self.counts)

    def length_stride(self, side: str) -> int:
        """Batch stride of the valid lengths of a side, 0 where they are shared or missing."""
        lengths = self.q_lengths if side == "q" else self.k_lengths
        return 0 if lengths is None or lengths.shape[0] == 1 else lengths.stride(0)


def broadcast_strides(x: torch.Tensor) -> tuple[int, int]:
    """Batch and head stride, 0 where the dimension is broadcast."""
    batch, head = (0 if x.shape[i] == 1 else x.stride(i) for i in range(2))
    return batch, head


def index_arguments(index: IndexTensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """List, count and length pointers; a missing length tensor is stood in for by the counts, which are not read then."""
    q_lengths = index.counts if index.q_lengths is None else index.q_lengths
    k_lengths = index.counts if index.k_lengths is None else index.k_lengths
    return index.blocks, index.counts, q_lengths, k_lengths


def tma_strides(x: torch.Tensor) -> list[int]:
    """Strides of x [B, S, H, D] in the order [B, H, S, D]; a dimension of one element gets a stride that TMA accepts."""
    order = (0, 2, 1)
    return [x.shape[3] if x.shape[i] == 1 else x.stride(i) for i in order] + [1]


def tma_reason(name: str, x: torch.Tensor) -> str | None:
    """Why the tensor memory accelerator cannot address x [B, S, H, D], or None."""
    item = x.element_size()
    if x.data_ptr() % 16:
        return f"{name} starts at an address that 16 bytes do not divide"
    for stride in tma_strides(x)[:3]:
        if stride <= 0 or stride * item % 16 or stride * item >= 2**40:
            return f"{name} has a stride of {stride} elements ({stride * item} bytes); a positive multiple of 16 bytes is needed"
    return None


def describe_rows(*pairs: tuple[torch.Tensor, int], d_pad: int):
    """Triton TMA descriptors of tensors [B, S, H, D], seen as [B, H, S, D], with boxes of `rows` x d_pad."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return [
        TensorDescriptor(x, [x.shape[0], x.shape[2], x.shape[1], x.shape[3]], tma_strides(x), [1, 1, rows, d_pad])
        for x, rows in pairs
    ]
