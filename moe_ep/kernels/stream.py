"""Both grouped GEMMs for few rows an expert, where memory is the bound: weights stream past a few activations.

Weights go from memory to the registers of the matrix units' operands with 16 bytes a lane, no shared memory and no
barrier; so do the activations, which stay in the first-level cache. What hides the latency is the number of loads that
are under way: STAGES groups of 128 codes for each warp, and SLICES warps that share out K, whose sums are added at
the end.
"""

from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.amd import AMDMFMALayout
from triton.experimental.gluon.language.amd.cdna3 import mfma
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_ep.kernels.fragments import decode, decode_scaled, scale_f32, shifted, shifted_pairs, swiglu


@constexpr_function
def accumulator_layout(CDNA, SLICES, WARPS):
    """[SLICES, N, M]: warps over slices of K and over rows. Rows of weights are the left operand."""
    if CDNA:
        return AMDMFMALayout(3, [16, 16, 16], True, [SLICES, WARPS, 1])
    return gl.NVMMADistributedLayout([2, 0], [SLICES, WARPS, 1], [1, 16, 8])


@gluon.jit
def _dot(a, b, zero, CDNA: gl.constexpr):
    return mfma(a, b, zero) if CDNA else mma_v2(a, b, zero)


@gluon.jit
def _multiply(acc, words, fields, x, zero, CDNA: gl.constexpr, SCALED: gl.constexpr):
    """acc [S, N, M] + a group's 128 products: times the scale of each block of 32, or of scaled weights."""
    if SCALED:
        for block in gl.static_range(4):
            acc = mma_v2(decode_scaled(words, fields[:, :, None], block), x[block], acc)
    else:
        w = decode(words, CDNA)
        for block in gl.static_range(4):
            acc += _dot(w[block], x[block], zero, CDNA) * scale_f32(fields, block, CDNA)[:, :, None]
    return acc


@gluon.jit
def load_blocks(rows, SHIFTS: gl.constexpr = False, CDNA: gl.constexpr = False):
    """A group's four blocks of activations, times 2^64 with SHIFTS."""
    blocks = ()
    for block in gl.static_range(4):
        x = gl.load(rows + 32 * block)
        if SHIFTS:
            x = shifted(x) if CDNA else shifted_pairs(x)
        blocks = blocks + (x,)  # type: ignore[assignment]
    return blocks


@gluon.jit
def first_weights(words_ptr, field_ptr, far, STAGES: gl.constexpr):
    """Begin to load the first STAGES groups of the rows at the pointers, and of those `far` groups on."""
    words = ()
    fields = ()
    for stage in gl.static_range(STAGES):
        for i in gl.static_range(2):
            words = words + (gl.load(words_ptr + stage * 512 + i * far * 32),)  # type: ignore[assignment]
            fields = fields + (gl.load(field_ptr + stage * 16 + i * far),)  # type: ignore[assignment]
    return words, fields


@gluon.jit
def turn(
    accs,
    weights,
    x,
    rows,
    following,
    words_ptr,
    field_ptr,
    zero,
    far,
    STAGES: gl.constexpr,
    CDNA: gl.constexpr,
    SCALED: gl.constexpr,
    SHIFTS: gl.constexpr,
):
    """accs + the products of STAGES groups, in whose place come those at the pointers.

    `x` is the first group's activations, `rows` points to them, `following` to those of the group after the last.
    """
    # The trick: what is loaded STAGES steps ahead lies in registers by stage, so every loop turn is STAGES steps.
    words, fields = weights
    for stage in gl.static_range(STAGES):
        if SCALED:  # many activations: their registers hold one step's only
            now = load_blocks(rows + stage * 128, SHIFTS, CDNA)
        else:
            now = x
            x = load_blocks(following if stage == STAGES - 1 else rows + (stage + 1) * 128, SHIFTS, CDNA)
        for i in gl.static_range(2):
            acc = _multiply(accs[i], words[2 * stage + i], fields[2 * stage + i], now, zero, CDNA, SCALED)
            accs = accs[:i] + (acc,) + accs[i + 1 :]
            word = gl.load(words_ptr + i * far * 32 + stage * 512)
            field = gl.load(field_ptr + i * far + stage * 16)
            words = words[: 2 * stage + i] + (word,) + words[2 * stage + i + 1 :]
            fields = fields[: 2 * stage + i] + (field,) + fields[2 * stage + i + 1 :]
    return accs, (words, fields), x


@gluon.jit
def gemms(
    weights,
    words_ptr,
    field_ptr,
    rows,
    zero,
    FAR: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
    CDNA: gl.constexpr,
    SCALED: gl.constexpr,
):
    """Two products [N, M] with the same activations, of `first_weights` and what follows them."""
    x = load_blocks(rows)
    accs = (zero, zero)
    for step in range(0, STEPS, STAGES):
        ahead = gl.minimum(step + STAGES, STEPS - STAGES)
        following = rows + gl.minimum(step + STAGES, STEPS - 1) * 128
        accs, weights, x = turn(
            accs,
            weights,
            x,
            rows + step * 128,
            following,
            words_ptr + ahead * 512,
            field_ptr + ahead * 16,
            zero,
            FAR,
            STAGES,
            CDNA,
            SCALED,
            False,
        )
    return gl.sum(accs[0], 0), gl.sum(accs[1], 0)


