"""Raster tokens into tiles and back, each in one pass, with what is cheap on the way: tile means, the gate, their gradients.

A program handles one tile of one head. Its rows of a raster tensor lie apart and are found through `token_of_slot`; heads of one
tile run side by side, so that together they read whole tokens. Tiles are kept [B, H, N * M, D]: a tile is one stretch
of memory.
"""

# Arguments of kernels stand in groups (pointers, strides, sizes, constants), not one a line.
# fmt: off

import torch
import triton
import triton.language as tl

# Rows in registers at once.
ROWS = 64


@triton.jit
def _place(n_heads, n_tiles):
    """Batch, head and tile of this program."""
    pid = tl.program_id(0).to(tl.int64)
    return pid // n_heads // n_tiles, pid % n_heads, pid // n_heads % n_tiles


@triton.jit
def _rows_of(token_ptr, tile, sub, M: tl.constexpr, ROWS: tl.constexpr):
    """Slots of some rows of a tile and their raster tokens, -1 where there is none."""
    slot = tile * M + sub * ROWS + tl.arange(0, ROWS)
    return slot, tl.load(token_ptr + slot).to(tl.int64)


@triton.jit
def _read_tile(
    x_ptr, tiles_ptr, mean_ptr, token_ptr, size_ptr, stride_b, stride_s, stride_h, batch, head, tile, n_heads, n_tiles,
    M: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, HAS_TILES: tl.constexpr,
    HAS_MEAN: tl.constexpr,
):
    """Copy a tile of one head, and write its mean."""
    offs_d = tl.arange(0, D_PAD)
    is_channel = (offs_d < D)[None, :]
    x = x_ptr + batch * stride_b + head * stride_h
    tiles = tiles_ptr + (batch * n_heads + head) * n_tiles * M * D
    total = tl.zeros([D_PAD], tl.float32)
    for sub in tl.static_range(M // ROWS):
        slot, token = _rows_of(token_ptr, tile, sub, M, ROWS)
        is_token = (token >= 0)[:, None]
        value = tl.load(x + token[:, None] * stride_s + offs_d[None, :], mask=is_token & is_channel, other=0.0)
        if HAS_TILES:
            tl.store(tiles + slot[:, None] * D + offs_d[None, :], value, mask=is_channel)
        if HAS_MEAN:
            total += tl.sum(value.to(tl.float32), 0)
    if HAS_MEAN:
        mean = total / tl.load(size_ptr + tile).to(tl.float32)
        tl.store(mean_ptr + ((batch * n_heads + head) * n_tiles + tile) * D + offs_d, mean, mask=offs_d < D)


@triton.jit(do_not_specialize=["n_heads", "n_tiles"])
def _vsa_tile_kernel(
    x_ptr, tiles_ptr, token_ptr, size_ptr, stride_b, stride_s, stride_h, n_heads, n_tiles,
    M: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):
    batch, head, tile = _place(n_heads, n_tiles)
    _read_tile(x_ptr, tiles_ptr, tiles_ptr, token_ptr, size_ptr, stride_b, stride_s, stride_h, batch, head, tile, n_heads, n_tiles,
               M, ROWS, D, D_PAD, True, False)


@triton.jit(do_not_specialize=["n_heads", "n_heads_k", "n_heads_all", "n_tiles"])
def _vsa_inputs_kernel(
    q_ptr, k_ptr, v_ptr, q_tiles_ptr, k_tiles_ptr, v_tiles_ptr, q_mean_ptr, k_mean_ptr, v_mean_ptr, token_ptr, size_ptr,
    stride_q_b, stride_q_s, stride_q_h, stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    n_heads, n_heads_k, n_heads_all, n_tiles,
    M: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, HAS_TILES: tl.constexpr,
    HAS_V_MEAN: tl.constexpr,
):
    """The heads of q, then those of k, then (where something of it is wanted) those of v."""
    batch, head, tile = _place(n_heads_all, n_tiles)
    if head < n_heads:
        _read_tile(q_ptr, q_tiles_ptr, q_mean_ptr, token_ptr, size_ptr, stride_q_b, stride_q_s, stride_q_h, batch, head, tile,
                   n_heads, n_tiles, M, ROWS, D, D_PAD, HAS_TILES, True)
    elif head < n_heads + n_heads_k:
        _read_tile(k_ptr, k_tiles_ptr, k_mean_ptr, token_ptr, size_ptr, stride_k_b, stride_k_s, stride_k_h, batch,
                   head - n_heads, tile, n_heads_k, n_tiles, M, ROWS, D, D_PAD, HAS_TILES, True)
    else:
        _read_tile(v_ptr, v_tiles_ptr, v_mean_ptr, token_ptr, size_ptr, stride_v_b, stride_v_s, stride_v_h, batch,
                   head - n_heads - n_heads_k, tile, n_heads_k, n_tiles, M, ROWS, D, D_PAD, HAS_TILES, HAS_V_MEAN)


@triton.jit(do_not_specialize=["n_heads", "n_tiles"])
def _vsa_tile_bwd_kernel(
    dtiles_ptr, dmean_ptr, dx_ptr, token_ptr, size_ptr,
    stride_dt_b, stride_dt_s, stride_dt_h, stride_dx_b, stride_dx_s, stride_dx_h, n_heads, n_tiles,
    M: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, IN_TILES: tl.constexpr, HAS_MEAN: tl.constexpr,
):
    batch, head, tile = _place(n_heads, n_tiles)
    offs_d = tl.arange(0, D_PAD)
    is_channel = (offs_d < D)[None, :]
    dtiles = dtiles_ptr + batch * stride_dt_b + head * stride_dt_h
    dx = dx_ptr + batch * stride_dx_b + head * stride_dx_h
    share = tl.zeros([D_PAD], tl.float32)
    if HAS_MEAN:
        dmean = tl.load(dmean_ptr + ((batch * n_heads + head) * n_tiles + tile) * D + offs_d, mask=offs_d < D, other=0.0)
        share = dmean / tl.load(size_ptr + tile).to(tl.float32)
    for sub in tl.static_range(M // ROWS):
        slot, token = _rows_of(token_ptr, tile, sub, M, ROWS)
        mask = (token >= 0)[:, None] & is_channel
        row = slot if IN_TILES else token
        grad = tl.load(dtiles + row[:, None] * stride_dt_s + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        grad += share[None, :]
        tl.store(dx + token[:, None] * stride_dx_s + offs_d[None, :], grad.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_heads", "n_tiles"])
def _vsa_untile_kernel(
    fine_ptr, coarse_ptr, gate_ptr, out_ptr, token_ptr,
    stride_f_b, stride_f_s, stride_f_h, stride_g_b, stride_g_s, stride_g_h, stride_o_b, stride_o_s, stride_o_h,
    n_heads, n_tiles,
    M: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, IN_TILES: tl.constexpr, HAS_GATE: tl.constexpr,
):
    batch, head, tile = _place(n_heads, n_tiles)
    offs_d = tl.arange(0, D_PAD)
    is_channel = (offs_d < D)[None, :]
    fine = fine_ptr + batch * stride_f_b + head * stride_f_h
    gates = gate_ptr + batch * stride_g_b + head * stride_g_h
    outs = out_ptr + batch * stride_o_b + head * stride_o_h
    if HAS_GATE:
        at = ((batch * n_heads + head) * n_tiles + tile) * D + offs_d
        coarse = tl.load(coarse_ptr + at, mask=offs_d < D, other=0.0)
    for sub in tl.static_range(M // ROWS):
        slot, token = _rows_of(token_ptr, tile, sub, M, ROWS)
        mask = (token >= 0)[:, None] & is_channel
        row = slot if IN_TILES else token
        out = tl.load(fine + row[:, None] * stride_f_s + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_GATE:
            gate = tl.load(gates + token[:, None] * stride_g_s + offs_d[None, :], mask=mask, other=0.0)
            out += gate.to(tl.float32) * coarse[None, :]
        tl.store(outs + token[:, None] * stride_o_s + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_heads", "n_tiles"])
def _vsa_untile_bwd_kernel(
    dout_ptr, gate_ptr, coarse_ptr, dfine_ptr, dgate_ptr, dcoarse_ptr, token_ptr,
    stride_do_b, stride_do_s, stride_do_h, stride_g_b, stride_g_s, stride_g_h, stride_dg_b, stride_dg_s, stride_dg_h,
    n_heads, n_tiles,
    M: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):
    batch, head, tile = _place(n_heads, n_tiles)
    offs_d = tl.arange(0, D_PAD)
    is_channel = (offs_d < D)[None, :]
    douts = dout_ptr + batch * stride_do_b + head * stride_do_h
    gates = gate_ptr + batch * stride_g_b + head * stride_g_h
    dgates = dgate_ptr + batch * stride_dg_b + head * stride_dg_h
    dfine = dfine_ptr + (batch * n_heads + head) * n_tiles * M * D
    at = ((batch * n_heads + head) * n_tiles + tile) * D + offs_d
    coarse = tl.load(coarse_ptr + at, mask=offs_d < D, other=0.0)
    total = tl.zeros([D_PAD], tl.float32)
    for sub in tl.static_range(M // ROWS):
        slot, token = _rows_of(token_ptr, tile, sub, M, ROWS)
        mask = (token >= 0)[:, None] & is_channel
        dout = tl.load(douts + token[:, None] * stride_do_s + offs_d[None, :], mask=mask, other=0.0)
        gate = tl.load(gates + token[:, None] * stride_g_s + offs_d[None, :], mask=mask, other=0.0)
        tl.store(dfine + slot[:, None] * D + offs_d[None, :], dout, mask=is_channel)
        dgate = dout.to(tl.float32) * coarse[None, :]
        tl.store(dgates + token[:, None] * stride_dg_s + offs_d[None, :], dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
        total += tl.sum(dout.to(tl.float32) * gate.to(tl.float32), 0)
    tl.store(dcoarse_ptr + at, total, mask=offs_d < D)


def _constants(volume: int, head_size: int) -> dict[str, int]:
    return {"M": volume, "ROWS": ROWS, "D": head_size, "D_PAD": triton.next_power_of_2(head_size), "num_warps": 4}


def read_inputs(q, k, v, token_of_slot: torch.Tensor, tile_sizes: torch.Tensor, *, with_tiles: bool, with_v_mean: bool):
    """Tiles [B, H, N * M, D] of q, k and v (None without `with_tiles`), padding zero, and float32 means [B, H, N, D] of each."""
    batch, _, heads, head_size = q.shape
    heads_k = k.shape[2]
    n_tiles, n_slots = tile_sizes.shape[0], token_of_slot.shape[0]
    means = [x.new_empty(batch, x.shape[2], n_tiles, head_size, dtype=torch.float32) for x in (q, k, v)[: 2 + with_v_mean]]
    tiles = [x.new_empty(batch, x.shape[2], n_slots, head_size) for x in (q, k, v)] if with_tiles else None
    heads_all = heads + heads_k * (2 if with_tiles or with_v_mean else 1)
    with torch.cuda.device_of(q):
        _vsa_inputs_kernel[(batch * heads_all * n_tiles,)](
            q, k, v, *(tiles or means[:1] * 3), *means[:2], means[-1], token_of_slot, tile_sizes,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], heads, heads_k, heads_all, n_tiles,
            HAS_TILES=with_tiles, HAS_V_MEAN=with_v_mean,
            # H100, means alone, S=32768, H=12: 122 us by 32 rows on two warps, 140 by 64 on four.
            **_constants(n_slots // n_tiles, head_size) | ({} if with_tiles else {"ROWS": 32, "num_warps": 2}))
    return tiles, means


def tile(x: torch.Tensor, token_of_slot: torch.Tensor, tile_sizes: torch.Tensor) -> torch.Tensor:
    """Tiles [B, H, N * M, D] of x [B, S, H, D], padding zero."""
    batch, _, heads, head_size = x.shape
    n_tiles, n_slots = tile_sizes.shape[0], token_of_slot.shape[0]
    tiles = torch.empty(batch, heads, n_slots, head_size, device=x.device, dtype=x.dtype)
    with torch.cuda.device_of(x):
        _vsa_tile_kernel[(batch * heads * n_tiles,)](
            x, tiles, token_of_slot, tile_sizes, *x.stride()[:3], heads, n_tiles,
            **_constants(n_slots // n_tiles, head_size))
    return tiles


def tile_backward(dtiles: torch.Tensor, dmeans, token_of_slot: torch.Tensor, tile_sizes: torch.Tensor, dx: torch.Tensor) -> None:
    """Fill dx [B, S, H, D] from the gradients of the tiles [B, N * M, H, D] and of the means, which may be None.

    dtiles may be dx itself: then what it holds is added to, and only the means' share is new.
    """
    batch, _, heads, head_size = dx.shape
    n_tiles, n_slots = tile_sizes.shape[0], token_of_slot.shape[0]
    with torch.cuda.device_of(dx):
        _vsa_tile_bwd_kernel[(batch * heads * n_tiles,)](
            dtiles, dtiles if dmeans is None else dmeans, dx, token_of_slot, tile_sizes, *dtiles.stride()[:3],
            *dx.stride()[:3], heads, n_tiles, IN_TILES=dtiles is not dx, HAS_MEAN=dmeans is not None,
            **_constants(n_slots // n_tiles, head_size))


def untile(fine: torch.Tensor, coarse, gate, out: torch.Tensor, token_of_slot: torch.Tensor, n_tiles: int, *,
           in_tiles: bool) -> None:
    """Fill out [B, S, H, D] with the fine branch, plus gate [B, S, H, D] times coarse [B, H, N, D] if given.

    fine is [B, N * M, H, D] with `in_tiles`, else [B, S, H, D]; then it may be out itself.
    """
    batch, _, heads, head_size = fine.shape
    n_slots = token_of_slot.shape[0]
    with torch.cuda.device_of(fine):
        _vsa_untile_kernel[(batch * heads * n_tiles,)](
            fine, fine if coarse is None else coarse, fine if gate is None else gate, out, token_of_slot,
            *fine.stride()[:3], *((0, 0, 0) if gate is None else gate.stride()[:3]), *out.stride()[:3], heads, n_tiles,
            IN_TILES=in_tiles, HAS_GATE=gate is not None, **_constants(n_slots // n_tiles, head_size))


def untile_backward(dout: torch.Tensor, gate: torch.Tensor, coarse: torch.Tensor, token_of_slot: torch.Tensor):
    """Gradients of the fine branch as tiles [B, H, N * M, D], of the coarse branch and of the gate."""
    batch, _, heads, head_size = dout.shape
    n_tiles, n_slots = coarse.shape[2], token_of_slot.shape[0]
    dfine = torch.empty(batch, heads, n_slots, head_size, device=dout.device, dtype=dout.dtype)
    dgate = torch.empty(gate.shape, device=gate.device, dtype=gate.dtype)
    dcoarse = torch.empty_like(coarse)
    with torch.cuda.device_of(dout):
        _vsa_untile_bwd_kernel[(batch * heads * n_tiles,)](
            dout, gate, coarse, dfine, dgate, dcoarse, token_of_slot,
            *dout.stride()[:3], *gate.stride()[:3], *dgate.stride()[:3], heads, n_tiles,
            **_constants(n_slots // n_tiles, head_size))
    return dfine, dcoarse, dgate
