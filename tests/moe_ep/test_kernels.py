"""Every kernel that a table can name, by itself: what it computes, and what it keeps between calls."""

from typing import Any

import pytest
import torch

from moe_ep import fused_moe_mxfp4, workspace
from moe_ep.backends.call import using
from moe_ep.fused import fused_moe_mxfp4_by_columns
from moe_ep.kernels.launch import Gemm, Kernel, LaunchConfig, fit
from tests.moe_ep.experts import Experts, Tokens, _partial, by_formula, make_experts, make_tokens, relative_error
from tests.moe_ep.ways import WAYS, Way, call, device_of

HIDDEN, INNER = 512, 384  # 4 and 3 groups: slices and stages that divide one do not divide the other
EMULATED = [
    ("stream", 16, Gemm(16, 1, 1)),
    ("stream", 16, Gemm(64, 4, 2)),
    ("stream", 16, Gemm(32, 2, 1)),
    ("stream", 16, Gemm(16, 4, 2, slices=4)),
    ("tile", 16, Gemm(64, 4, 2)),
    ("tile", 64, Gemm(32, 4, 2)),
]
GFX942_ONLY = [
    ("cdna3", 16, Gemm(16, 4, 2, slices=4)),
    ("cdna3", 32, Gemm(64, 4, 2)),
    ("route", 16, Gemm(16, 4, 2, slices=4)),
    ("route", 16, Gemm(32, 2, 1)),
]
ON_HOPPER = [
    *EMULATED,
    ("single", 8, Gemm(16, 4, 2, slices=4)),
    ("single", 8, Gemm(32, 8, 1, slices=4)),
    ("stream", 8, Gemm(16, 2, 2, slices=2)),
    ("stream", 8, Gemm(64, 8, 1, slices=2)),
    ("stream", 8, Gemm(16, 4, 3, slices=4)),
    ("tile", 128, Gemm(64, 4, 3)),
]
HOPPER_ONLY = [
    ("warpgroup", 32, Gemm(128, 4, 8)),  # more stages than a tile of down has groups
    ("warpgroup", 64, Gemm(64, 4, 4)),
    ("warpgroup", 64, Gemm(128, 4, 3)),
    ("warpgroup", 128, Gemm(128, 4, 4)),
]


def cases() -> list[Any]:
    found = [
        pytest.param("gfx942", *case, id=f"gfx942-{case[0]}-{case[1]}-{case[2]}") for case in EMULATED + GFX942_ONLY
    ]
    if "cuda" in WAYS and torch.cuda.get_device_capability() == (9, 0):
        found += [
            pytest.param("cuda", *case, id=f"cuda-{case[0]}-{case[1]}-{case[2]}") for case in ON_HOPPER + HOPPER_ONLY
        ]
    return found


NAMES = ("way", "kernel", "block_m", "gemm")
by_kernel = pytest.mark.parametrize(NAMES, cases())
of_hopper = pytest.mark.parametrize(NAMES, [case for case in cases() if "warpgroup" in case.values])


SMALL = (("stream", 16, Gemm(16, 1, 1)), ("cdna3", 16, Gemm(16, 4, 2, slices=4)))
in_ranges = pytest.mark.parametrize(
    NAMES, [case for case in cases() if case.values[0] == "cuda" or case.values[1:] in SMALL]
)


def count_for(kernel: Kernel, block_m: int, count: int) -> int:
    """Of tokens: as many, or as the kernel takes at once."""
    return min(count, block_m) if kernel == "single" else count


def inner_for(kernel: Kernel) -> int:
    return 512 if kernel == "warpgroup" else INNER  # it takes whole tiles of 64 and 128 rows


def run(config: LaunchConfig, experts: Experts, tokens: Tokens, **options: Any) -> torch.Tensor:
    with using(config):
        return _partial(experts, tokens, "triton_kernel", **options)


def config_of(kernel: Kernel, block_m: int, gemm: Gemm) -> LaunchConfig:
    config = fit(LaunchConfig(kernel, block_m, gemm, gemm), HIDDEN, inner_for(kernel))
    assert config is not None
    return config


@by_kernel
@pytest.mark.parametrize("limit", [10.0, None])
def test_it_computes_the_formula_over_several_blocks_and_remote_routes(
    way: Way, kernel: Kernel, block_m: int, gemm: Gemm, limit: float | None
) -> None:
    device = device_of(way)
    experts = make_experts(4, HIDDEN, inner_for(kernel), device, bias=True)
    tokens = make_tokens(count_for(kernel, block_m, block_m + 5), HIDDEN, 4, 2, device)
    tokens.ids[:, 0] = 1  # more than one block of routes, the second not full
    tokens.ids[:, 1] = torch.where(tokens.ids[:, 1] == 1, 3, tokens.ids[:, 1])
    expert_map = torch.tensor([0, 1, -1, 2], device=device)
    held = Experts(*(None if t is None else t[[0, 1, 3]].contiguous() for t in vars(experts).values()))  # type: ignore[arg-type]
    got = call(way, run, config_of(kernel, block_m, gemm), held, tokens, expert_map=expert_map, limit=limit)
    remote = Tokens(tokens.x, torch.where(tokens.ids == 2, -1, tokens.ids), tokens.weights)
    assert relative_error(got, by_formula(experts, remote, limit=limit)) < 5e-3