@gluon.jit
def weight_pointers(
    w_ptr,
    field_ptr,
    first,
    groups,
    steps,
    SLICES: gl.constexpr,
    BLOCK_N: gl.constexpr,
    mma: gl.constexpr,
    SCALED: gl.constexpr,
):
    """Pointers [S, BLOCK_N, 32] to a group's words and [S, BLOCK_N] to its scales, of rows from `first` on."""
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 8)
    k = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, left)))
    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, gl.SliceLayout(2, left)))
    s = gl.arange(0, SLICES, layout=gl.SliceLayout(1, gl.SliceLayout(2, left)))
    # 64 bits for the first row, 32 within the tile.
    words = (
        w_ptr
        + first * (groups * 32)
        + (
            ((n[None, :, None] // 16) * groups + s[:, None, None] * steps) * 512
            + (n[None, :, None] % 16) * 32
            + k[None, None, :]
        )
    )
    scaled: gl.constexpr = gl.SliceLayout(2, left if SCALED else mma)  # where the scales are applied
    n_acc = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, scaled))
    s_acc = gl.arange(0, SLICES, layout=gl.SliceLayout(1, scaled))
    return words, field_ptr + first * groups + (
        (n_acc[None, :] // 16) * (groups * 16) + s_acc[:, None] * (steps * 16) + n_acc[None, :] % 16
    )


@gluon.jit
def _positions(start, end, BLOCK_M: gl.constexpr, layout: gl.constexpr):
    """Positions of the block's routes; those past its last repeat it, and what they compute is not stored."""
    return gl.minimum(start + gl.arange(0, BLOCK_M, layout=layout), end - 1)


@gluon.jit
def row_pointers(x_ptr, row, width, steps, SLICES: gl.constexpr, mma: gl.constexpr):
    """Pointers [S, 32, M] to the first block of each slice of the activations' rows [M]."""
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 8)
    k = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, right)))
    s = gl.arange(0, SLICES, layout=gl.SliceLayout(1, gl.SliceLayout(2, right)))
    return x_ptr + row.to(gl.int64)[None, None, :] * width + (s[:, None, None] * (steps * 128) + k[None, :, None])


@gluon.jit
def gate_up_stream(
    x_ptr,  # bf16 [M, HIDDEN], times 2^64
    w13_ptr,  # uint16 [L, 2·INTER, HIDDEN/4] in kernel order
    scale_ptr,  # uint32 [L, 2·INTER, HIDDEN/128]: exponent fields
    bias_ptr,  # f32 [L, 2·INTER], read if HAS_BIAS
    h_ptr,  # out: bf16 [routes, INTER], times 2^64; row = position in the sorted routes
    route_ptr,  # int32 [routes]: token·TOP_K + slot, sorted by local expert
    block_expert_ptr,  # int32 [blocks]: local expert of the block, −1 past the last
    block_start_ptr,  # int32 [blocks]: first position of the block
    block_end_ptr,  # int32 [blocks]: one past its last position
    limit,
    TOP_K: gl.constexpr,
    HIDDEN: gl.constexpr,  # a multiple of 128·SLICES·STAGES
    INTER: gl.constexpr,  # a multiple of BLOCK_N
    HAS_BIAS: gl.constexpr,
    HAS_LIMIT: gl.constexpr,
    CDNA: gl.constexpr,
    PDL: gl.constexpr,
    BLOCK_M: gl.constexpr,  # routes of one expert
    BLOCK_N: gl.constexpr,  # intermediate features
    SLICES: gl.constexpr,  # of K, a warp each
    STAGES: gl.constexpr,  # groups that a warp has under way
):
    # Layout: one program makes a [BLOCK_N, BLOCK_M] tile of hᵀ from rows n of w1 and of w3.
    n_tiles: gl.constexpr = INTER // BLOCK_N
    groups: gl.constexpr = HIDDEN // 128
    steps: gl.constexpr = groups // SLICES
    mma: gl.constexpr = accumulator_layout(CDNA, SLICES, gl.num_warps() // SLICES)
    out: gl.constexpr = gl.SliceLayout(0, mma)
    # From 16 rows on it is no more to scale the weights than the sums. CDNA has no packed bf16 product.
    scaled: gl.constexpr = BLOCK_M >= 16 and not CDNA
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    block = gl.program_id(0) // n_tiles
    expert = gl.load(block_expert_ptr + block)
    if expert < 0:
        return
    n_first = gl.program_id(0) % n_tiles * BLOCK_N
    row = expert.to(gl.int64) * (2 * INTER) + n_first
    words, fields = weight_pointers(w13_ptr, scale_ptr, row, groups, steps, SLICES, BLOCK_N, mma, scaled)

    start = gl.load(block_start_ptr + block)
    end = gl.load(block_end_ptr + block)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 8)
    position = _positions(start, end, BLOCK_M, gl.SliceLayout(0, gl.SliceLayout(1, right)))
    token = gl.load(route_ptr + position) // TOP_K
    rows = row_pointers(x_ptr, token, HIDDEN, steps, SLICES, mma)
    zero = gl.zeros([SLICES, BLOCK_N, BLOCK_M], gl.float32, layout=mma)
    weights = first_weights(words, fields, INTER * groups, STAGES)
    gate, up = gemms(weights, words, fields, rows, zero, INTER * groups, steps, STAGES, CDNA, scaled)

    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, out))
    if HAS_BIAS:
        gate += gl.load(bias_ptr + row + n)[:, None]
        up += gl.load(bias_ptr + row + n + INTER)[:, None]
    m = start + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, out))
    h_rows = h_ptr + m.to(gl.int64)[None, :] * INTER + (n_first + n)[:, None]
    gl.store(h_rows, shifted(swiglu(gate, up, limit, HAS_LIMIT)), mask=(m < end)[None, :])


