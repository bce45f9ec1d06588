"""Both grouped GEMMs for many rows an expert on Hopper, where the matrix units are the bound.

A program per multiprocessor makes one tile after the other with two warpgroups that wait for each other only through
what they share: while one decodes, the other multiplies. Each copies its rows' words and scales, and half of the
activations, ahead into shared memory; the activations stay there as the right operand, the weights are decoded in
registers as the left one. Here scales are applied to the weights, which come out as their value times 2^-64; the sums
are multiplied by 2^64, so the activations are taken as they are.
"""

from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_ep.kernels.fragments import decode_scaled, swiglu

# Triton 3.9 has another name for it.
_copy = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared

# Eight rows of 64 bytes a warp: a thread has few rows, whose pointers it keeps.
COPIES = gl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0]))


@constexpr_function
def pieces(WIDTH):
    """(first column, columns) of products of powers of two columns that make WIDTH, widest first."""
    found, first = [], 0
    while first < WIDTH:
        columns = 1 << ((WIDTH - first).bit_length() - 1)
        found.append((first, columns))
        first += columns
    return found


@constexpr_function
def piece_count(WIDTH):
    return len(pieces(WIDTH))


@constexpr_function
def first_column(WIDTH, i):
    return pieces(WIDTH)[i][0]


@constexpr_function
def columns(WIDTH, i):
    return pieces(WIDTH)[i][1]


@constexpr_function
def accumulator_layout(COLUMNS):
    """[64, COLUMNS] of one warpgroup."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])


@constexpr_function
def steps_ahead(STAGES):
    """How many groups are copied ahead. With stages to spare, one is left for the warpgroup that is behind."""
    return STAGES - 1 if STAGES < 4 else STAGES - 2


@gluon.jit
def _pipe(BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """For each stage: activations [BLOCK_M, 128], words [2·BLOCK_N, 32], scales [2·BLOCK_N], and two barriers.

    `ready` is for those who read a stage, `free` for those who fill it.
    """
    x = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, 128], gl.NVMMASharedLayout(128, 16, 2))
    # 64 bytes a row: two rows a phase, four phases of 16 bytes, so that eight rows' parts lie in different banks.
    w_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [1, 0])
    words = gl.allocate_shared_memory(gl.uint16, [STAGES, 2 * BLOCK_N, 32], w_layout)
    fields = gl.allocate_shared_memory(gl.uint32, [STAGES, 2 * BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=2)
        mbarrier.init(free.index(stage), count=2)
    return x, words, fields, ready, free


@gluon.jit
def _fill(pipe, sources, group, index, HALF: gl.constexpr, STAGES: gl.constexpr):
    """Begin to copy this warpgroup's part of a group, the index-th since the kernel began, once its stage is free."""
    stage = index % STAGES
    x, words, fields, _ready, free = pipe
    x_rows, inside, word_rows, field_rows = sources
    mbarrier.wait(free.index(stage), index // STAGES % 2 ^ 1)
    _copy(x.index(stage).slice(HALF * x_rows.shape[0], x_rows.shape[0]), x_rows + group * 128, mask=inside)
    _copy(words.index(stage).slice(HALF * word_rows.shape[0], word_rows.shape[0]), word_rows + group * 512)
    _copy(fields.index(stage).slice(HALF * word_rows.shape[0], word_rows.shape[0]), field_rows + group * 16)
    async_copy.commit_group()


@gluon.jit
def _hand_over(pipe, index, exists, AHEAD: gl.constexpr, STAGES: gl.constexpr):
    """Wait for this warpgroup's part of the index-th group, and say that it is there."""
    async_copy.wait_group(AHEAD - 1)
    fence_async_shared()
    mbarrier.arrive(pipe[3].index(index % STAGES), count=1, pred=exists)


@gluon.jit
def _zeros(COLUMNS: gl.constexpr):
    return gl.zeros([64, COLUMNS], gl.float32, layout=accumulator_layout(COLUMNS))


@gluon.jit
def _product(acc, w, x, FIRST: gl.constexpr, COLUMNS: gl.constexpr, block: gl.constexpr):
    left: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(COLUMNS), 2)
    right = x.slice(FIRST, COLUMNS, 0).slice(32 * block, 32, 1).permute((1, 0))
    return warpgroup_mma(gl.convert_layout(w, left), right, acc, is_async=True)