@of_hopper
def test_blocks_of_every_size_are_computed(way: Way, kernel: Kernel, block_m: int, gemm: Gemm) -> None:
    """It takes narrower products for blocks that are not full."""
    device = device_of(way)
    sizes = [*range(1, block_m, max(1, block_m // 16)), block_m, block_m + 1]
    experts = make_experts(len(sizes), HIDDEN, inner_for(kernel), device, bias=True)
    tokens = make_tokens(sum(sizes), HIDDEN, len(sizes), 1, device)
    tokens.ids[:, 0] = torch.arange(len(sizes), device=device).repeat_interleave(torch.tensor(sizes, device=device))
    got = call(way, run, config_of(kernel, block_m, gemm), experts, tokens)
    assert relative_error(got, by_formula(experts, tokens)) < 5e-3


@by_kernel
def test_a_nan_scale_reaches_the_tokens_of_its_expert_and_no_other(
    way: Way, kernel: Kernel, block_m: int, gemm: Gemm
) -> None:
    device = device_of(way)
    experts = make_experts(2, HIDDEN, inner_for(kernel), device)
    experts.w2_scale[1, 37, 2] = 255
    tokens = make_tokens(6, HIDDEN, 2, 1, device)
    tokens.ids[:] = torch.tensor([0, 1, 0, 1, 1, 0], device=device)[:, None]
    got = call(way, run, config_of(kernel, block_m, gemm), experts, tokens)
    assert got.isnan().nonzero().tolist() == [[1, 37], [3, 37], [4, 37]]


@by_kernel
def test_other_tokens_in_the_same_memory_give_what_they_gave_alone(
    way: Way, kernel: Kernel, block_m: int, gemm: Gemm
) -> None:
    device = device_of(way)
    experts = make_experts(3, HIDDEN, inner_for(kernel), device)
    first, second = (make_tokens(count_for(kernel, block_m, 9), HIDDEN, 3, 2, device, seed) for seed in range(2))
    config = config_of(kernel, block_m, gemm)
    alone = call(way, run, config, experts, first)
    call(way, run, config, experts, second)
    assert torch.equal(call(way, run, config, experts, first), alone)


def whole_and_ranges(config: LaunchConfig, experts: Experts, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    packed = (tokens.x, experts.w13, experts.w13_scale, experts.w2, experts.w2_scale, tokens.ids, tokens.weights)
    options: dict[str, Any] = {"b13": experts.b13, "b2": experts.b2, "impl": "triton_kernel"}
    options["out_dtype"] = torch.float32
    with using(config):
        ranges = list(fused_moe_mxfp4_by_columns(*packed, **options, parts=2, spare=24))
        return fused_moe_mxfp4(*packed, **options), torch.cat(ranges, 1)


@in_ranges
def test_ranges_of_columns_are_those_of_the_whole_bit_by_bit(
    way: Way, kernel: Kernel, block_m: int, gemm: Gemm
) -> None:
    device = device_of(way)
    experts = make_experts(3, HIDDEN, inner_for(kernel), device, bias=True)
    tokens = make_tokens(count_for(kernel, block_m, 9), HIDDEN, 3, 2, device)
    whole, ranges = call(way, whole_and_ranges, config_of(kernel, block_m, gemm), experts, tokens)
    assert torch.equal(ranges, whole)


def test_memory_of_a_part_is_kept_for_its_stream_and_grows_twofold() -> None:
    cpu = torch.device("cpu")
    parts = {"a": ((3, 5), torch.int32), "b": ((7,), torch.bfloat16)}
    once, again, other = (workspace.carve(cpu, stream, parts) for stream in (-1, -1, -2))
    assert [t.data_ptr() for t in once.values()] == [t.data_ptr() for t in again.values()]
    assert once["a"].data_ptr() != other["a"].data_ptr()
    assert (once["a"].shape, once["b"].dtype) == ((3, 5), torch.bfloat16)
    grown = workspace.carve(cpu, -1, {"a": ((70,), torch.uint8)})["a"]
    assert grown.untyped_storage().nbytes() == 120, "twice the 60 of before"
    assert workspace.carve(cpu, -1, parts)["a"].data_ptr() == grown.data_ptr(), (
        "what is smaller takes the largest piece"
    )
    assert workspace.carve(cpu, -1, parts)["b"].data_ptr() == once["b"].data_ptr()


def test_counters_are_a_stream_s_own_and_zero_before_their_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(workspace, "_counters", {})
    monkeypatch.setattr(workspace, "_STREAMS", 2)
    first, second = workspace.counters(cpu, 5), workspace.counters(cpu, 6)
    assert first is not None
    assert second is not None
    assert not first.any()
    assert not second.any()
    first += 1
    again = workspace.counters(cpu, 5)
    assert again is not None
    assert again.data_ptr() == first.data_ptr()
    assert not second.any()
    assert workspace.counters(cpu, 7) is None, "there are two"


def test_counters_are_not_made_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "_counters", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert workspace.counters(torch.device("cuda", 0), 5) is None
    made = torch.zeros(workspace._STREAMS, 4, dtype=torch.int32)
    workspace._counters[torch.device("cuda", 0)] = (made, {})
    assert workspace.counters(torch.device("cuda", 0), 5) is not None, "those that there are can be captured"
