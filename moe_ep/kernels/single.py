"""A whole op of up to BLOCK_M tokens in one launch, where the launches themselves would take a tenth of the time.

Programs stay and take tiles by a ticket each: first those of gate and up of every expert that is hit, then those of
down. Whoever makes the last tile of some features adds up the tokens' routes there. Each program finds the experts that
are hit for itself, while they are few; tokens are an expert's columns, which the matrix units have anyway, so that
nothing is sorted. Weights of the next tile are on their way before a tile is done.

A program that waits, waits for tickets before its own, which programs that run have taken: whatever else the device
does, it goes on.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_ep.kernels.fragments import local_rows, swiglu
from moe_ep.kernels.stream import (
    accumulator_layout,
    first_weights,
    load_blocks,
    row_pointers,
    turn,
    weight_pointers,
)
from moe_ep.kernels.tickets import await_count, barrier, count_later, lane_count, value

# Places in the memory that is zero before and after each op: the next ticket, the programs that are done, then for each
# expert that is hit its tiles of gate and up that are made, then for each tile of features the experts that are done.
_TICKET = gl.constexpr(0)
_DONE = gl.constexpr(1)
_MADE = gl.constexpr(2)


@gluon.jit
def _hit_experts(
    ids_ptr, map_ptr, routes, known,
    LOCAL: gl.constexpr, HAS_MAP: gl.constexpr, CDNA: gl.constexpr, BLOCK_R: gl.constexpr,
):  # fmt: skip
    """Of each route its expert's local row, the first route of that expert, and how many experts' come before it.

    int32 [BLOCK_R] each; the first is −1 for remote routes, the last counts only for first routes and is −1 elsewhere.
    """
    warps: gl.constexpr = gl.num_warps()
    lanes: gl.constexpr = lane_count(CDNA)
    pairs: gl.constexpr = gl.BlockedLayout([1, 8], [4, lanes // 4], [warps, 1], [1, 0])
    line: gl.constexpr = gl.BlockedLayout([1], [lanes], [warps], [0])
    i = gl.arange(0, BLOCK_R, layout=gl.SliceLayout(1, pairs))
    j = gl.arange(0, BLOCK_R, layout=gl.SliceLayout(0, pairs))
    # A route each lane: an op begins with these two loads, and more of them would be waited for one by one.
    route = gl.arange(0, BLOCK_R, layout=line)
    row = local_rows(ids_ptr, map_ptr, route, route < routes, known, LOCAL, HAS_MAP)
    own = gl.convert_layout(row, gl.SliceLayout(1, pairs))
    other = gl.convert_layout(row, gl.SliceLayout(0, pairs))
    first = gl.min(gl.where(own[:, None] == other[None, :], j[None, :], BLOCK_R), 1)
    leads = (first == i) & (own >= 0)
    others_lead = gl.convert_layout(leads, gl.SliceLayout(0, pairs))
    before = gl.sum((others_lead[None, :] & (j[None, :] < i[:, None])).to(gl.int32), 1)
    # Every warp has them all: what is looked up there needs no other.
    flat: gl.constexpr = gl.BlockedLayout([(BLOCK_R + lanes - 1) // lanes], [lanes], [warps], [0])
    return (
        gl.convert_layout(own, flat),
        gl.convert_layout(first, flat),
        gl.convert_layout(gl.where(leads, before, -1), flat),
    )


@gluon.jit
def _tile_of(
    ticket, hit, experts, TOP_K: gl.constexpr, UP_TILES: gl.constexpr, DOWN_TILES: gl.constexpr
):  # fmt: skip
    """A ticket's tile: (whether of gate and up, the expert's place, its number, the expert's row, first route, tokens).

    A token's bit says that it takes the expert.
    """
    rows, firsts, places = experts
    up = ticket < hit * UP_TILES
    at = ticket if up else ticket - hit * UP_TILES
    tiles = UP_TILES if up else DOWN_TILES
    place = at // tiles
    expert = gl.max(gl.where(places == place, rows, 0), 0)
    first = gl.max(gl.where(places == place, firsts, 0), 0)
    bits = 1 << (gl.arange(0, firsts.shape[0], layout=firsts.type.layout) // TOP_K)
    return up, place, at % tiles, expert, first, gl.reduce_or(gl.where(firsts == first, bits, 0), 0)


@gluon.jit
def _row_of(tile, HIDDEN: gl.constexpr, INTER: gl.constexpr, BLOCK_N: gl.constexpr):
    """The first row of weights of a tile, over all experts."""
    up, _place, number, expert, _first, _takers = tile
    rows = 2 * INTER if up else HIDDEN
    return expert.to(gl.int64) * rows + (number * BLOCK_N if up else number * (2 * BLOCK_N))


@gluon.jit
def _weights_of(
    tile, w13_ptr, s13_ptr, w2_ptr, s2_ptr,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, BLOCK_N: gl.constexpr, SLICES: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """Pointers to words and scales of a tile, and how many groups on those of its other half lie."""
    up = tile[0]
    groups = HIDDEN // 128 if up else INTER // 128
    far = INTER * (HIDDEN // 128) if up else BLOCK_N * (INTER // 128)
    w_ptr = w13_ptr if up else w2_ptr
    s_ptr = s13_ptr if up else s2_ptr
    row = _row_of(tile, HIDDEN, INTER, BLOCK_N)
    words, fields = weight_pointers(w_ptr, s_ptr, row, groups, groups // SLICES, SLICES, BLOCK_N, mma, False)
    return words, fields, far


@gluon.jit
def _add_bias(sums, bias_ptr, row, FAR: gl.constexpr, BLOCK_N: gl.constexpr):
    """The sums of rows from `row` on, and of those FAR rows on, plus their biases."""
    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, sums[0].type.layout))
    first = sums[0] + gl.load(bias_ptr + row + n)[:, None]
    return first, sums[1] + gl.load(bias_ptr + row + n + FAR)[:, None]


@gluon.jit
def _outputs(
    out_ptr, tile, n_first, tokens, WIDTH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """Pointers [BLOCK_N, BLOCK_M] to features of a tile's tokens, and which of these take the expert."""
    _up, _place, _number, _expert, first, takers = tile
    n = n_first + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, layout))
    m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, layout))
    return out_ptr + (first * tokens + m)[None, :] * WIDTH + n[:, None], (takers >> m & 1 != 0)[None, :]


