"""A pipe of groups through shared memory, which two warpgroups of a Hopper program fill and multiply from.

They share a stage's activations, and take turns at the matrix units. Each copies its rows' words and scales, and half
of the activations; the activations stay in shared memory as the right operand, the weights are decoded in registers as
the left one.
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

from moe_ep.kernels.fragments import decode_scaled

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
def widths(BLOCK_M):
    """Columns that a tile may have, for blocks that are not full: quarters, and of 128 also eighths from the half on,
    below which memory is the bound."""
    return [32, 64, 80, 96, 112, 128] if BLOCK_M == 128 else [BLOCK_M * i // 4 for i in range(1, 5)]


@constexpr_function
def width_count(BLOCK_M):
    return len(widths(BLOCK_M))


@constexpr_function
def width(BLOCK_M, i):
    """The i-th of them, 0 for −1."""
    return ([0] + widths(BLOCK_M))[i + 1]


@constexpr_function
def accumulator_layout(COLUMNS):
    """[64, COLUMNS] of one warpgroup."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])


@constexpr_function
def steps_ahead(STAGES):
    """How many groups are copied ahead, two or more. With stages to spare, one is left for who is behind."""
    return STAGES - 1 if STAGES < 5 else STAGES - 2


@gluon.jit
def open_pipe(BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """For each stage: activations [BLOCK_M, 128], words [2·BLOCK_N, 32], scales [2·BLOCK_N], two barriers.

    `ready` is for those who read a stage, `free` for those who fill it. Each warpgroup has a barrier for its turn.
    """
    x = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, 128], gl.NVMMASharedLayout(128, 16, 2))
    # 64 bytes a row: two rows a phase, four phases of 16 bytes, so that eight rows' parts lie in different banks.
    w_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [1, 0])
    words = gl.allocate_shared_memory(gl.uint16, [STAGES, 2 * BLOCK_N, 32], w_layout)
    fields = gl.allocate_shared_memory(gl.uint32, [STAGES, 2 * BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for half in gl.static_range(2):
        mbarrier.init(turn.index(half), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=2)
        mbarrier.init(free.index(stage), count=2)
    return x, words, fields, ready, free, turn


@gluon.jit
def _fill(pipe, sources, group, index, HALF: gl.constexpr, STAGES: gl.constexpr):
    """Begin to copy this warpgroup's part of a group, the index-th since the kernel began, once its stage is free."""
    stage = index % STAGES
    x, words, fields, _ready, free, _turn = pipe
    x_rows, inside, word_rows, field_rows = sources
    mbarrier.wait(free.index(stage), index // STAGES % 2 ^ 1)
    _copy(x.index(stage).slice(HALF * x_rows.shape[0], x_rows.shape[0]), x_rows + group * 128, mask=inside)
    _copy(words.index(stage).slice(HALF * word_rows.shape[0], word_rows.shape[0]), word_rows + group * 512)
    _copy(fields.index(stage).slice(HALF * word_rows.shape[0], word_rows.shape[0]), field_rows + group * 16)
    async_copy.commit_group()


@gluon.jit
def _hand_over(pipe, index, exists, PENDING: gl.constexpr, STAGES: gl.constexpr):
    """Wait for this warpgroup's part of the index-th group, since when PENDING were begun, and say that it is there."""
    async_copy.wait_group(PENDING)
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
def _multiply(accs, w, x, WIDTH: gl.constexpr, TILE: gl.constexpr, block: gl.constexpr):
    """Begin one block's products of the TILE-th 64 rows."""
    count: gl.constexpr = piece_count(WIDTH)
    found = ()
    for i in gl.static_range(count):
        acc = _product(accs[TILE * count + i], w, x, first_column(WIDTH, i), columns(WIDTH, i), block)
        found = found + (acc,)  # type: ignore[assignment]
    return accs[: TILE * count] + found + accs[TILE * count + count :]


@gluon.jit
def _wait(accs):
    """Wait until no product is under way."""
    done = warpgroup_mma_wait(0, deps=accs)
    return (done,) if len(accs) == 1 else done


@gluon.jit
def _own(buffers, stage, TILE: gl.constexpr, layout: gl.constexpr):
    """The TILE-th 64 rows of a stage."""
    return buffers.index(stage).slice(64 * TILE, 64).load(layout)


@gluon.jit
def products(
    pipe, sources, first, HALF: gl.constexpr, TILES: gl.constexpr, GROUPS: gl.constexpr, WIDTH: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """This warpgroup's TILES times [64, WIDTH], in pieces; `first` is the index of the tile's first group."""
    ahead: gl.constexpr = steps_ahead(STAGES)
    count: gl.constexpr = piece_count(WIDTH)
    left: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(columns(WIDTH, 0)), 2)
    x, words, fields, ready, free, turn = pipe
    accs = ()
    for i in gl.static_range(TILES * count):
        accs = accs + (_zeros(columns(WIDTH, i % count)),)  # type: ignore[assignment]
    for group in range(GROUPS):
        index = first + group
        stage = index % STAGES
        mbarrier.wait(ready.index(stage), index // STAGES % 2)
        w = ()
        for tile in gl.static_range(TILES):
            raw = _own(words, stage, HALF * TILES + tile, left)
            scales = _own(fields, stage, HALF * TILES + tile, gl.SliceLayout(1, left))[:, None]
            for block in gl.static_range(4):
                w = w + (decode_scaled(raw, scales, block),)  # type: ignore[assignment]
        # The trick: the warpgroups take turns at the matrix units. While one multiplies a whole group, the other
        # decodes its own and copies later ones.
        mbarrier.wait(turn.index(HALF), index % 2 if HALF else index % 2 ^ 1)
        for i in gl.static_range(4 * TILES):
            if i == 4 * TILES - 1:  # what is under way by then outlasts the handing over
                mbarrier.arrive(turn.index(1 - HALF), count=1)
            accs = _multiply(accs, w[i], x.index(stage), WIDTH, i // 4, i % 4)
        if group + ahead < GROUPS:
            _fill(pipe, sources, group + ahead, index + ahead, HALF, STAGES)
        else:
            async_copy.commit_group()  # of nothing, so that the count holds
        _hand_over(pipe, index + 2, group + 2 < GROUPS, ahead - 2, STAGES)
        accs = _wait(accs)
        mbarrier.arrive(free.index(stage), count=1)
    return accs


@gluon.jit
def begin(pipe, sources, first, HALF: gl.constexpr, STAGES: gl.constexpr):
    """Begin to copy a tile's first groups."""
    for group in gl.static_range(steps_ahead(STAGES)):
        _fill(pipe, sources, group, first + group, HALF, STAGES)


@gluon.jit
def hand_over_first(pipe, first, STAGES: gl.constexpr):
    """Say of a tile's first two groups that this warpgroup's part is there."""
    ahead: gl.constexpr = steps_ahead(STAGES)
    for group in gl.static_range(2):
        _hand_over(pipe, first + group, True, ahead - 1 - group, STAGES)


@gluon.jit
def _row(r, GROUPS: gl.constexpr, FAR: gl.constexpr):
    """Where row r of a tile lies, in groups: with FAR, eight rows in turn of two matrices that are FAR groups apart.

    Then a lane's two rows of each product are one of gate and the same of up.
    """
    n = r // 16 * 8 + r % 8 if FAR else r
    return (n // 16) * (GROUPS * 16) + n % 16 + (r % 16 // 8 * FAR if FAR else 0)


@gluon.jit
def weight_sources(
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
def row_sources(x_ptr, row, WIDTH: gl.constexpr, copies: gl.constexpr):
    """Pointers [M, 128] to the first group of the activations' rows [M]."""
    return x_ptr + row.to(gl.int64)[:, None] * WIDTH + gl.arange(0, 128, layout=gl.SliceLayout(0, copies))[None, :]
