"""The strategies over several ranks: real processes and collectives, and the bytes that gloo puts on its sockets."""

import os
import socket
import stat
import struct
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_ep import fused_moe_mxfp4
from moe_ep.comm import AllGather, AllReduce, AllToAll, Auto, CollectiveError, Combine, ReduceScatter
from moe_ep.comm.groups import EpGroups, ep_groups, owners
from moe_ep.comm.watch import Watch
from moe_ep.comm.wire import Payload, RowFormat
from moe_ep.cost import OWN_TOKENS, SAME_TOKENS, Choice, Name, Wire, traffic
from moe_ep.fp8 import dequantise_rows, quantise_rows
from moe_ep.network import Layout
from moe_ep.placement import Placement
from moe_ep.shape import ModelShape
from moe_ep.spec import TopKOutput
from tests.moe_ep.experts import Experts, Tokens, by_formula, make_experts, make_tokens, relative_error
from tests.moe_ep.test_layer import on_ranks

WORLD = 4
EXPERTS, HIDDEN, TOP_K = 10, 256, 3  # 10 experts over 4 ranks are uneven
CPU = torch.device("cpu")
LAYOUTS = [Layout(4, 4), Layout(4, 2), Layout(4, 1)]
COUNTS = [[3, 0, 5, 1], [0, 0, 0, 0], [4, 4, 4, 4], [0, 0, 0, 2]]


def routes(tokens: Tokens) -> TopKOutput:
    return TopKOutput(tokens.weights, tokens.ids, None)


def through(combine: Combine, experts: Experts, own: Tokens, rank: int, counts: list[int] | None = None) -> Tensor:
    """The sum for a rank's own tokens, by a strategy and the experts that the rank holds."""
    routed = combine.dispatch(own.x, routes(own), counts, "layer 7")
    return combine(partial_of(experts, routed.x, routed.topk, rank), routed)


def partial_of(experts: Experts, x: Tensor, topk: TopKOutput, rank: int) -> Tensor:
    placement = Placement(EXPERTS, WORLD)
    held = experts.rows(placement.experts(rank))
    expert_map = torch.tensor(placement.expert_map(rank), dtype=torch.int32)
    packed = (held.w13, held.w13_scale, held.w2, held.w2_scale)
    out = torch.float32
    return fused_moe_mxfp4(
        x, *packed, topk.topk_ids, topk.topk_weights, expert_map=expert_map, impl="reference", out_dtype=out
    )


def part(tokens: Tokens, rows: slice) -> Tokens:
    return Tokens(tokens.x[rows], tokens.ids[rows], tokens.weights[rows])


def own_rows(counts: list[int], rank: int) -> slice:
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def every_strategy_gives_the_sum(rank: int, world: int) -> None:
    experts = make_experts(EXPERTS, HIDDEN, 32, CPU)
    for layout in LAYOUTS:
        groups = ep_groups(world, rank, layout, 60)
        for counts in COUNTS:
            batch = make_tokens(sum(counts), HIDDEN, EXPERTS, TOP_K, CPU, seed=sum(counts))
            if sum(counts) > 3:
                batch.ids[1] = -1  # a padding token
                batch.ids[2] = torch.tensor([0, 9, -1])
                batch.ids[3] = torch.tensor([0, 1, 2])  # all of one rank's
            in_fp8 = replace(batch, x=dequantise_rows(*quantise_rows(batch.x)).bfloat16())
            expected: dict[Payload, Tensor] = {
                "bf16": by_formula(experts, batch),
                "fp8": by_formula(experts, in_fp8),
            }
            check_same_tokens(groups, experts, batch, expected["bf16"], rank)
            check_own_tokens(groups, experts, batch, expected, counts, rank)
    check_that_sums_do_not_depend_on_who_comes_first(groups, rank)


def check_same_tokens(groups: EpGroups, experts: Experts, batch: Tokens, expected: Tensor, rank: int) -> None:
    for name in SAME_TOKENS:
        for dtype, tolerance in ((torch.float32, 4e-3), (torch.bfloat16, 1e-2)):
            got = through(groups.strategy(name, EXPERTS, dtype=dtype), experts, batch, rank)
            assert got.shape == expected.shape
            if expected.any():
                assert relative_error(got, expected) < tolerance, (name, dtype)
            everybodys = [torch.empty_like(got) for _ in range(WORLD)]
            dist.all_gather(everybodys, got)
            assert all(torch.equal(got, other) for other in everybodys), "all ranks hold the same result"


