"""The cost model: published figures, its own formulas at the edges, and what it chooses."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from moe_ep.bench.fit import Part, Sample, fit
from moe_ep.cost import (
    OWN_TOKENS,
    SAME_TOKENS,
    Choice,
    Name,
    Wire,
    choose,
    combine_us,
    copies,
    cut_for_overlap,
    dispatch_us,
    experts_us,
    hit_probability,
    op_us,
    pipeline_us,
    predict,
    traffic,
)
from moe_ep.network import MI300A, SLINGSHOT, Device, Layout, Link, Network
from moe_ep.shape import ModelShape

FLASH = ModelShape(hidden=4096, intermediate=2048, layers=43, experts=256, top_k=6, vocab=129280)
PRO = ModelShape(hidden=7168, intermediate=3072, layers=61, experts=384, top_k=6, vocab=129280, shared_experts=1)
WIRE = Wire()
PARTS: tuple[Part, ...] = ("dispatch", "combine")


@pytest.mark.parametrize(
    ("ranks", "hit", "flat", "by_node"),
    [(4, 0.824, 0, 0), (8, 0.554, 2.21, 0.98), (16, 0.323, 3.87, 2.47), (32, 0.174, 4.89, 3.88)],
)
def test_copies_between_nodes_are_the_counted_ones(ranks: int, hit: float, flat: float, by_node: float) -> None:
    layout = Layout(ranks, 4)
    assert hit_probability(384, 384 // ranks, 6) == pytest.approx(hit, abs=1.5e-3)
    assert (ranks - 4) * hit_probability(384, 384 // ranks, 6) == pytest.approx(flat, abs=1e-2)
    assert copies(layout, 384, 6)[0] == pytest.approx(by_node, abs=1e-2)


def test_bytes_are_the_formulas() -> None:
    layout, tokens, row = Layout(8, 4), 100, 2 * 7168 + 48
    assert traffic("all_reduce", layout, PRO, tokens, Wire(sum_bytes=2)).total == 2 * 7 / 8 * tokens * 7168 * 2
    assert traffic("reduce_scatter", layout, PRO, tokens, WIRE).total == 7 / 8 * tokens * 7168 * 6
    assert traffic("all_gather", layout, PRO, tokens, WIRE).total == 7 / 8 * tokens * (row + 7168 * 4)
    between, within = copies(layout, 384, 6)
    sent = traffic("all_to_all", layout, PRO, tokens, WIRE)
    assert sent.between == pytest.approx(tokens / 8 * between * (row + 7168 * 4))
    assert sent.within == pytest.approx(tokens / 8 * within * (row + 7168 * 4))
    assert Wire("fp8").row_bytes(PRO) == 7168 + 56 + 48


def test_one_rank_moves_nothing_and_takes_no_time() -> None:
    for name in (*SAME_TOKENS, *OWN_TOKENS):
        alone = Layout(1, 1)
        assert traffic(name, alone, PRO, 64, WIRE).total == 0
        assert dispatch_us(name, alone, PRO, 64, WIRE, SLINGSHOT) == 0
        assert combine_us(name, alone, PRO, 64, WIRE, SLINGSHOT) == 0
    assert Layout.of(6, 4) == Layout(6, 2), "what does not line up with nodes is taken in the parts that do"


# bf16 all-reduces over two nodes of beverin, captured in HIP graphs: bytes and µs that xkernels published.
PUBLISHED = ((14e3, 68), (57e3, 112), (229e3, 113), (0.92e6, 137), (3.67e6, 187), (14.7e6, 329), (58.7e6, 871))


def test_the_network_of_beverin_predicts_the_published_all_reduces() -> None:
    layout = Layout(8, 4)
    one = ModelShape(hidden=32, intermediate=32, layers=1, experts=8, top_k=1, vocab=1)  # any: bytes are what counts
    samples = [
        Sample("all_reduce", "combine", layout, one, round(size / 64), Wire(sum_bytes=2), us) for size, us in PUBLISHED
    ]
    missed = sorted(abs(sample.predicted(SLINGSHOT) / sample.us - 1) for sample in samples)
    assert missed[3] < 0.15
    assert missed[-1] < 0.55, "the smallest goes by another protocol"
    found = fit(samples, replace(SLINGSHOT, call_us=5, fabric=Link(5, 5e9)), "again")
    assert found.median_error < 0.15
    assert found.network.fabric.bytes_per_s == pytest.approx(20.3e9, rel=0.1)


def test_a_fit_finds_the_constants_that_made_the_times() -> None:
    truth = replace(SLINGSHOT, call_us=11, host_us=44, node=Link(7, 333e9))
    layout = Layout(2, 2)
    samples = [
        Sample(name, part, layout, shape, tokens, WIRE, us)
        for name, part, shape, tokens in product(OWN_TOKENS, PARTS, (FLASH, PRO), (1, 64, 8192))
        if (us := Sample(name, part, layout, shape, tokens, WIRE, 0.0).predicted(truth))
    ]
    found = fit(samples, SLINGSHOT, "made")
    assert found.worst_error < 0.02
    assert found.network.node.bytes_per_s == pytest.approx(333e9, rel=0.03)
    assert found.network.fabric == SLINGSHOT.fabric, "what no sample depends on stays"


def test_few_tokens_are_reduced_whole_many_are_scattered_and_far_ranks_exchange() -> None:
    def taken(own: bool, ranks: int, tokens: int) -> str:
        return choose(own, Layout(ranks, 4), PRO, tokens, WIRE, SLINGSHOT).name

    assert [taken(False, 8, t) for t in (1, 64, 8192)] == ["all_reduce", "all_reduce", "reduce_scatter"]
    assert [taken(True, 8, t) for t in (8, 8192)] == ["all_gather", "all_gather"]
    assert [taken(True, 32, t) for t in (32, 131072)] == ["all_gather", "all_to_all"]
    why = choose(True, Layout(32, 4), PRO, 131072, WIRE, SLINGSHOT).why
    assert "131072 tokens, each rank with tokens of its own, 32 ranks on 8 nodes: all_gather" in why
    assert "MB sent a rank" in why
    captured = choose(True, Layout(32, 4), PRO, 131072, WIRE, SLINGSHOT, capturing=True)
    assert captured.name == "all_gather"
    assert captured.why.endswith("all_to_all cannot be captured")


def test_what_was_measured_corrects_the_model() -> None:
    layout = Layout(8, 4)
    measured: dict[int, dict[Name, float]] = {
        64: {"all_gather": 900.0, "all_to_all": 300.0},
        4096: {"all_gather": 1000.0, "all_to_all": 975.0},
    }

    def taken(tokens: int, *, capturing: bool = False) -> Choice:
        return choose(True, layout, PRO, tokens, WIRE, SLINGSHOT, capturing=capturing, measured=measured)

    assert choose(True, layout, PRO, 64, WIRE, SLINGSHOT).name == "all_gather"
    at_64 = taken(64)
    assert at_64.name == "all_to_all"
    assert at_64.us == pytest.approx(measured[64]), "there it is what was measured"
    assert "; as measured at 64 tokens" in at_64.why
    assert taken(64, capturing=True).name == "all_gather"
    assert taken(4096).name == "all_gather", "so little may be chance"
    assert taken(300).why.endswith("as measured at 64 tokens")
    assert taken(600).why.endswith("as measured at 4096 tokens")
    alone = choose(False, Layout(1, 1), PRO, 8, WIRE, SLINGSHOT, measured={8: {"all_reduce": 1, "reduce_scatter": 1}})
    assert alone.us == {"all_reduce": 0, "reduce_scatter": 0}


def test_more_bytes_a_second_never_take_longer() -> None:
    faster = replace(SLINGSHOT, fabric=Link(32, 80e9), node=Link(4, 800e9))
    for name, ranks, tokens in product((*SAME_TOKENS, *OWN_TOKENS), (4, 8, 64), (1, 4096)):
        slow, fast = (predict(name, Layout(ranks, 4), PRO, tokens, WIRE, n, MI300A) for n in (SLINGSHOT, faster))
        assert fast.communication <= slow.communication
        assert slow.experts == fast.experts
        assert slow.total == slow.dispatch + slow.experts + max(slow.shared, slow.combine)


def test_the_floor_of_experts_is_bytes_for_few_tokens_and_matmuls_for_many() -> None:
    one = experts_us(Layout(8, 4), PRO, 1, MI300A)
    assert one == pytest.approx(6 / 8 * PRO.expert_bytes / 3.5e12 * 1e6, rel=1e-9)
    many = experts_us(Layout(8, 4), PRO, 1e5, MI300A, imbalance=1.25)
    assert many == pytest.approx(1.25 * 1e5 * 6 / 8 * 6 * 7168 * 3072 / 4e14 * 1e6)


def test_chunks_are_combined_under_the_next_ones_experts() -> None:
    assert pipeline_us([10, 10], [4, 4]) == 24
    assert pipeline_us([1, 1], [5, 5]) == 11
    assert pipeline_us([7], [3]) == 10


def test_the_kernels_take_about_what_an_h200_measured() -> None:
    device = Device(4.21e12, 7.73e14)  # its copy and matmul, in the same run
    for shape, tokens, us in ((FLASH, 1024, 922), (FLASH, 8192, 3003), (PRO, 1024, 2924), (PRO, 8192, 8295)):
        assert op_us(Layout(2, 2), shape, tokens, device) == pytest.approx(us, rel=0.1)


def test_a_second_gemm_is_cut_where_that_is_faster() -> None:
    layout = Layout(8, 4)

    def parts(name: Name, tokens: int, *, whole_shared: bool) -> int:
        return cut_for_overlap(name, layout, PRO, tokens, WIRE, SLINGSHOT, MI300A, whole_shared=whole_shared)

    assert parts("all_reduce", 8, whole_shared=False) == 1, "a decode is not"
    assert parts("all_to_all", 65536, whole_shared=False) == 1, "nor what every rank has other rows of"
    assert parts("all_reduce", 65536, whole_shared=False) == 4
    short = replace(SLINGSHOT, fabric=Link(32, 1e12), node=Link(4, 1e12))
    hidden = cut_for_overlap("all_reduce", layout, PRO, 65536, WIRE, short, MI300A)
    assert hidden == 1, "nor where the shared expert hides the combine anyway"


@pytest.mark.parametrize(
    ("shape", "tokens", "copies", "parts"),
    [
        *[(FLASH, 1024, copies, 1) for copies in (False, True)],
        *[(FLASH, 8192, False, 1), (FLASH, 8192, True, 4), (PRO, 1024, True, 2), (PRO, 8192, True, 4)],
    ],
)
def test_ranges_are_what_was_fastest_between_two_h200(shape: ModelShape, tokens: int, copies: bool, parts: int) -> None:
    # all_reduce in f32, without shared expert: collectives of NCCL beside the next range cost more than they saved.
    link = Link(step_us=3, bytes_per_s=350e9 if copies else 280e9)
    nvlink = Network(call_us=10, peer_us=1, host_us=1000, node=link, fabric=link, source="two H200")
    device = Device(4.21e12, 7.73e14)
    of_model: tuple[Any, ...] = ("all_reduce", Layout(2, 2), shape, tokens, WIRE, nvlink, device)
    assert cut_for_overlap(*of_model, whole_shared=False, copied=4 * copies) == parts
