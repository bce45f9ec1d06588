"""Both GEMMs for a handful of tokens with fp8 activations on CDNA3: from a route straight to its expert's rows.

As `kernels.route_direct`, with the products of `kernels.stream_fp8`: each route's are summed in the same order, and a
token's routes as the combine adds them, so with the same tile the output has the bits of the planned op's. Four
launches make an op: tokens are rounded, then h, by routes (`kernels.quantise`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.amd import AMDMFMALayout

from moe_ep.kernels.cdna3 import tile_of
from moe_ep.kernels.fragments import swiglu_f32
from moe_ep.kernels.route_direct import _COLUMNS, _local_row
from moe_ep.kernels.stream import row_pointers
from moe_ep.kernels.stream_fp8 import _gemms, _scale_offsets, _weight_offsets


@gluon.jit
def _same_row(
    x_ptr, scale_ptr, row, GROUPS: gl.constexpr, STEPS: gl.constexpr, SLICES: gl.constexpr, mma: gl.constexpr
):
    """One row of activations for all columns: pointers to its elements and its scales, and the scales' offsets."""
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 8)
    same = gl.zeros([_COLUMNS], gl.int32, layout=gl.SliceLayout(0, gl.SliceLayout(1, right)))
    none = gl.zeros([_COLUMNS], gl.int32, layout=gl.SliceLayout(0, gl.SliceLayout(1, mma)))
    wide = row.to(gl.int64)
    rows = row_pointers(x_ptr + wide * (GROUPS * 128), same, GROUPS * 128, STEPS, SLICES, mma)
    return rows, scale_ptr + wide * GROUPS, _scale_offsets(none, GROUPS, STEPS, SLICES, mma)