def check_own_tokens(
    groups: EpGroups, experts: Experts, batch: Tokens, sums: dict[Payload, Tensor], counts: list[int], rank: int
) -> None:
    mine = own_rows(counts, rank)
    forms: list[tuple[Payload, torch.dtype, float]] = [
        ("bf16", torch.float32, 4e-3),
        ("bf16", torch.bfloat16, 1e-2),
        ("fp8", torch.float32, 4e-3),
    ]
    for name in OWN_TOKENS:
        for payload, dtype, tolerance in forms:
            combine, expected = groups.strategy(name, EXPERTS, payload, dtype), sums[payload][mine]
            for known in (counts, None):
                got = through(combine, experts, part(batch, mine), rank, known)
                assert got.shape == expected.shape
                assert (got.dtype == dtype) or not len(got)
                if expected.any():
                    assert relative_error(got, expected) < tolerance, (name, payload, dtype, groups.layout)
                assert torch.equal(got, through(combine, experts, part(batch, mine), rank, known))


def check_that_sums_do_not_depend_on_who_comes_first(groups: EpGroups, rank: int) -> None:
    ones = torch.full((4, 8), 2.0**-24)  # next to 1 it is lost in f32, two of them are not: the order shows
    assert groups.whole is not None
    want = None
    for late in range(WORLD):
        time.sleep(0.05 * (rank == late))
        partial = torch.ones(4, 8) if rank == 0 else ones.clone()
        got = groups.whole.reduce_scatter(partial).wait()
        want = got if want is None else want
        assert torch.equal(got, want)


def test_every_strategy_gives_the_sum_for_uneven_and_no_tokens_in_every_dtype_on_every_layout(tmp_path: Path) -> None:
    on_ranks(WORLD, tmp_path / "store", every_strategy_gives_the_sum)


MANY = ModelShape(hidden=HIDDEN, intermediate=32, layers=1, experts=64, top_k=6, vocab=8)
EACH = 300


def on_the_sockets() -> int:
    """Bytes that this process's TCP connections have sent, less what was sent again (Linux's tcp_info)."""
    total = 0
    for file in Path("/proc/self/fd").iterdir():
        if not stat.S_ISSOCK(file.stat().st_mode if file.exists() else 0):
            continue
        with socket.socket(fileno=os.dup(int(file.name))) as end:
            if end.type == socket.SOCK_STREAM and end.family in (socket.AF_INET, socket.AF_INET6):
                sent, again = struct.unpack_from("QQ", end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 216), 200)
                total += sent - again
    return total


def bytes_are_those_of_the_formulas(rank: int, world: int) -> None:
    wires: list[tuple[Wire, torch.dtype]] = [
        (Wire("bf16", 4), torch.float32),
        (Wire("fp8", 2), torch.bfloat16),
    ]
    for layout in LAYOUTS:
        groups = ep_groups(world, rank, layout, 60)
        for name in (*SAME_TOKENS, *OWN_TOKENS):
            for wire, dtype in wires:
                combine = groups.strategy(name, MANY.experts, wire.payload, dtype)
                check_bytes(groups, combine, name, wire, rank)


def check_bytes(groups: EpGroups, combine: Combine, name: Name, wire: Wire, rank: int) -> None:
    counts = [EACH] * WORLD
    batch = make_tokens(EACH * WORLD, HIDDEN, MANY.experts, MANY.top_k, CPU, seed=1)
    own = part(batch, own_rows(counts, rank)) if combine.own_tokens else batch
    parts = {id(group): group for group in groups.all}.values()

    def pass_() -> None:
        routed = combine.dispatch(own.x, routes(own), counts)
        combine(torch.zeros(routed.x.shape[0], HIDDEN), routed)

    pass_()  # connections are made
    dist.barrier()
    counted, wired = sum(group.sent for group in parts), on_the_sockets()
    dist.barrier()
    pass_()
    counted = sum(group.sent for group in parts) - counted
    dist.barrier()
    there = on_the_sockets() - wired
    expected = traffic(name, groups.layout, MANY, EACH * WORLD, wire).total
    random = 0.04 if name == "all_to_all" else 1e-3  # how many ranks a token hits is chance
    assert counted == pytest.approx(expected, rel=random), (name, wire, groups.layout)
    # Beside them gloo's own headers, and the barriers.
    assert counted <= there <= counted * 1.02 + 8192, (name, wire, groups.layout, there, counted)
    dist.barrier()


