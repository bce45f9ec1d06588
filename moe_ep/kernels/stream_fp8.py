"""Both grouped GEMMs with fp8 activations on CDNA3: e2m1 weights as e4m3fnuz, one block of 32 a matrix instruction.

Weights go from memory to operand registers as in `kernels.stream`; five operations make eight of them (`moe_ep.order`).
A block's products come out of v_mfma_f32_16x16x32_fp8_fp8 as an f32 sum of their own, which takes the block's scale;
the sum over a group of 128 takes the activations' (`kernels.quantise`). Every shape and any block of routes is taken: K
is padded to whole groups in the weights and in the activations, and rows of weights come in tiles of 16.

The routing weight is in h, as in DeepSeek's own kernels: so that it is rounded with it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.amd import AMDMFMALayout
from triton.experimental.gluon.language.amd.cdna3 import buffer_load, mfma

from moe_ep.kernels.cdna3 import tile_of
from moe_ep.kernels.fragments import apart, decode_fp8, scale_f32, swiglu_f32
from moe_ep.kernels.stream import _positions, load_blocks, row_pointers

_MISSING = gl.constexpr(2.0**-55)
"""Of the products: a weight comes out of its bits as value · 2^-7, and its scale as 2^(code − 65)."""


@gluon.jit
def _multiply(acc, words, fields, x, x_scale, zero):
    """acc [S, N, M] + a group's 128 products."""
    mma: gl.constexpr = zero.type.layout
    w = decode_fp8(words, mma)
    group = mfma(w[0], x[0], zero) * scale_f32(fields, 0, True)[:, :, None]
    for block in gl.static_range(1, 4):
        group += mfma(w[block], x[block], zero) * scale_f32(fields, block, True)[:, :, None]
    return acc + group * x_scale[:, None, :]


@gluon.jit
def _gemms(
    words_ptr,
    field_ptr,
    word_at,
    field_at,
    rows,
    x_scale_ptr,
    x_scale_at,
    FAR: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
    zero,
):
    """Two products [N, M] with the same activations: of the rows at the pointers, and of those FAR groups on.

    Lanes load at offsets that stay from an address that steps: so a step costs no vector operation.
    """
    # The trick: what is loaded STAGES steps ahead lies in registers by stage, so every loop turn is STAGES steps.
    words = ()
    fields = ()
    for stage in gl.static_range(STAGES):
        for i in gl.static_range(2):
            words = words + (buffer_load(words_ptr + (stage * 256 + i * FAR * 16), word_at),)  # type: ignore[assignment]
            fields = fields + (buffer_load(field_ptr + (stage * 16 + i * FAR), field_at),)  # type: ignore[assignment]
    # Of 64 rows the activations of one step are as many as registers hold.
    early: gl.constexpr = zero.shape[2] <= 32
    following, following_scale = load_blocks(rows), buffer_load(x_scale_ptr, x_scale_at)
    accs = (zero, zero)
    for step in range(0, STEPS, STAGES):
        for stage in gl.static_range(STAGES):
            if early:
                x, x_scale = following, following_scale
                after = gl.minimum(step + stage + 1, STEPS - 1)
                following = load_blocks(rows + after * 128)
                following_scale = buffer_load(x_scale_ptr + after, x_scale_at)
            else:
                x = load_blocks(rows + (step + stage) * 128)
                x_scale = buffer_load(x_scale_ptr + (step + stage), x_scale_at)
            ahead = gl.minimum(step + stage + STAGES, STEPS - 1)
            for i in gl.static_range(2):
                acc = _multiply(accs[i], words[2 * stage + i], fields[2 * stage + i], x, x_scale, zero)
                accs = accs[:i] + (acc,) + accs[i + 1 :]
                word = buffer_load(words_ptr + (i * FAR * 16 + ahead * 256), word_at)
                field = buffer_load(field_ptr + (i * FAR + ahead * 16), field_at)
                words = words[: 2 * stage + i] + (word,) + words[2 * stage + i + 1 :]
                fields = fields[: 2 * stage + i] + (field,) + fields[2 * stage + i + 1 :]
    return gl.sum(apart(accs[0]), 0) * _MISSING, gl.sum(apart(accs[1]), 0) * _MISSING