@gluon.jit
def _store_h(
    sums, h_ptr, bias_ptr, tile, tokens, limit,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_LIMIT: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """[BLOCK_N, tokens] of an expert's hᵀ, of gate and up."""
    if HAS_BIAS:
        sums = _add_bias(sums, bias_ptr, _row_of(tile, HIDDEN, INTER, BLOCK_N), INTER, BLOCK_N)
    layout: gl.constexpr = sums[0].type.layout
    h_rows, mask = _outputs(h_ptr, tile, tile[2] * BLOCK_N, tokens, INTER, BLOCK_M, BLOCK_N, layout)
    gl.store(h_rows, swiglu(sums[0], sums[1], limit, HAS_LIMIT), mask=mask)


@gluon.jit
def _store_y(
    sums, y_ptr, bias_ptr, tile, tokens,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, HAS_BIAS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """[2·BLOCK_N, tokens] of an expert's yᵀ, in two halves."""
    if HAS_BIAS:
        sums = _add_bias(sums, bias_ptr, _row_of(tile, HIDDEN, INTER, BLOCK_N), BLOCK_N, BLOCK_N)
    layout: gl.constexpr = sums[0].type.layout
    y_rows, mask = _outputs(y_ptr, tile, tile[2] * (2 * BLOCK_N), tokens, HIDDEN, BLOCK_M, BLOCK_N, layout)
    gl.store(y_rows, sums[0], mask=mask)
    gl.store(y_rows + BLOCK_N, sums[1], mask=mask)


@gluon.jit
def _combine_tile(
    y_ptr, weight_ptr, out_ptr, experts, number, tokens,
    TOP_K: gl.constexpr, HIDDEN: gl.constexpr, CDNA: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_H: gl.constexpr,
):  # fmt: skip
    """BLOCK_H features of all tokens: their routes in the order of their slots, remote ones left out."""
    rows, firsts, _places = experts
    layout: gl.constexpr = gl.BlockedLayout([1, 2], [lane_count(CDNA) // 16, 16], [gl.num_warps(), 1], [1, 0])
    m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
    n = number * BLOCK_H + gl.arange(0, BLOCK_H, layout=gl.SliceLayout(0, layout))
    acc = gl.zeros([BLOCK_M, BLOCK_H], gl.float32, layout=layout)
    for slot in gl.static_range(TOP_K):
        route = gl.minimum(m, tokens - 1) * TOP_K + slot
        local = (gl.gather(rows, route, 0) >= 0)[:, None]
        at = (gl.gather(firsts, route, 0) * tokens + m)[:, None] * HIDDEN + n[None, :]
        y = gl.load(y_ptr + at, mask=local & (m < tokens)[:, None], other=0.0)
        acc += y * gl.where(local, gl.load(weight_ptr + route)[:, None], 0.0)
    to = out_ptr + m.to(gl.int64)[:, None] * HIDDEN + n[None, :]
    gl.store(to, acc.to(out_ptr.dtype.element_ty), mask=(m < tokens)[:, None])


@gluon.jit(do_not_specialize=["tokens", "known"])
def experts_single(
    x_ptr,  # bf16 [M, HIDDEN]
    w13_ptr,  # uint16 [L, 2·INTER, HIDDEN/4] in kernel order
    s13_ptr,  # uint32 [L, 2·INTER, HIDDEN/128]: exponent fields
    b13_ptr,  # f32 [L, 2·INTER], read if HAS_B13
    w2_ptr,  # uint16 [L, HIDDEN, INTER/4] in kernel order
    s2_ptr,  # uint32 [L, HIDDEN, INTER/128]: exponent fields
    b2_ptr,  # f32 [L, HIDDEN], read if HAS_B2
    weight_ptr,  # f32 [M·TOP_K]: routing weights
    h_ptr,  # bf16 [M·TOP_K, M, INTER], by an expert's first route and by token
    y_ptr,  # f32 [M·TOP_K, M, HIDDEN], the same
    out_ptr,  # out: [M, HIDDEN]
    state_ptr,  # int32 [2 + BLOCK_R + HIDDEN / (2·BLOCK_N)]: zero before and after
    ids_ptr,  # int [M·TOP_K]: experts
    map_ptr,  # int [known]: local row of each expert, read if HAS_MAP
    tokens,  # M, up to BLOCK_M
    known,
    limit,
    TOP_K: gl.constexpr,
    HIDDEN: gl.constexpr,  # a multiple of 128·SLICES·STAGES and of 2·BLOCK_N
    INTER: gl.constexpr,  # a multiple of 128·SLICES·STAGES and of BLOCK_N
    LOCAL: gl.constexpr,
    HAS_MAP: gl.constexpr,
    HAS_B13: gl.constexpr,
    HAS_B2: gl.constexpr,
    HAS_LIMIT: gl.constexpr,
    CDNA: gl.constexpr,
    PDL: gl.constexpr,
    PROGRAMS: gl.constexpr,
    BLOCK_R: gl.constexpr,  # a power of two, at least M·TOP_K
    BLOCK_M: gl.constexpr,  # columns of the products
    BLOCK_N: gl.constexpr,  # rows of each of a tile's two halves: gate and up, or features that follow each other
    SLICES: gl.constexpr,  # of K, a warp each
    STAGES: gl.constexpr,  # groups that a warp has under way
):
    # Layout: tickets count tiles of BLOCK_N features of h, the experts in the order in which routes name them, then
    # tiles of 2·BLOCK_N features of y likewise.
    up_tiles: gl.constexpr = INTER // BLOCK_N
    down_tiles: gl.constexpr = HIDDEN // (2 * BLOCK_N)
    mma: gl.constexpr = accumulator_layout(CDNA, SLICES, gl.num_warps() // SLICES)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 8)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    taken = count_later(state_ptr + _TICKET, "relaxed", CDNA)
    experts = _hit_experts(ids_ptr, map_ptr, tokens * TOP_K, known, LOCAL, HAS_MAP, CDNA, BLOCK_R)
    hit = gl.max(experts[2], 0) + 1
    features_ptr = state_ptr + _MADE + BLOCK_R
    tickets = hit * (up_tiles + down_tiles)
    ticket = value(taken)
    column = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, gl.SliceLayout(1, right)))
    zero = gl.zeros([SLICES, BLOCK_N, BLOCK_M], gl.float32, layout=mma)
    # Who has no tile fetches weights of one that exists, also where no expert is hit.
    tile = _tile_of(gl.maximum(gl.minimum(ticket, tickets - 1), 0), hit, experts, TOP_K, up_tiles, down_tiles)
    words, fields, far = _weights_of(tile, w13_ptr, s13_ptr, w2_ptr, s2_ptr, HIDDEN, INTER, BLOCK_N, SLICES, mma)
    weights = first_weights(words, fields, far, STAGES)
    last_number = -1  # of the tile of features whose counter this program has added to last
    counted = taken
    while ticket < tickets:
        taken = count_later(state_ptr + _TICKET, "relaxed", CDNA)
        up, place, number, _expert, first, takers = tile
        if not up:
            await_count(state_ptr + _MADE + place, up_tiles)
        steps = HIDDEN // (128 * SLICES) if up else INTER // (128 * SLICES)
        width = HIDDEN if up else INTER
        # Columns of other tokens repeat one of those, so that nothing is read for them.
        token = gl.where(takers >> column & 1 != 0, column, first // TOP_K)
        rows = row_pointers(x_ptr if up else h_ptr, token if up else first * tokens + token, width, steps, SLICES, mma)
        x = load_blocks(rows, True, CDNA)
        accs = (zero, zero)
        for step in range(0, steps - STAGES, STAGES):
            here = rows + step * 128
            ahead = step + STAGES
            accs, weights, x = turn(
                accs, weights, x, here, here + STAGES * 128, words + ahead * 512, fields + ahead * 16, zero, far,
                STAGES, CDNA, False, True,
            )  # fmt: skip
        ticket = value(taken)
        following = _tile_of(gl.minimum(ticket, tickets - 1), hit, experts, TOP_K, up_tiles, down_tiles)
        words, fields, far = _weights_of(
            following, w13_ptr, s13_ptr, w2_ptr, s2_ptr, HIDDEN, INTER, BLOCK_N, SLICES, mma
        )
        here = rows + (steps - STAGES) * 128
        accs, weights, x = turn(accs, weights, x, here, here, words, fields, zero, far, STAGES, CDNA, False, True)
        sums = (gl.sum(accs[0], 0), gl.sum(accs[1], 0))
        if up:
            _store_h(
                sums, h_ptr, b13_ptr, tile, tokens, limit,
                HIDDEN, INTER, HAS_B13, HAS_LIMIT, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            barrier()
            gl.atomic_add(state_ptr + _MADE + place, 1, sem="release", scope="gpu")
        else:
            _store_y(sums, y_ptr, b2_ptr, tile, tokens, HIDDEN, INTER, HAS_B2, BLOCK_M, BLOCK_N)
            barrier()
            if (last_number >= 0) & (value(counted) == hit - 1):
                _combine_tile(
                    y_ptr, weight_ptr, out_ptr, experts, last_number, tokens, TOP_K, HIDDEN, CDNA, BLOCK_M, 2 * BLOCK_N
                )
            counted = count_later(features_ptr + number, "acq_rel", CDNA)
            last_number = number
        tile = following
    if (last_number >= 0) & (value(counted) == hit - 1):
        _combine_tile(
            y_ptr, weight_ptr, out_ptr, experts, last_number, tokens, TOP_K, HIDDEN, CDNA, BLOCK_M, 2 * BLOCK_N
        )
    if hit == 0:  # every route is remote
        for i in range(gl.program_id(0), down_tiles, PROGRAMS):
            _combine_tile(y_ptr, weight_ptr, out_ptr, experts, i, tokens, TOP_K, HIDDEN, CDNA, BLOCK_M, 2 * BLOCK_N)
    if value(count_later(state_ptr + _DONE, "acq_rel", CDNA)) == PROGRAMS - 1:
        size: gl.constexpr = _MADE + BLOCK_R + down_tiles
        line: gl.constexpr = gl.BlockedLayout([1], [lane_count(CDNA)], [gl.num_warps()], [0])
        at_once: gl.constexpr = gl.num_warps() * lane_count(CDNA)
        for begin in range(0, size, at_once):
            counter = begin + gl.arange(0, at_once, layout=line)
            gl.store(state_ptr + counter, gl.zeros([at_once], gl.int32, layout=line), mask=counter < size)