@gluon.jit
def gate_up_route_fp8(
    x_ptr,  # e4m3fnuz [M, K], K = HIDDEN padded to whole groups
    x_scale_ptr,  # f32 [M, K/128]
    w13_ptr,  # int32 [L, 2·INTER, K/8] in fp8's kernel order
    scale_ptr,  # uint32 [L, 2·INTER, K/128]: exponent fields
    bias_ptr,  # f32 [L, 2·INTER], read if HAS_BIAS
    weight_ptr,  # f32 [M·TOP_K]: routing weights
    h_ptr,  # out: bf16 [M·TOP_K, INTER]; rows of remote routes are not written
    ids_ptr,  # int [M·TOP_K]: experts
    map_ptr,  # int [known]: local row of each expert, read if HAS_MAP
    known,
    limit,
    TOP_K: gl.constexpr,
    HIDDEN: gl.constexpr,
    INTER: gl.constexpr,  # a multiple of BLOCK_N
    LOCAL: gl.constexpr,
    HAS_MAP: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_LIMIT: gl.constexpr,
    XCDS: gl.constexpr,
    BLOCK_N: gl.constexpr,  # intermediate features
    SLICES: gl.constexpr,  # of K, a warp each or more; SLICES·STAGES divides the groups of K
    STAGES: gl.constexpr,  # groups that a warp has under way
):
    # Layout: one program makes BLOCK_N features of one route's h from rows n of w1 and of w3.
    n_tiles: gl.constexpr = INTER // BLOCK_N
    groups: gl.constexpr = (HIDDEN + 127) // 128
    steps: gl.constexpr = groups // SLICES
    mma: gl.constexpr = AMDMFMALayout(3, [16, 16, 32], True, [SLICES, gl.num_warps() // SLICES, 1])
    route, tile = tile_of(gl.program_id(0), n_tiles, XCDS)
    if tile >= n_tiles:
        return
    expert = _local_row(ids_ptr, map_ptr, route, known, LOCAL, HAS_MAP)
    if expert < 0:
        return
    row = expert.to(gl.int64) * (2 * INTER) + tile * BLOCK_N
    word_at, field_at = _weight_offsets(groups, steps, SLICES, BLOCK_N, mma)
    rows, x_scale, x_scale_at = _same_row(x_ptr, x_scale_ptr, route // TOP_K, groups, steps, SLICES, mma)
    zero = gl.zeros([SLICES, BLOCK_N, _COLUMNS], gl.float32, layout=mma)
    words, fields = w13_ptr + row * (groups * 16), scale_ptr + row * groups
    far: gl.constexpr = INTER * groups
    gate, up = _gemms(words, fields, word_at, field_at, rows, x_scale, x_scale_at, far, steps, STAGES, zero)

    out: gl.constexpr = gl.SliceLayout(0, mma)
    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, out))
    if HAS_BIAS:
        gate += gl.load(bias_ptr + row + n)[:, None]
        up += gl.load(bias_ptr + row + n + INTER)[:, None]
    column = gl.arange(0, _COLUMNS, layout=gl.SliceLayout(0, out))[None, :]
    h_rows = h_ptr + route.to(gl.int64) * INTER + tile * BLOCK_N + n[:, None] + 0 * column
    h = swiglu_f32(gate, up, limit, HAS_LIMIT) * gl.load(weight_ptr + route)
    gl.store(h_rows, h.to(gl.bfloat16), mask=column == 0)


@gluon.jit
def down_route_fp8(
    h_ptr,  # e4m3fnuz [M·TOP_K, K], K = INTER padded to whole groups
    h_scale_ptr,  # f32 [M·TOP_K, K/128]
    w2_ptr,  # int32 [L, HIDDEN, K/8] in fp8's kernel order
    scale_ptr,  # uint32 [L, HIDDEN, K/128]: exponent fields
    bias_ptr,  # f32 [L, HIDDEN], read if HAS_BIAS
    weight_ptr,  # f32 [M·TOP_K]: routing weights, read if HAS_BIAS: those of h are in it
    out_ptr,  # out: [M, HIDDEN], the sum over a token's local routes
    ids_ptr,  # int [M·TOP_K]
    map_ptr,  # int [known], read if HAS_MAP
    known,
    TOP_K: gl.constexpr,
    HIDDEN: gl.constexpr,  # a multiple of 2·BLOCK_N
    INTER: gl.constexpr,
    LOCAL: gl.constexpr,
    HAS_MAP: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    XCDS: gl.constexpr,
    BLOCK_N: gl.constexpr,  # hidden features of each half of the tile
    SLICES: gl.constexpr,  # of K, a warp each or more; SLICES·STAGES divides the groups of K
    STAGES: gl.constexpr,  # groups that a warp has under way
):
    # Layout: one program makes 2·BLOCK_N features of one token's output, in two halves like gate and up.
    n_tiles: gl.constexpr = HIDDEN // (2 * BLOCK_N)
    groups: gl.constexpr = (INTER + 127) // 128
    steps: gl.constexpr = groups // SLICES
    mma: gl.constexpr = AMDMFMALayout(3, [16, 16, 32], True, [SLICES, gl.num_warps() // SLICES, 1])
    token, tile = tile_of(gl.program_id(0), n_tiles, XCDS)
    if tile >= n_tiles:
        return
    out: gl.constexpr = gl.SliceLayout(0, mma)
    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, out))
    word_at, field_at = _weight_offsets(groups, steps, SLICES, BLOCK_N, mma)
    zero = gl.zeros([SLICES, BLOCK_N, _COLUMNS], gl.float32, layout=mma)
    far: gl.constexpr = BLOCK_N * groups
    low_out = gl.zeros([BLOCK_N, _COLUMNS], gl.float32, layout=out)
    high_out = low_out
    for slot in range(TOP_K):
        route = token * TOP_K + slot
        expert = _local_row(ids_ptr, map_ptr, route, known, LOCAL, HAS_MAP)
        if expert >= 0:
            row = expert.to(gl.int64) * HIDDEN + tile * (2 * BLOCK_N)
            rows, h_scale, h_scale_at = _same_row(h_ptr, h_scale_ptr, route, groups, steps, SLICES, mma)
            words, fields = w2_ptr + row * (groups * 16), scale_ptr + row * groups
            low, high = _gemms(words, fields, word_at, field_at, rows, h_scale, h_scale_at, far, steps, STAGES, zero)
            if HAS_BIAS:
                weight = gl.load(weight_ptr + route)
                low += gl.load(bias_ptr + row + n)[:, None] * weight
                high += gl.load(bias_ptr + row + n + BLOCK_N)[:, None] * weight
            low_out += low
            high_out += high
    column = gl.arange(0, _COLUMNS, layout=gl.SliceLayout(0, out))[None, :]
    out_rows = out_ptr + token.to(gl.int64) * HIDDEN + tile * (2 * BLOCK_N) + n[:, None] + 0 * column
    gl.store(out_rows, low_out.to(out_ptr.dtype.element_ty), mask=column == 0)
    gl.store(out_rows + BLOCK_N, high_out.to(out_ptr.dtype.element_ty), mask=column == 0)
