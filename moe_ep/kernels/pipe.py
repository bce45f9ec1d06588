"""A pipe of groups through shared memory, which loaders fill and two warpgroups of a Hopper program multiply from.

A group is 128 k: activations, which all share, and each warpgroup's words and scales. Words and scales come by the copy
engine, a box of each for a warpgroup. Activations stay in shared memory as the right operand, weights are decoded in
registers as the left one.
"""

from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moe_ep.kernels.fragments import decode_scaled

# Triton 3.9 has other names for them.
_copy = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
_copy_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_NEW_VIEWS = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))

WARPGROUPS = gl.constexpr(2)
# Activations lie as two panels of 64 k, which come in boxes of a quarter of the rows, as many as there are routes.
PANELS = gl.constexpr(2)
BOXES = gl.constexpr(4)
PANEL = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
# Warps that gather activations, each by itself, so that none waits for another. Eight rows in turn are one's: what the
# swizzle takes together.
GATHERERS = gl.constexpr(2)
ROWS_AT_ONCE = gl.constexpr(8)
# A warp copies four rows' parts of a panel at once.
COPIES = gl.constexpr(gl.BlockedLayout([1, 1, 8], [1, 4, 8], [1, 1, 1], [2, 1, 0]))
_BOTH_PANELS = gl.constexpr(gl.NVMMASharedLayout(128, 16, 3))


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
    """Columns that a tile may have, for blocks that are not full. A piece of 16 takes as long as one of 32."""
    return [32, 64, 80, 96, 128] if BLOCK_M == 128 else [BLOCK_M // 4, BLOCK_M // 2, BLOCK_M]


@constexpr_function
def width_count(BLOCK_M):
    return len(widths(BLOCK_M))


@constexpr_function
def width(BLOCK_M, i):
    """The i-th of them, 0 for −1."""
    return ([0] + widths(BLOCK_M))[i + 1]


@constexpr_function
def reads_ahead(WIDTH):
    """Whether a tile's weights are read to registers while the one before is decoded: not where sums take most."""
    return WIDTH < 128


@constexpr_function
def pending(STAGES):
    """Groups that are copied by threads and not handed over yet."""
    return 2 if STAGES > 4 else 1


@constexpr_function
def weight_bytes(BLOCK_N):
    """Of a group: 64 of words and 4 of scales for each of a tile's rows."""
    return 2 * BLOCK_N * (64 + 4)


@constexpr_function
def row_bytes(ROWS):
    """Of a group's activations, 128 in bf16 a row."""
    return ROWS * 128 * 2


@constexpr_function
def accumulator_layout(COLUMNS):
    """[64, COLUMNS] of one warpgroup."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])


@constexpr_function
def rows_layout(ROWS, TURNS, ELEMENTS):
    """How a warpgroup's rows of words (32 elements each) or scales (1) lie, as the copy engine has left them.

    With TURNS there are two matrices' rows, half of each, of which eight in turn make a tile: then a lane's two rows of
    each product are one of gate and the same of up. Rows of 64 bytes are swizzled: two rows a phase, four phases of 16
    bytes, so that eight rows' parts lie in different banks.
    """
    bases = [[0, 1 << i] for i in range(5)] if ELEMENTS == 32 else []
    phase = {2: 8, 4: 16} if ELEMENTS == 32 else {}
    row = 1
    while row < (ROWS // 2 if TURNS else ROWS):
        place = 2 * row if TURNS and row >= 8 else row
        bases.append([place, phase.get(row, 0)] if ELEMENTS == 32 else [place])
        row *= 2
    if TURNS:
        bases.append([8, 0] if ELEMENTS == 32 else [8])
    return gl.SharedLinearLayout(bases, [], 1024 if ELEMENTS == 32 else 128)


@gluon.jit
def _view(buffer, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    """The same memory with another shape and layout."""
    return buffer.reinterpret(dtype, shape, layout) if _NEW_VIEWS else buffer._reinterpret(dtype, shape, layout)


@gluon.jit
def _box_of(buffer, desc):
    """The same memory as a box of that descriptor: one for w13 and one for w2 hold as much."""
    shape: gl.constexpr = desc.block_type.shape
    layout: gl.constexpr = desc.layout
    return _view(buffer, desc.dtype, shape, layout)


@gluon.jit
def open_pipe(words_desc, scales_desc, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, FILLERS: gl.constexpr):
    """For each stage: activations, words and scales in the copy engine's boxes, and two barriers.

    `ready` is for those who read a stage, and waits for FILLERS: who feeds the copy engine, and all who gather; `free`
    is for those who fill it.
    """
    x = gl.allocate_shared_memory(gl.bfloat16, [STAGES * PANELS, BLOCK_M, 64], PANEL)
    boxes: gl.constexpr = STAGES * WARPGROUPS
    words = gl.allocate_shared_memory(gl.uint16, [boxes] + words_desc.block_type.shape, words_desc.layout)
    scales = gl.allocate_shared_memory(gl.uint32, [boxes] + scales_desc.block_type.shape, scales_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=FILLERS)
        mbarrier.init(free.index(stage), count=WARPGROUPS)
    return x, words, scales, ready, free


@gluon.jit
def wait_free(pipe, index, STAGES: gl.constexpr):
    """Wait until the stage of the index-th group since the kernel began may be filled."""
    mbarrier.wait(pipe[4].index(index % STAGES), index // STAGES % 2 ^ 1)


@gluon.jit
def expect(pipe, index, BYTES: gl.constexpr, pred, STAGES: gl.constexpr):
    mbarrier.expect(pipe[3].index(index % STAGES), BYTES, pred=pred)


@gluon.jit
def vouch(pipe, index, STAGES: gl.constexpr):
    """Arrive for those who gather: nothing of the index-th group, which is of down."""
    mbarrier.arrive(pipe[3].index(index % STAGES), count=GATHERERS)


@gluon.jit
def fill_weights(
    pipe, words_desc, scales_desc, place, group, index, WARPGROUP: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Begin to copy a warpgroup's words and scales, from a box's place (16-row tile) or (matrix, 16-row tile) on."""
    stage = index % STAGES
    ready = pipe[3].index(stage)
    words = pipe[1].index(stage * WARPGROUPS + WARPGROUP)
    scales = pipe[2].index(stage * WARPGROUPS + WARPGROUP)
    _copy_box(words_desc, place + (group, 0, 0), ready, _box_of(words, words_desc))
    _copy_box(scales_desc, place + (group, 0), ready, _box_of(scales, scales_desc))


@gluon.jit
def fill_boxes(pipe, rows_desc, row, boxes, group, index, BLOCK_M: gl.constexpr, STAGES: gl.constexpr):
    """Begin to copy activations from `row` on by the copy engine, `boxes` of each panel."""
    stage = index % STAGES
    box_rows: gl.constexpr = BLOCK_M // BOXES
    x = _view(pipe[0], gl.bfloat16, [STAGES * PANELS * BOXES, box_rows, 64], PANEL)
    for panel in gl.static_range(PANELS):
        for box in gl.static_range(BOXES):
            _copy_box(
                rows_desc, [row + box * box_rows, group * 128 + panel * 64], pipe[3].index(stage),
                x.index((stage * PANELS + panel) * BOXES + box), pred=box < boxes,
            )  # fmt: skip


@gluon.jit
def fill_rows(
    pipe, x_ptr, offsets, routes, group, index,
    GATHERER: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Begin to copy this warp's activations of `routes` rows, and hand over those of an earlier group.

    `offsets` are those in x of each piece that it may copy, int32 [ROWS_AT_ONCE, 64], of the first 64 k. What is past
    the last row's piece is left as it is: a column of the products of its own, which nobody stores.
    """
    behind: gl.constexpr = pending(STAGES)
    rows: gl.constexpr = ROWS_AT_ONCE
    stage = index % STAGES
    x = _view(pipe[0], gl.bfloat16, [STAGES, PANELS, BLOCK_M, 64], _BOTH_PANELS).index(stage)
    panels = 64 * gl.arange(0, PANELS, layout=gl.SliceLayout(1, gl.SliceLayout(2, COPIES)))
    for first in gl.static_range(GATHERER * rows, BLOCK_M, GATHERERS * rows):
        if first < routes:
            of_panel = x_ptr + group * 128 + offsets[first // (GATHERERS * rows)]
            _copy(x.slice(first, rows, 1), of_panel[None, :, :] + panels[:, None, None])
    async_copy.commit_group()
    async_copy.wait_group(behind)
    _hand_over(pipe, index - behind, STAGES)


@gluon.jit
def hand_over_last(pipe, index, STAGES: gl.constexpr):
    """After the last of `index` groups: hand over what is not."""
    behind: gl.constexpr = pending(STAGES)
    for left in gl.static_range(behind):
        async_copy.wait_group(behind - 1 - left)
        _hand_over(pipe, index - behind + left, STAGES)


@gluon.jit
def _hand_over(pipe, index, STAGES: gl.constexpr):
    """Say that the threads' part of a group is there, if there is such a group."""
    fence_async_shared()
    mbarrier.arrive(pipe[3].index((index + STAGES) % STAGES), count=1, pred=index >= 0)


@gluon.jit
def _zeros(COLUMNS: gl.constexpr):
    return gl.zeros([64, COLUMNS], gl.float32, layout=accumulator_layout(COLUMNS))


@gluon.jit
def _product(acc, w, panel, FIRST: gl.constexpr, COLUMNS: gl.constexpr, block: gl.constexpr):
    left: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(COLUMNS), 2)
    right = panel.slice(FIRST, COLUMNS, 0).slice(32 * (block % 2), 32, 1).permute((1, 0))
    return warpgroup_mma(gl.convert_layout(w, left), right, acc, is_async=True)


@gluon.jit
def _multiply(accs, w, panel, WIDTH: gl.constexpr, TILE: gl.constexpr, block: gl.constexpr):
    """Begin one block's products of the TILE-th 64 rows."""
    count: gl.constexpr = piece_count(WIDTH)
    found = ()
    for i in gl.static_range(count):
        acc = _product(accs[TILE * count + i], w, panel, first_column(WIDTH, i), columns(WIDTH, i), block)
        found = found + (acc,)  # type: ignore[assignment]
    return accs[: TILE * count] + found + accs[TILE * count + count :]


@gluon.jit
def _wait(accs):
    """Wait until no product is under way."""
    done = warpgroup_mma_wait(0, deps=accs)
    return (done,) if len(accs) == 1 else done


@gluon.jit
def _load_weights(
    pipe, stage, WARPGROUP: gl.constexpr, TILE: gl.constexpr, TILES: gl.constexpr, TURNS: gl.constexpr,
    left: gl.constexpr,
):  # fmt: skip
    """Words and scale fields of the TILE-th 64 of a warpgroup's rows, to the lanes that multiply them."""
    own = stage * WARPGROUPS + WARPGROUP
    rows: gl.constexpr = 64 * TILES
    words = _view(pipe[1].index(own), gl.uint16, [rows, 32], rows_layout(rows, TURNS, 32)).slice(64 * TILE, 64)
    scales = _view(pipe[2].index(own), gl.uint32, [rows], rows_layout(rows, TURNS, 1)).slice(64 * TILE, 64)
    return words.load(left), scales.load(gl.SliceLayout(1, left))[:, None]


@gluon.jit
def products(
    pipe, first, WARPGROUP: gl.constexpr, TILES: gl.constexpr, TURNS: gl.constexpr, GROUPS: gl.constexpr,
    WIDTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """This warpgroup's TILES times [64, WIDTH], in pieces; `first` is the index of the tile's first group."""
    count: gl.constexpr = piece_count(WIDTH)
    left: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(columns(WIDTH, 0)), 2)
    x, _words, _scales, ready, free = pipe
    accs = ()
    for i in gl.static_range(TILES * count):
        accs = accs + (_zeros(columns(WIDTH, i % count)),)  # type: ignore[assignment]
    ahead: gl.constexpr = reads_ahead(WIDTH)
    stage, phase = first % STAGES, first // STAGES % 2
    mbarrier.wait(ready.index(stage), phase)
    words, fields = _load_weights(pipe, stage, WARPGROUP, 0, TILES, TURNS, left)
    for group in range(GROUPS):
        next_stage = 0 if stage == STAGES - 1 else stage + 1
        next_phase = phase ^ 1 if stage == STAGES - 1 else phase
        more = group < GROUPS - 1  # after the last group whatever is there is read, for nothing
        for tile in gl.static_range(TILES):
            if ahead and tile < TILES - 1:
                next_words, next_fields = _load_weights(pipe, stage, WARPGROUP, tile + 1, TILES, TURNS, left)
            elif ahead:
                mbarrier.wait(ready.index(next_stage), next_phase, pred=more)
                next_words, next_fields = _load_weights(pipe, next_stage, WARPGROUP, 0, TILES, TURNS, left)
            # The trick: one tile's weights are decoded while the one before is multiplied, and the other warpgroup's.
            w = ()
            for block in gl.static_range(4):
                w = w + (decode_scaled(words, fields, block),)  # type: ignore[assignment]
            for block in gl.static_range(4):
                accs = _multiply(accs, w[block], x.index(stage * PANELS + block // 2), WIDTH, tile, block)
            if ahead:
                words, fields = next_words, next_fields
            elif tile < TILES - 1:
                words, fields = _load_weights(pipe, stage, WARPGROUP, tile + 1, TILES, TURNS, left)
        accs = _wait(accs)
        if not ahead:
            mbarrier.wait(ready.index(next_stage), next_phase, pred=more)
            words, fields = _load_weights(pipe, next_stage, WARPGROUP, 0, TILES, TURNS, left)
        mbarrier.arrive(free.index(stage), count=1)
        stage, phase = next_stage, next_phase
    return accs
