"""Counters in memory by which programs share out tiles and wait for each other's."""

from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Triton 3.9 has another name for it.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@constexpr_function
def lane_count(CDNA):
    return 64 if CDNA else 32


@constexpr_function
def _later_ptx(SEM):
    lines = "setp.eq.s32 first, $1, 0;", "mov.b32 $0, 0;", f"@first atom.{SEM}.gpu.global.add.u32 $0, [$2], 1;"
    return "\n".join(["{", ".reg .pred first;", *lines, "}"])


@gluon.jit
def count_later(counter_ptr, SEM: gl.constexpr, CDNA: gl.constexpr):
    """Add 1 to a counter, once; what `value` makes of it is what the counter was before.

    The trick: an atomic of Triton's waits for its value at once. Here one lane's register is to have it, and to ptxas
    each lane has an address of its own: what it knows to be one it adds up over a warp, and waits for. To acquire
    empties the first-level cache, so where activations are to stay there, SEM is "relaxed".
    """
    threads: gl.constexpr = gl.num_warps() * lane_count(CDNA)
    layout: gl.constexpr = gl.BlockedLayout([1], [lane_count(CDNA)], [gl.num_warps()], [0])
    lane = gl.arange(0, threads, layout=layout)
    if CDNA:
        return gl.atomic_add(counter_ptr, 1, sem=SEM, scope="gpu") + 0 * lane
    address = counter_ptr.to(gl.int64) + 4 * lane.to(gl.int64)
    return gl.inline_asm_elementwise(_later_ptx(SEM), "=r,r,l", [lane, address], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def value(later):
    return gl.max(later, 0)


@gluon.jit
def await_count(counter_ptr, count):
    """Wait until a counter has come that far, and see what was stored before."""
    while gl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < count:
        pass