def test_the_bytes_that_are_counted_are_the_formulas_and_those_on_the_sockets(tmp_path: Path) -> None:
    on_ranks(WORLD, tmp_path / "store", bytes_are_those_of_the_formulas)


def tokens_are_sent_once_a_node_without_remote_routes(rank: int, world: int) -> None:
    groups = ep_groups(world, rank, Layout(4, 2), 60)
    combine = groups.strategy("all_to_all", EXPERTS)
    own = make_tokens(6, HIDDEN, EXPERTS, TOP_K, CPU, seed=rank)
    own.ids[:] = torch.tensor([5, 6, 9])  # all on the second node: 5 on rank 1 … no: ranks hold 0–2, 3–5, 6–7, 8–9
    own.ids[3:] = torch.tensor([6, 8, 9])
    routed = combine.dispatch(own.x, routes(own))
    owner = owners(EXPERTS, world)
    ids = routed.topk.topk_ids
    assert bool(((ids < 0) | (owner[ids.clamp(min=0).long()] == rank)).all()), "remote routes are dropped"
    assert bool((ids >= 0).any(1).all()), "who has no route here is not sent here"
    assert routed.x.shape[0] == {0: 0, 1: 12, 2: 24, 3: 24}[rank], "once to each rank, whatever its routes"
    assert groups.rail is not None
    row = RowFormat(HIDDEN, TOP_K, "bf16").row_bytes
    asked = 8 * 2  # how many rows it will send, to each of two nodes
    # From the first node six tokens go over; from the second, three of six go back, to expert 5.
    assert groups.rail.sent == row * (6 if rank < 2 else 3) + asked
    with pytest.raises(TypeError, match="all_gather combines what its own dispatch has given"):
        groups.strategy("all_gather", EXPERTS)(torch.zeros(1, HIDDEN), routed)
    with pytest.raises(ValueError, match=r"counts is \[1, 1, 1, 1\], but rank \d of 4 has 6 tokens"):
        groups.strategy("all_gather", EXPERTS).dispatch(own.x, routes(own), [1] * 4)
    with pytest.raises(ValueError, match="strategy is 'ring'; there are all_reduce, reduce_scatter"):
        groups.strategy("ring", EXPERTS)
    auto_follows_its_choice(groups, rank)
    a_collective_that_a_rank_does_not_enter_names_it(rank, world)


def a_collective_that_a_rank_does_not_enter_names_it(rank: int, world: int) -> None:
    made: list[Watch] = []
    store = dist.distributed_c10d._get_default_store()

    def watch(name: str, ranks: tuple[int, ...]) -> Watch:
        made.append(Watch(store, name, rank, ranks, 4, print))
        return made[-1]

    groups = ep_groups(world, rank, Layout(4, 4), 2, watch)
    reduce = groups.strategy("all_reduce", EXPERTS)
    there = reduce.dispatch(torch.ones(2, 8).bfloat16(), TopKOutput(None, None, None), place="layer 6")
    reduce(torch.ones(2, 8), there)
    if rank != 2:
        with pytest.raises(CollectiveError) as caught:
            reduce(torch.ones(2, 8), replace(there, place="layer 7"))
        said = str(caught.value)
        assert f"layer 7 combine: all_reduce did not end on rank {rank}: " in said
        assert "not entered by rank 2 of 4: rank 2 last entered layer 6 combine: all_reduce (number 1)" in said
    else:
        time.sleep(4)  # the others' time limit is 2 s
    for one in made:
        one.close()