@gluon.jit
def _weight_offsets(
    GROUPS: gl.constexpr, STEPS: gl.constexpr, SLICES: gl.constexpr, BLOCK_N: gl.constexpr, mma: gl.constexpr
):
    """Where each slice of K begins, of words [S, BLOCK_N, 16] and of scales [S, BLOCK_N]."""
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    word = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(1, left)))
    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, gl.SliceLayout(2, left)))
    s = gl.arange(0, SLICES, layout=gl.SliceLayout(1, gl.SliceLayout(2, left)))
    row = (n[None, :, None] // 16 * GROUPS + s[:, None, None] * STEPS) * 256 + n[None, :, None] % 16 * 16
    n_acc = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, gl.SliceLayout(2, mma)))
    s_acc = gl.arange(0, SLICES, layout=gl.SliceLayout(1, gl.SliceLayout(2, mma)))
    tile = n_acc[None, :] // 16 * (GROUPS * 16) + s_acc[:, None] * (STEPS * 16) + n_acc[None, :] % 16
    return row + word[None, None, :], tile


@gluon.jit
def _scale_offsets(row, GROUPS: gl.constexpr, STEPS: gl.constexpr, SLICES: gl.constexpr, mma: gl.constexpr):
    """Offsets [S, M] of the first scale of each slice of the activations' rows int32 [M]."""
    s = gl.arange(0, SLICES, layout=gl.SliceLayout(1, gl.SliceLayout(1, mma)))
    return row[None, :] * GROUPS + s[:, None] * STEPS


@gluon.jit
def gate_up_stream_fp8(
    x_ptr,  # e4m3fnuz [M, K], K = HIDDEN padded to whole groups
    x_scale_ptr,  # f32 [M, K/128]
    w13_ptr,  # int32 [L, 2·INTER, K/8] in fp8's kernel order
    scale_ptr,  # uint32 [L, 2·INTER, K/128]: exponent fields
    bias_ptr,  # f32 [L, 2·INTER], read if HAS_BIAS
    weight_ptr,  # f32 [M·TOP_K]: routing weights
    h_ptr,  # out: bf16 [routes, INTER]; row = position in the sorted routes
    route_ptr,  # int32 [routes]: token·TOP_K + slot, sorted by local expert
    block_expert_ptr,  # int32 [blocks]: local expert of the block, −1 past the last
    block_start_ptr,  # int32 [blocks]: first position of the block
    block_end_ptr,  # int32 [blocks]: one past its last position
    limit,
    TOP_K: gl.constexpr,
    HIDDEN: gl.constexpr,
    INTER: gl.constexpr,  # a multiple of BLOCK_N
    HAS_BIAS: gl.constexpr,
    HAS_LIMIT: gl.constexpr,
    XCDS: gl.constexpr,
    BLOCK_M: gl.constexpr,  # routes of one expert
    BLOCK_N: gl.constexpr,  # intermediate features
    SLICES: gl.constexpr,  # of K, a warp each; SLICES·STAGES divides the groups of K
    STAGES: gl.constexpr,  # groups that a warp has under way
):
    # Layout: one program makes a [BLOCK_N, BLOCK_M] tile of hᵀ from rows n of w1 and of w3.
    n_tiles: gl.constexpr = INTER // BLOCK_N
    groups: gl.constexpr = (HIDDEN + 127) // 128
    steps: gl.constexpr = groups // SLICES
    mma: gl.constexpr = AMDMFMALayout(3, [16, 16, 32], True, [SLICES, gl.num_warps() // SLICES, 1])
    out: gl.constexpr = gl.SliceLayout(0, mma)
    block, tile = tile_of(gl.program_id(0), n_tiles, XCDS)
    if tile >= n_tiles:
        return
    expert = gl.load(block_expert_ptr + block)
    if expert < 0:
        return
    n_first = tile * BLOCK_N
    row = expert.to(gl.int64) * (2 * INTER) + n_first
    word_at, field_at = _weight_offsets(groups, steps, SLICES, BLOCK_N, mma)

    start = gl.load(block_start_ptr + block)
    end = gl.load(block_end_ptr + block)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 8)
    position = _positions(start, end, BLOCK_M, gl.SliceLayout(0, gl.SliceLayout(1, right)))
    rows = row_pointers(x_ptr, gl.load(route_ptr + position) // TOP_K, groups * 128, steps, SLICES, mma)
    columns: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, mma))
    token = gl.load(route_ptr + _positions(start, end, BLOCK_M, columns)) // TOP_K
    x_scale_at = _scale_offsets(token, groups, steps, SLICES, mma)
    zero = gl.zeros([SLICES, BLOCK_N, BLOCK_M], gl.float32, layout=mma)
    words, fields = w13_ptr + row * (groups * 16), scale_ptr + row * groups
    far: gl.constexpr = INTER * groups
    gate, up = _gemms(words, fields, word_at, field_at, rows, x_scale_ptr, x_scale_at, far, steps, STAGES, zero)

    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, out))
    if HAS_BIAS:
        gate += gl.load(bias_ptr + row + n)[:, None]
        up += gl.load(bias_ptr + row + n + INTER)[:, None]
    m = start + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, out))
    route = gl.load(route_ptr + m, mask=m < end, other=0)
    weight = gl.load(weight_ptr + route, mask=m < end, other=0.0)[None, :]
    h_rows = h_ptr + m.to(gl.int64)[None, :] * INTER + (n_first + n)[:, None]
    h = swiglu_f32(gate, up, limit, HAS_LIMIT) * weight
    gl.store(h_rows, h.to(gl.bfloat16), mask=(m < end)[None, :])