@gluon.jit
def down_stream(
    h_ptr,  # bf16 [routes, INTER], times 2^64; row = position in the sorted routes
    w2_ptr,  # uint16 [L, HIDDEN, INTER/4] in kernel order
    scale_ptr,  # uint32 [L, HIDDEN, INTER/128]: exponent fields
    bias_ptr,  # f32 [L, HIDDEN], read if HAS_BIAS
    weight_ptr,  # f32 [M·TOP_K]: routing weights
    y_ptr,  # out: f32 [M·TOP_K, HIDDEN], row = route; rows of remote routes are not written
    route_ptr,  # int32 [routes]
    block_expert_ptr,  # int32 [blocks]
    block_start_ptr,  # int32 [blocks]
    block_end_ptr,  # int32 [blocks]
    HIDDEN: gl.constexpr,  # a multiple of 2·BLOCK_N
    INTER: gl.constexpr,  # a multiple of 128·SLICES·STAGES
    HAS_BIAS: gl.constexpr,
    CDNA: gl.constexpr,
    PDL: gl.constexpr,
    BLOCK_M: gl.constexpr,  # routes of one expert
    BLOCK_N: gl.constexpr,  # hidden features of each half of the tile
    SLICES: gl.constexpr,  # of K, a warp each
    STAGES: gl.constexpr,  # groups that a warp has under way
):
    # Layout: one program makes a [2·BLOCK_N, BLOCK_M] tile of yᵀ, in two halves like gate and up, and scatters it to
    # the rows of its routes: every route has a row of its own, so no atomics are needed.
    # The trick: the routes were planned before the kernel before this one began, so weights are fetched before it ends.
    # The plan is read past the first-level cache, which may hold the last op's.
    n_tiles: gl.constexpr = HIDDEN // (2 * BLOCK_N)
    groups: gl.constexpr = INTER // 128
    steps: gl.constexpr = groups // SLICES
    mma: gl.constexpr = accumulator_layout(CDNA, SLICES, gl.num_warps() // SLICES)
    out: gl.constexpr = gl.SliceLayout(0, mma)
    # From 16 rows on it is no more to scale the weights than the sums. CDNA has no packed bf16 product.
    scaled: gl.constexpr = BLOCK_M >= 16 and not CDNA
    block = gl.program_id(0) // n_tiles
    expert = gl.load(block_expert_ptr + block, cache_modifier=".cg")
    if expert < 0:
        if PDL:  # else this kernel could end before the one before it, which those after it count on
            gdc_wait()
        return
    n_first = gl.program_id(0) % n_tiles * (2 * BLOCK_N)
    row = expert.to(gl.int64) * HIDDEN + n_first
    words, fields = weight_pointers(w2_ptr, scale_ptr, row, groups, steps, SLICES, BLOCK_N, mma, scaled)

    start = gl.load(block_start_ptr + block, cache_modifier=".cg")
    end = gl.load(block_end_ptr + block, cache_modifier=".cg")
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 8)
    position = _positions(start, end, BLOCK_M, gl.SliceLayout(0, gl.SliceLayout(1, right)))
    rows = row_pointers(h_ptr, position, INTER, steps, SLICES, mma)
    zero = gl.zeros([SLICES, BLOCK_N, BLOCK_M], gl.float32, layout=mma)
    weights = first_weights(words, fields, BLOCK_N * groups, STAGES)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    low, high = gemms(weights, words, fields, rows, zero, BLOCK_N * groups, steps, STAGES, CDNA, scaled)

    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, out))
    if HAS_BIAS:
        low += gl.load(bias_ptr + row + n)[:, None]
        high += gl.load(bias_ptr + row + n + BLOCK_N)[:, None]
    m = start + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, out))
    mask = (m < end)[None, :]
    route = gl.load(route_ptr + m, mask=m < end, other=0)
    weight = gl.load(weight_ptr + route, mask=m < end, other=0.0)[None, :]
    y_rows = y_ptr + route.to(gl.int64)[None, :] * HIDDEN + (n_first + n)[:, None]
    gl.store(y_rows, low * weight, mask=mask)
    gl.store(y_rows + BLOCK_N, high * weight, mask=mask)
