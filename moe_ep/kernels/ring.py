"""A ring of tiles in shared memory, by which the warp that takes tickets tells the others which tile is next."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

SLOTS = gl.constexpr(4)
FIELDS = gl.constexpr(5)
"""Of a tile: its number, its block of routes, their expert, the first of their positions, and one past the last."""


@gluon.jit
def open_ring(READERS: gl.constexpr):
    """Slots, and for each a barrier for those who read it, and one for the writer, at which all READERS arrive."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    fields = gl.allocate_shared_memory(gl.int32, [SLOTS * FIELDS, 1], layout)
    told = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    read = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(told.index(slot), count=1)
        mbarrier.init(read.index(slot), count=READERS)
    return fields, told, read


@gluon.jit
def tell(ring, tile, turn):
    """Write the turn-th tile."""
    fields, told, read = ring
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    slot = turn % SLOTS
    mbarrier.wait(read.index(slot), turn // SLOTS % 2 ^ 1)
    for i in gl.static_range(FIELDS):
        fields.index(slot * FIELDS + i).store(gl.zeros([1], gl.int32, layout=layout) + tile[i])
    mbarrier.arrive(told.index(slot), count=1)


@gluon.jit
def hear_for_others(ring, turn, COUNT: gl.constexpr):
    """Arrive for readers that are gone."""
    mbarrier.arrive(ring[2].index(turn % SLOTS), count=COUNT)


@gluon.jit
def hear(ring, turn):
    """The turn-th tile."""
    fields, told, read = ring
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    slot = turn % SLOTS
    mbarrier.wait(told.index(slot), turn // SLOTS % 2)
    tile = ()
    for i in gl.static_range(FIELDS):
        tile = tile + (gl.max(fields.index(slot * FIELDS + i).load(layout), 0),)  # type: ignore[assignment]
    mbarrier.arrive(read.index(slot), count=1)
    return tile
