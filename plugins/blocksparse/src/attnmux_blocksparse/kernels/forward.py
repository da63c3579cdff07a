"""Block-sparse attention forward in plain Triton, for every card from sm80 on.

One program per query tile walks the tile's list of key blocks with an online softmax in base 2. Programs run in order of
heads, so that those in flight share one head's K and V in the L2 cache.
"""

# Arguments of kernels stand in groups (pointers, strides, sizes, constants), not one a line.
# fmt: off

import triton
import triton.language as tl

from attnmux_blocksparse.kernels.arguments import LOG2_E, describe_rows, index_arguments
from attnmux_blocksparse.kernels.configs import ForwardConfig


@triton.jit
def load_tile(desc, ptr, batch, head, row, limit, stride_b, stride_s, stride_h,
              ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, USE_TMA: tl.constexpr):
    """Rows row .. row + ROWS of one head as [ROWS, D_PAD]; rows from `limit` on are zeros on the pointer path."""
    if USE_TMA:
        return desc.load([batch, head, row, 0]).reshape(ROWS, D_PAD)
    offs_r = tl.arange(0, ROWS)
    offs_d = tl.arange(0, D_PAD)
    base = ptr + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + row.to(tl.int64) * stride_s
    mask = (row + offs_r < limit)[:, None]
    if D_PAD != D:
        mask = mask & (offs_d < D)[None, :]
    return tl.load(base + offs_r.to(tl.int64)[:, None] * stride_s + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, x, batch, head, row, limit, stride_b, stride_s, stride_h,
               ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """Write the rows of x below `limit`, in the element type of ptr."""
    offs_r = tl.arange(0, ROWS)
    offs_d = tl.arange(0, D_PAD)
    base = ptr + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + row.to(tl.int64) * stride_s
    mask = (row + offs_r < limit)[:, None]
    if D_PAD != D:
        mask = mask & (offs_d < D)[None, :]
    tl.store(base + offs_r.to(tl.int64)[:, None] * stride_s + offs_d[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def block_end(length_ptr, batch, stride_len, block, seq_len, BLOCK: tl.constexpr, HAS_LENGTHS: tl.constexpr):
    """First row after the valid tokens of a block: its start + its valid length, at most the sequence length."""
    end = tl.minimum((block + 1) * BLOCK, seq_len)
    if HAS_LENGTHS:
        length = tl.load(length_ptr + batch.to(tl.int64) * stride_len + block)
        end = tl.minimum(block * BLOCK + length, end)
    return end


@triton.jit(do_not_specialize=["n_tiles", "n_heads", "len_q", "len_k", "stride_list_b", "stride_list_h", "stride_list_q",
                               "stride_count_b", "stride_count_h", "stride_qlen_b", "stride_klen_b", "stride_lse_b"])
def _blocksparse_fwd_kernel(
    q_desc, k_desc, v_desc, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, list_ptr, count_ptr, q_len_ptr, k_len_ptr,
    stride_q_b, stride_q_s, stride_q_h, stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    stride_out_b, stride_out_s, stride_out_h, stride_lse_b,
    stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h, stride_qlen_b, stride_klen_b,
    n_tiles, n_heads, len_q, len_k, scale_log2,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, HAS_Q_LEN: tl.constexpr, HAS_K_LEN: tl.constexpr, MASK_K: tl.constexpr,
    USE_TMA: tl.constexpr, STAGES: tl.constexpr,
):
    SUB_N: tl.constexpr = BLOCK_K // TILE_N
    pid = tl.program_id(0)
    bh = pid // n_tiles
    batch = bh // n_heads
    head = bh % n_heads
    head_k = head // GROUP
    row = (pid % n_tiles) * TILE_M
    block_q = row // BLOCK_Q
    kept = tl.load(count_ptr + batch.to(tl.int64) * stride_count_b + head.to(tl.int64) * stride_count_h + block_q)
    blocks = (list_ptr + batch.to(tl.int64) * stride_list_b + head.to(tl.int64) * stride_list_h
              + block_q.to(tl.int64) * stride_list_q)
    q = load_tile(q_desc, q_ptr, batch, head, row, len_q, stride_q_b, stride_q_s, stride_q_h, TILE_M, D, D_PAD, USE_TMA)
    offs_n = tl.arange(0, TILE_N)
    # A finite start keeps exp2(masked - maximum) at 0 where a whole stage is masked; -inf - -inf would be NaN.
    m = tl.full([TILE_M], -1e30, tl.float32)
    l = tl.zeros([TILE_M], tl.float32)
    acc = tl.zeros([TILE_M, D_PAD], tl.float32)
    for j in tl.range(0, kept * SUB_N, num_stages=STAGES):
        block = tl.load(blocks + j // SUB_N)
        key = block * BLOCK_K + (j % SUB_N) * TILE_N
        end = len_k
        if MASK_K:
            end = block_end(k_len_ptr, batch, stride_klen_b, block, len_k, BLOCK_K, HAS_K_LEN)
        k = load_tile(k_desc, k_ptr, batch, head_k, key, end, stride_k_b, stride_k_s, stride_k_h, TILE_N, D, D_PAD, USE_TMA)
        s = tl.dot(q, k.T) * scale_log2  # [TILE_M, TILE_N]
        if MASK_K:
            s = tl.where((key + offs_n < end)[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s - m_new[:, None])
        l = l * alpha + tl.sum(p, 1)
        m = m_new
        acc = acc * alpha[:, None]
        v = load_tile(v_desc, v_ptr, batch, head_k, key, end, stride_v_b, stride_v_s, stride_v_h, TILE_N, D, D_PAD, USE_TMA)
        acc = tl.dot(p.to(v.dtype), v, acc)
    # l is 0 for a row with nothing to attend; a NaN stays a NaN.
    is_empty = l == 0.0
    end_q = block_end(q_len_ptr, batch, stride_qlen_b, block_q, len_q, BLOCK_Q, HAS_Q_LEN)
    offs_m = row + tl.arange(0, TILE_M)
    is_empty = is_empty | (offs_m >= end_q)
    acc = tl.where(is_empty[:, None], 0.0, acc / tl.where(is_empty, 1.0, l)[:, None])
    lse = tl.where(is_empty, float("-inf"), (m + tl.log2(tl.where(is_empty, 1.0, l))) * 0.6931471805599453)
    store_tile(out_ptr, acc, batch, head, row, len_q, stride_out_b, stride_out_s, stride_out_h, TILE_M, D, D_PAD)
    lse_row = lse_ptr + batch.to(tl.int64) * stride_lse_b + head.to(tl.int64) * len_q
    tl.store(lse_row + offs_m, lse, mask=offs_m < len_q)


def launch_forward(q, k, v, out, lse, index, *, softmax_scale: float, config: ForwardConfig):
    """Fill out [B, S_q, H, D] and lse [B, H, S_q] (float32, contiguous).

    `index` is an `IndexTensors`. Every element of out and lse is written. The scale may have any sign. The caller has
    checked shapes (`ops`) and support (`kernels.triton_reasons`).
    """
    batch, len_q, heads, head_dim = q.shape
    len_k, heads_k = k.shape[1], k.shape[2]
    d_pad = triton.next_power_of_2(head_dim)
    tile_m = min(config.tile_m, index.block_q)
    tile_n = min(config.tile_n, index.block_k)
    use_tma = config.use_tma and index.streams_whole_rows("k")
    q_desc, k_desc, v_desc = describe_rows((q, tile_m), (k, tile_n), (v, tile_n), d_pad=d_pad) if use_tma else (None,) * 3
    n_tiles = triton.cdiv(len_q, tile_m)
    return _blocksparse_fwd_kernel[(batch * heads * n_tiles,)](
        q_desc, k_desc, v_desc, q, k, v, out, lse, *index_arguments(index),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], lse.stride(0),
        *index.list_strides(), *index.count_strides(), index.length_stride("q"), index.length_stride("k"),
        n_tiles, heads, len_q, len_k, softmax_scale * LOG2_E,
        GROUP=heads // heads_k, BLOCK_Q=index.block_q, BLOCK_K=index.block_k, TILE_M=tile_m, TILE_N=tile_n,
        D=head_dim, D_PAD=d_pad, HAS_Q_LEN=index.q_lengths is not None, HAS_K_LEN=index.k_lengths is not None,
        MASK_K=index.k_lengths is not None or len_k % index.block_k != 0, USE_TMA=use_tma, STAGES=config.stages,
        num_warps=config.warps,
    )