@gluon.jit
def down_stream_fp8(
    h_ptr,  # e4m3fnuz [routes, K], K = INTER padded to whole groups; row = position in the sorted routes
    h_scale_ptr,  # f32 [routes, K/128]
    w2_ptr,  # int32 [L, HIDDEN, K/8] in fp8's kernel order
    scale_ptr,  # uint32 [L, HIDDEN, K/128]: exponent fields
    bias_ptr,  # f32 [L, HIDDEN], read if HAS_BIAS
    weight_ptr,  # f32 [M·TOP_K]: routing weights, read if HAS_BIAS: those of h are in it
    y_ptr,  # out: f32 [M·TOP_K, HIDDEN], row = route; rows of remote routes are not written
    route_ptr,  # int32 [routes]
    block_expert_ptr,  # int32 [blocks]
    block_start_ptr,  # int32 [blocks]
    block_end_ptr,  # int32 [blocks]
    HIDDEN: gl.constexpr,  # a multiple of 2·BLOCK_N
    INTER: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    XCDS: gl.constexpr,
    BLOCK_M: gl.constexpr,  # routes of one expert
    BLOCK_N: gl.constexpr,  # hidden features of each half of the tile
    SLICES: gl.constexpr,  # of K, a warp each; SLICES·STAGES divides the groups of K
    STAGES: gl.constexpr,  # groups that a warp has under way
):
    # Layout: one program makes a [2·BLOCK_N, BLOCK_M] tile of yᵀ, in two halves like gate and up, and scatters it to
    # the rows of its routes: every route has a row of its own, so no atomics are needed.
    n_tiles: gl.constexpr = HIDDEN // (2 * BLOCK_N)
    groups: gl.constexpr = (INTER + 127) // 128
    steps: gl.constexpr = groups // SLICES
    mma: gl.constexpr = AMDMFMALayout(3, [16, 16, 32], True, [SLICES, gl.num_warps() // SLICES, 1])
    out: gl.constexpr = gl.SliceLayout(0, mma)
    block, tile = tile_of(gl.program_id(0), n_tiles, XCDS)
    if tile >= n_tiles:
        return
    expert = gl.load(block_expert_ptr + block)
    if expert < 0:
        return
    n_first = tile * (2 * BLOCK_N)
    row = expert.to(gl.int64) * HIDDEN + n_first
    word_at, field_at = _weight_offsets(groups, steps, SLICES, BLOCK_N, mma)

    start = gl.load(block_start_ptr + block)
    end = gl.load(block_end_ptr + block)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 8)
    position = _positions(start, end, BLOCK_M, gl.SliceLayout(0, gl.SliceLayout(1, right)))
    rows = row_pointers(h_ptr, position, groups * 128, steps, SLICES, mma)
    columns: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, mma))
    h_scale_at = _scale_offsets(_positions(start, end, BLOCK_M, columns), groups, steps, SLICES, mma)
    zero = gl.zeros([SLICES, BLOCK_N, BLOCK_M], gl.float32, layout=mma)
    words, fields = w2_ptr + row * (groups * 16), scale_ptr + row * groups
    far: gl.constexpr = BLOCK_N * groups
    low, high = _gemms(words, fields, word_at, field_at, rows, h_scale_ptr, h_scale_at, far, steps, STAGES, zero)

    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, out))
    m = start + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, out))
    mask = (m < end)[None, :]
    route = gl.load(route_ptr + m, mask=m < end, other=0)
    if HAS_BIAS:
        weight = gl.load(weight_ptr + route, mask=m < end, other=0.0)[None, :]
        low += gl.load(bias_ptr + row + n)[:, None] * weight
        high += gl.load(bias_ptr + row + n + BLOCK_N)[:, None] * weight
    y_rows = y_ptr + route.to(gl.int64)[None, :] * HIDDEN + (n_first + n)[:, None]
    gl.store(y_rows, low, mask=mask)
    gl.store(y_rows + BLOCK_N, high, mask=mask)