def auto_follows_its_choice(groups: EpGroups, rank: int) -> None:
    asked = []

    def choose(tokens: int, capturing: bool) -> Choice:
        asked.append((tokens, capturing))
        return Choice("all_to_all" if tokens > 6 else "all_gather", tokens, {}, "")

    assert groups.whole is not None
    auto = Auto({name: groups.strategy(name, EXPERTS) for name in OWN_TOKENS}, groups.whole, choose)
    experts = make_experts(EXPERTS, HIDDEN, 32, CPU)
    for counts in ([2, 1, 0, 3], [2, 1, 1, 3]):
        batch = make_tokens(sum(counts), HIDDEN, EXPERTS, TOP_K, CPU)
        mine = own_rows(counts, rank)
        routed = auto.dispatch(batch.x[mine], routes(part(batch, mine)))
        assert type(auto.strategies[choose(sum(counts), False).name]) is (AllGather if sum(counts) == 6 else AllToAll)
        parts = auto.parts(routed, 2)
        assert parts == (2 if sum(counts) == 6 else 1), "a gather is cut, an all-to-all is not"
        ranges = partial_of(experts, routed.x, routed.topk, rank).chunk(parts, 1)
        got = [auto(one.contiguous(), routed) for one in ranges]
        expected = by_formula(experts, batch)[mine]
        assert torch.cat(got, 1).shape == expected.shape
        if len(expected):
            assert relative_error(torch.cat(got, 1), expected) < 4e-3
    assert asked[0] == (6, False)


def test_an_all_to_all_sends_tokens_once_a_node_and_auto_takes_what_is_chosen(tmp_path: Path) -> None:
    on_ranks(WORLD, tmp_path / "store", tokens_are_sent_once_a_node_without_remote_routes)


@pytest.mark.parametrize("payload", ["bf16", "fp8"])
@pytest.mark.parametrize(("hidden", "top_k"), [(256, 6), (160, 1), (32, 3)])
def test_a_row_on_the_wire_holds_state_ids_and_weights(payload: Payload, hidden: int, top_k: int) -> None:
    row = RowFormat(hidden, top_k, payload)
    batch = make_tokens(5, hidden, 8, top_k, CPU)
    rows = row.pack(batch.x, routes(batch))
    assert rows.shape == (5, row.row_bytes)
    x, topk = row.unpack(rows)
    assert torch.equal(topk.topk_ids, batch.ids)
    assert torch.equal(topk.topk_weights, batch.weights)
    assert torch.equal(x, batch.x) if payload == "bf16" else relative_error(x, batch.x) < 4e-2
    row.nobody(rows[2:3])
    assert row.ids(rows)[2].tolist() == [-1] * top_k
    assert torch.equal(row.ids(rows)[3], batch.ids[3])
    assert row.unpack(rows[:0])[0].shape == (0, hidden)


def test_a_row_is_as_long_as_the_cost_model_says() -> None:
    for hidden in (32, 160, 4096, 7168):
        shape = ModelShape(hidden=hidden, intermediate=32, layers=1, experts=8, top_k=6, vocab=8)
        for payload in ("bf16", "fp8"):
            assert Wire(payload).row_bytes(shape) == RowFormat(hidden, 6, payload).row_bytes
    assert RowFormat(7168, 6, "fp8").state_bytes == 7168 + 56


def test_activations_in_fp8_have_the_smallest_power_of_two_that_fits() -> None:
    x = torch.zeros(4, 160)
    x[0, 3], x[1, 5], x[2, 7], x[3, 130] = 448.0, 448.01, 3.5 * 2.0**-9, float("nan")
    codes, scales = quantise_rows(x)
    assert scales[:3, 0].tolist() == [127, 128, 127 - 16]
    assert scales[0, 1].item() == 127 - 22, "zeros take the least, 1e-4 / 448"
    back = dequantise_rows(codes, scales)
    assert torch.equal(back[0], x[0])
    assert back[1, 5].item() == 448.0
    assert torch.equal(back[2], x[2])
    assert back[3, 130].isnan()
    assert back.isnan().sum() == 1
    noise = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) * 50
    assert float(((dequantise_rows(*quantise_rows(noise)) - noise).abs() / noise.abs().amax()).max()) < 2**-4


def test_strategies_say_whose_tokens_they_take_and_whether_a_graph_can_hold_them() -> None:
    assert {s.name for s in (AllReduce, ReduceScatter) if not s.own_tokens} == set(SAME_TOKENS)
    assert {s.name for s in (AllGather, AllToAll) if s.own_tokens} == set(OWN_TOKENS)
    assert [s.name for s in (AllReduce, ReduceScatter, AllGather, AllToAll) if not s.capturable] == ["all_to_all"]