@gluon.jit
def _multiply(accs, words, fields, x, WIDTH: gl.constexpr, TILE: gl.constexpr, block: gl.constexpr):
    """One block's products of the TILE-th 64 rows, which may still be under way."""
    count: gl.constexpr = piece_count(WIDTH)
    w = decode_scaled(words, fields[:, None], block)
    products = ()
    for i in gl.static_range(count):
        acc = _product(accs[TILE * count + i], w, x, first_column(WIDTH, i), columns(WIDTH, i), block)
        products = products + (acc,)  # type: ignore[assignment]
    return accs[: TILE * count] + products + accs[TILE * count + count :]


@gluon.jit
def _wait(accs, PENDING: gl.constexpr):
    """Wait until that many products are under way."""
    done = warpgroup_mma_wait(PENDING, deps=accs)
    return (done,) if len(accs) == 1 else done


@gluon.jit
def _own(buffers, stage, TILE: gl.constexpr, layout: gl.constexpr):
    """The TILE-th 64 rows of a stage."""
    return buffers.index(stage).slice(64 * TILE, 64).load(layout)


@gluon.jit
def _products(
    pipe, sources, first, HALF: gl.constexpr, TILES: gl.constexpr, GROUPS: gl.constexpr, WIDTH: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """This warpgroup's TILES times [64, WIDTH], in pieces; `first` is the index of the tile's first group."""
    ahead: gl.constexpr = steps_ahead(STAGES)
    count: gl.constexpr = piece_count(WIDTH)
    left: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(columns(WIDTH, 0)), 2)
    x, words, fields, ready, free = pipe
    accs = ()
    for i in gl.static_range(TILES * count):
        accs = accs + (_zeros(columns(WIDTH, i % count)),)  # type: ignore[assignment]
    for group in range(GROUPS):
        index = first + group
        stage = index % STAGES
        mbarrier.wait(ready.index(stage), index // STAGES % 2)
        w = ()
        f = ()
        for tile in gl.static_range(TILES):
            w = w + (_own(words, stage, HALF * TILES + tile, left),)  # type: ignore[assignment]
            f = f + (_own(fields, stage, HALF * TILES + tile, gl.SliceLayout(1, left)),)  # type: ignore[assignment]
        # The trick: one product is under way while the next one's weights are decoded.
        for i in gl.static_range(4 * TILES):
            accs = _multiply(accs, w[i % TILES], f[i % TILES], x.index(stage), WIDTH, i % TILES, i // TILES)
            accs = _wait(accs, count)
            if i == 0:  # then none of the last group's is under way
                mbarrier.arrive(free.index((index + STAGES - 1) % STAGES), count=1, pred=group > 0)
        if group + ahead < GROUPS:
            _fill(pipe, sources, group + ahead, index + ahead, HALF, STAGES)
        else:
            async_copy.commit_group()  # of nothing, so that the count holds
        _hand_over(pipe, index + 1, group + 1 < GROUPS, ahead, STAGES)
    accs = _wait(accs, 0)
    mbarrier.arrive(free.index((first + GROUPS - 1) % STAGES), count=1)
    return accs


@gluon.jit
def _begin(pipe, sources, first, HALF: gl.constexpr, STAGES: gl.constexpr):
    """Copy a tile's first groups."""
    ahead: gl.constexpr = steps_ahead(STAGES)
    for group in gl.static_range(ahead):
        _fill(pipe, sources, group, first + group, HALF, STAGES)
    _hand_over(pipe, first, True, ahead, STAGES)


@gluon.jit
def _row(r, GROUPS: gl.constexpr, FAR: gl.constexpr):
    """Where row r of a tile lies, in groups: with FAR, eight rows in turn of two matrices that are FAR groups apart.

    Then a lane's two rows of each product are one of gate and the same of up.
    """
    n = r // 16 * 8 + r % 8 if FAR else r
    return (n // 16) * (GROUPS * 16) + n % 16 + (r % 16 // 8 * FAR if FAR else 0)


@gluon.jit
def _weight_sources(
    w_ptr, field_ptr, row, ROWS: gl.constexpr, GROUPS: gl.constexpr, FAR: gl.constexpr, HALF: gl.constexpr
):
    """Pointers [ROWS, 32] to the first group's words and [ROWS] to its scales: this warpgroup's rows of a tile."""
    copies: gl.constexpr = COPIES
    field_copies: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    r = HALF * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, copies))
    k = gl.arange(0, 32, layout=gl.SliceLayout(0, copies))
    # 64 bits for the first row, 32 within the tile.
    words = w_ptr + row * (GROUPS * 32) + (_row(r, GROUPS, FAR)[:, None] * 32 + k[None, :])
    r = HALF * ROWS + gl.arange(0, ROWS, layout=field_copies)
    return words, field_ptr + row * GROUPS + _row(r, GROUPS, FAR)


@gluon.jit
def _row_sources(x_ptr, row, WIDTH: gl.constexpr, copies: gl.constexpr):
    """Pointers [M, 128] to the first group of the activations' rows [M]."""
    return x_ptr + row.to(gl.int64)[:, None] * WIDTH + gl.arange(0, 128, layout=gl.SliceLayout(0, copies))[None, :]


@gluon.jit
def _gate_up(
    x_ptr, w13_ptr, scale_ptr, bias_ptr, h_ptr, plan, limit, blocks, pipe,
    HALF: gl.constexpr, TOP_K: gl.constexpr, HIDDEN: gl.constexpr, INTER: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_LIMIT: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup's half of all tiles of this program."""
    groups: gl.constexpr = HIDDEN // 128
    n_tiles: gl.constexpr = INTER // BLOCK_N
    copies: gl.constexpr = COPIES
    own = HALF * (BLOCK_M // 2) + gl.arange(0, BLOCK_M // 2, layout=gl.SliceLayout(1, copies))
    route_ptr, block_expert_ptr, block_start_ptr, block_end_ptr = plan
    index = 0
    for tile in range(gl.program_id(0), blocks * n_tiles, gl.num_programs(0)):
        block = tile // n_tiles
        expert = gl.load(block_expert_ptr + block)
        if expert >= 0:
            start = gl.load(block_start_ptr + block)
            end = gl.load(block_end_ptr + block)
            n_first = tile % n_tiles * BLOCK_N
            row = expert.to(gl.int64) * (2 * INTER) + n_first
            words, fields = _weight_sources(w13_ptr, scale_ptr, row, BLOCK_N, groups, INTER * groups, HALF)
            # Positions past the block's last repeat it, and are not read.
            token = gl.load(route_ptr + gl.minimum(start + own, end - 1)) // TOP_K
            sources = (_row_sources(x_ptr, token, HIDDEN, copies), (start + own < end)[:, None], words, fields)
            _begin(pipe, sources, index, HALF, STAGES)
            quarters = (end - start + BLOCK_M // 4 - 1) // (BLOCK_M // 4)
            for i in gl.static_range(1, 5):
                if quarters == i:
                    _gate_up_tile(
                        h_ptr, bias_ptr, limit, pipe, sources, index, row, start, end, n_first,
                        HALF, HIDDEN, INTER, HAS_BIAS, HAS_LIMIT, BLOCK_N // 64, i * BLOCK_M // 4, STAGES,
                    )  # fmt: skip
            index += groups


@gluon.jit
def _gate_up_tile(
    h_ptr, bias_ptr, limit, pipe, sources, index, row, start, end, n_first,
    HALF: gl.constexpr, HIDDEN: gl.constexpr, INTER: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_LIMIT: gl.constexpr,
    TILES: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    accs = _products(pipe, sources, index, HALF, TILES, HIDDEN // 128, WIDTH, STAGES)
    count: gl.constexpr = piece_count(WIDTH)
    for i in gl.static_range(TILES * count):
        n = 32 * (HALF * TILES + i // count)
        _store_h(
            accs[i], h_ptr, bias_ptr + row + n, limit, n_first + n, start + first_column(WIDTH, i % count), end,
            INTER, HAS_BIAS, HAS_LIMIT, columns(WIDTH, i % count),
        )  # fmt: skip


@gluon.jit
def _store_h(
    acc, h_ptr, bias_ptr, limit, n_first, start, end,
    INTER: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_LIMIT: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """acc [64, COLUMNS], eight rows of gate and of up in turn → 32 features of h."""
    gate, up = (acc * 18446744073709551616.0).reshape([4, 2, 8, COLUMNS]).permute((0, 2, 3, 1)).split()  # 2^64
    gate = gate.reshape([32, COLUMNS])
    up = up.reshape([32, COLUMNS])
    n = gl.arange(0, 32, layout=gl.SliceLayout(1, gate.type.layout))
    if HAS_BIAS:
        gate += gl.load(bias_ptr + n)[:, None]
        up += gl.load(bias_ptr + n + INTER)[:, None]
    m = start + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, gate.type.layout))
    h_rows = h_ptr + m.to(gl.int64)[None, :] * INTER + (n_first + n)[:, None]
    gl.store(h_rows, swiglu(gate, up, limit, HAS_LIMIT), mask=(m < end)[None, :])


@gluon.jit
def _down(
    h_ptr, w2_ptr, scale_ptr, bias_ptr, weight_ptr, y_ptr, plan, blocks, pipe,
    HALF: gl.constexpr, HIDDEN: gl.constexpr, INTER: gl.constexpr, HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup's half of all tiles of this program."""
    groups: gl.constexpr = INTER // 128
    n_tiles: gl.constexpr = HIDDEN // (2 * BLOCK_N)
    copies: gl.constexpr = COPIES
    own = HALF * (BLOCK_M // 2) + gl.arange(0, BLOCK_M // 2, layout=gl.SliceLayout(1, copies))
    route_ptr, block_expert_ptr, block_start_ptr, block_end_ptr = plan
    index = 0
    for tile in range(gl.program_id(0), blocks * n_tiles, gl.num_programs(0)):
        block = tile // n_tiles
        expert = gl.load(block_expert_ptr + block)
        if expert >= 0:
            start = gl.load(block_start_ptr + block)
            end = gl.load(block_end_ptr + block)
            n_first = tile % n_tiles * (2 * BLOCK_N)
            row = expert.to(gl.int64) * HIDDEN + n_first
            words, fields = _weight_sources(w2_ptr, scale_ptr, row, BLOCK_N, groups, 0, HALF)
            sources = (_row_sources(h_ptr, start + own, INTER, copies), (start + own < end)[:, None], words, fields)
            _begin(pipe, sources, index, HALF, STAGES)
            quarters = (end - start + BLOCK_M // 4 - 1) // (BLOCK_M // 4)
            for i in gl.static_range(1, 5):
                if quarters == i:
                    _down_tile(
                        y_ptr, bias_ptr, weight_ptr, route_ptr, pipe, sources, index, row, start, end, n_first,
                        HALF, HIDDEN, INTER, HAS_BIAS, BLOCK_N // 64, i * BLOCK_M // 4, STAGES,
                    )  # fmt: skip
            index += groups


@gluon.jit
def _down_tile(
    y_ptr, bias_ptr, weight_ptr, route_ptr, pipe, sources, index, row, start, end, n_first,
    HALF: gl.constexpr, HIDDEN: gl.constexpr, INTER: gl.constexpr, HAS_BIAS: gl.constexpr,
    TILES: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    accs = _products(pipe, sources, index, HALF, TILES, INTER // 128, WIDTH, STAGES)
    count: gl.constexpr = piece_count(WIDTH)
    for i in gl.static_range(TILES * count):
        n = 64 * (HALF * TILES + i // count)
        _store_y(
            accs[i], y_ptr, bias_ptr + row + n, weight_ptr, route_ptr, n_first + n,
            start + first_column(WIDTH, i % count), end, HIDDEN, HAS_BIAS, columns(WIDTH, i % count),
        )  # fmt: skip


@gluon.jit
def _store_y(
    acc, y_ptr, bias_ptr, weight_ptr, route_ptr, n_first, start, end,
    HIDDEN: gl.constexpr, HAS_BIAS: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """acc [64, COLUMNS] times the routing weights → rows of y: of bf16 through shared memory, 16 bytes a lane."""
    mma: gl.constexpr = accumulator_layout(COLUMNS)
    small: gl.constexpr = y_ptr.dtype.element_ty.primitive_bitwidth == 16
    out: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1]) if small else mma
    acc *= 18446744073709551616.0  # 2^64
    if HAS_BIAS:
        acc += gl.load(bias_ptr + gl.arange(0, 64, layout=gl.SliceLayout(1, mma)))[:, None]
    m = start + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, mma))
    route = gl.load(route_ptr + m, mask=m < end, other=0)
    acc *= gl.load(weight_ptr + route, mask=m < end, other=0.0)[None, :]
    y = gl.convert_layout(acc.to(y_ptr.dtype.element_ty), out)
    m = start + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, out))
    n = n_first + gl.arange(0, 64, layout=gl.SliceLayout(1, out))
    route = gl.load(route_ptr + m, mask=m < end, other=0)
    gl.store(y_ptr + route.to(gl.int64)[None, :] * HIDDEN + n[:, None], y, mask=(m < end)[None, :])


@gluon.jit(do_not_specialize=["blocks"])
def gate_up_warpgroup(
    x_ptr,  # bf16 [M, HIDDEN]
    w13_ptr,  # uint16 [L, 2·INTER, HIDDEN/4] in kernel order
    scale_ptr,  # uint32 [L, 2·INTER, HIDDEN/128]: exponent fields
    bias_ptr,  # f32 [L, 2·INTER], read if HAS_BIAS
    h_ptr,  # out: bf16 [routes, INTER]; row = position in the sorted routes
    route_ptr,  # int32 [routes]: token·TOP_K + slot, sorted by local expert
    block_expert_ptr,  # int32 [blocks]: local expert of the block, −1 past the last
    block_start_ptr,  # int32 [blocks]: first position of the block
    block_end_ptr,  # int32 [blocks]: one past its last position
    limit,
    blocks,  # the most that there can be
    TOP_K: gl.constexpr,
    HIDDEN: gl.constexpr,  # a multiple of 128, and at least STAGES of them
    INTER: gl.constexpr,  # a multiple of BLOCK_N
    HAS_BIAS: gl.constexpr,
    HAS_LIMIT: gl.constexpr,
    PDL: gl.constexpr,
    BLOCK_M: gl.constexpr,  # routes of one expert, at most
    BLOCK_N: gl.constexpr,  # intermediate features of a tile: 64 or 128
    STAGES: gl.constexpr,  # groups in shared memory
):
    # Layout: a tile is [BLOCK_N, up to BLOCK_M] of hᵀ, from rows n of w1 and of w3, half of it each warpgroup's; tiles
    # of one block of routes are made at a time, so that its x rows stay in cache.
    # The trick: a block that is not full takes products of one, two or three quarters of the columns.
    pipe = _pipe(BLOCK_M, BLOCK_N, STAGES)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    plan = (route_ptr, block_expert_ptr, block_start_ptr, block_end_ptr)
    gl.warp_specialize(
        [
            (_gate_up, (
                x_ptr, w13_ptr, scale_ptr, bias_ptr, h_ptr, plan, limit, blocks, pipe,
                gl.constexpr(0), TOP_K, HIDDEN, INTER, HAS_BIAS, HAS_LIMIT, BLOCK_M, BLOCK_N, STAGES,
            )),
            (_gate_up, (
                x_ptr, w13_ptr, scale_ptr, bias_ptr, h_ptr, plan, limit, blocks, pipe,
                gl.constexpr(1), TOP_K, HIDDEN, INTER, HAS_BIAS, HAS_LIMIT, BLOCK_M, BLOCK_N, STAGES,
            )),
        ],
        [4],
        [256],
    )  # fmt: skip


@gluon.jit(do_not_specialize=["blocks"])
def down_warpgroup(
    h_ptr,  # bf16 [routes, INTER]; row = position in the sorted routes
    w2_ptr,  # uint16 [L, HIDDEN, INTER/4] in kernel order
    scale_ptr,  # uint32 [L, HIDDEN, INTER/128]: exponent fields
    bias_ptr,  # f32 [L, HIDDEN], read if HAS_BIAS
    weight_ptr,  # f32 [M·TOP_K]: routing weights
    y_ptr,  # out: bf16 or f32 [M·TOP_K, HIDDEN], row = route; rows of remote routes are not written
    route_ptr,  # int32 [routes]
    block_expert_ptr,  # int32 [blocks]
    block_start_ptr,  # int32 [blocks]
    block_end_ptr,  # int32 [blocks]
    blocks,
    HIDDEN: gl.constexpr,  # a multiple of 2·BLOCK_N
    INTER: gl.constexpr,  # a multiple of 128, and at least STAGES of them
    HAS_BIAS: gl.constexpr,
    PDL: gl.constexpr,
    BLOCK_M: gl.constexpr,  # routes of one expert, at most
    BLOCK_N: gl.constexpr,  # hidden features of each warpgroup's half of a tile: 64 or 128
    STAGES: gl.constexpr,  # groups in shared memory
):
    # Layout: a tile is [2·BLOCK_N, up to BLOCK_M] of yᵀ, half of it each warpgroup's, and is scattered to the rows of
    # its routes: every route has a row of its own, so no atomics are needed.
    pipe = _pipe(BLOCK_M, BLOCK_N, STAGES)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    plan = (route_ptr, block_expert_ptr, block_start_ptr, block_end_ptr)
    gl.warp_specialize(
        [
            (_down, (
                h_ptr, w2_ptr, scale_ptr, bias_ptr, weight_ptr, y_ptr, plan, blocks, pipe,
                gl.constexpr(0), HIDDEN, INTER, HAS_BIAS, BLOCK_M, BLOCK_N, STAGES,
            )),
            (_down, (
                h_ptr, w2_ptr, scale_ptr, bias_ptr, weight_ptr, y_ptr, plan, blocks, pipe,
                gl.constexpr(1), HIDDEN, INTER, HAS_BIAS, BLOCK_M, BLOCK_N, STAGES,
            )),
        ],
        [4],
        [256],
    )  # fmt: skip
