"""gluon_kernel in the emulated gfx942: sums over ranks at every configuration of its table, routes, XCDs, refusals."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from moe_ep import fused_moe_mxfp4, tables
from moe_ep.backends import gluon_kernel
from moe_ep.backends.call import Shape, config_of, launch_config
from moe_ep.backends.target import Target
from moe_ep.bench.cases import Batch, Weights
from moe_ep.bench.exact import exact
from moe_ep.fused import fused_moe_mxfp4_by_columns
from moe_ep.kernels.launch import LaunchConfig
from moe_ep.placement import Placement
from moe_ep.spec import ActivationDtype
from tests.gfx942.driver import Chip, emulated
from tests.gfx942.kernels import tile_order
from tests.moe_ep.experts import Experts, Tokens, make_experts, make_tokens, relative_error

CPU = torch.device("cpu")
HIDDEN, INNER, EXPERTS, TOP_K = 256, 128, 24, 2
TOKENS = {"route": 1, "few": 16, "many": 168}
"""By these a route has 0.08, 1.3 and 14 routes an expert: a regime of the table each."""


@pytest.fixture(scope="module")
def experts() -> Experts:
    return make_experts(EXPERTS, HIDDEN, INNER, CPU)


def partial(experts: Experts, tokens: Tokens, rank: int, ranks: int, activations: ActivationDtype = "bf16") -> Tensor:
    placement = Placement(EXPERTS, ranks)
    held = experts.rows(placement.experts(rank))
    return fused_moe_mxfp4(
        *(tokens.x, held.w13, held.w13_scale, held.w2, held.w2_scale, tokens.ids, tokens.weights),
        expert_map=torch.tensor(placement.expert_map(rank), dtype=torch.int32),
        activation_dtype=activations,
        impl="gluon_kernel",
        out_dtype=torch.float32,
    )


def kernels(chip: Chip) -> set[str]:
    return {launch.program.name for launch in chip.launches if "_" in launch.program.name}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("regime", TOKENS)
def test_partials_of_all_ranks_add_up_to_the_layer_in_f64_at_every_regime_of_the_table(
    experts: Experts, regime: str, ranks: int
) -> None:
    tokens = make_tokens(TOKENS[regime], HIDDEN, EXPERTS, TOP_K, CPU)
    with emulated() as chip:
        total = sum(partial(experts, tokens, rank, ranks) for rank in range(ranks))
    assert isinstance(total, Tensor)
    assert relative_error(total, f64(experts, tokens)) < 5e-3
    gemm = "gate_up_route" if regime == "route" else "gate_up_cdna3"
    assert gemm in kernels(chip)
    if regime != "route":
        made = {launch.constants["BLOCK_M"] for launch in chip.launches if launch.program.name == gemm}
        assert made == ({16} if regime == "few" else {32})


@pytest.mark.parametrize(
    ("regime", "ranks"), [*((regime, ranks) for regime in ("route", "few") for ranks in (1, 2, 4)), ("many", 2)]
)
def test_fp8_partials_add_up_to_deepseek_s_own_arithmetic(experts: Experts, regime: str, ranks: int) -> None:
    tokens = make_tokens(TOKENS[regime], HIDDEN, EXPERTS, TOP_K, CPU)
    with emulated() as chip:
        total = sum(partial(experts, tokens, rank, ranks, "fp8") for rank in range(ranks))
    assert isinstance(total, Tensor)
    assert relative_error(total, f64(experts, tokens, "fp8")) < 2e-3
    kernel = "route" if regime == "route" else "stream"
    assert {f"gate_up_{kernel}_fp8", f"down_{kernel}_fp8"} <= kernels(chip)


def f64(experts: Experts, tokens: Tokens, activations: ActivationDtype = "bf16") -> Tensor:
    identity = torch.arange(EXPERTS, dtype=torch.int32)
    weights = Weights(experts.w13, experts.w13_scale, experts.w2, experts.w2_scale, identity)
    return exact(weights, Batch(tokens.x, tokens.ids, tokens.weights), activations)


def test_the_table_has_the_regimes_that_are_tested() -> None:
    table = tables.find(tables.GLUON_TABLE)
    assert table is not None
    tested = [TOKENS[regime] * TOP_K / EXPERTS for regime in TOKENS]
    for regimes in (table.regimes, table.fp8[:3]):  # blocks of 64 with fp8 are what test_fp8_experts has
        assert [sum(rows > regime.rows for regime in regimes) for rows in tested] == list(range(len(regimes)))


ROUTE = {
    "bf16": ["gate_up_route", "down_route"],
    "fp8": ["quantise_tokens", "gate_up_route_fp8", "quantise_local", "down_route_fp8"],
}
by_activations = pytest.mark.parametrize("activations", get_args(ActivationDtype))


@by_activations
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_route_that_is_remote_padding_or_unknown_is_passed_over(
    experts: Experts, dtype: torch.dtype, activations: ActivationDtype
) -> None:
    tokens = make_tokens(1, HIDDEN, EXPERTS, TOP_K, CPU)
    for ids, remote in (([3, 20], True), ([-1, 3], False), ([3, 2**31 - 1], False)):
        mixed = replace(tokens, ids=torch.tensor([ids], dtype=dtype))
        alone = replace(tokens, ids=torch.tensor([[i if i == 3 else -1 for i in ids]], dtype=dtype))
        with emulated() as chip:
            got = partial(experts, mixed, 0, 2 if remote else 1, activations)
        assert [launch.program.name for launch in chip.launches] == ROUTE[activations]
        assert relative_error(got, f64(experts, alone_in_f64(alone), activations)) < 5e-3


def alone_in_f64(tokens: Tokens) -> Tokens:
    """With padding as routes of weight 0."""
    return replace(tokens, ids=tokens.ids.clamp(min=0), weights=tokens.weights * (tokens.ids >= 0))


@by_activations
def test_a_token_without_a_local_route_is_zero_and_reads_no_weight(
    experts: Experts, activations: ActivationDtype
) -> None:
    tokens = replace(make_tokens(1, HIDDEN, EXPERTS, TOP_K, CPU), ids=torch.tensor([[20, 21]], dtype=torch.int32))
    with emulated() as chip:
        got = partial(experts, tokens, 0, 2, activations)
    assert torch.equal(got, torch.zeros(1, HIDDEN))
    assert [launch.program.name for launch in chip.launches] == ROUTE[activations]
    for launch in chip.launches[1 if activations == "fp8" else 0 :]:  # x is rounded for all
        assert launch.execution is not None
        assert not {"w13_ptr", "w2_ptr", "scale_ptr", "h_ptr"} & launch.execution.widths.keys()
        assert not any(opcode.startswith("v_mfma") for opcode in launch.execution.executed)


@by_activations
def test_ranges_of_columns_of_a_route_direct_op_are_cut_from_the_whole(
    experts: Experts, activations: ActivationDtype
) -> None:
    tokens = make_tokens(1, HIDDEN, EXPERTS, TOP_K, CPU)
    packed = (experts.w13, experts.w13_scale, experts.w2, experts.w2_scale, tokens.ids, tokens.weights)
    with emulated() as chip:
        ranges = list(
            fused_moe_mxfp4_by_columns(
                *(tokens.x, *packed),
                activation_dtype=activations,
                impl="gluon_kernel",
                out_dtype=torch.float32,
                parts=2,
                spare=0,
            )
        )
        assert [launch.program.name for launch in chip.launches] == ROUTE[activations]
        whole = fused_moe_mxfp4(
            *(tokens.x, *packed), activation_dtype=activations, impl="gluon_kernel", out_dtype=torch.float32
        )
    assert torch.equal(torch.cat(ranges, 1), whole)


@pytest.mark.parametrize("xcds", [1, 6, 8])
def test_all_blocks_that_read_a_tile_of_weights_are_on_one_xcd(xcds: int) -> None:
    tiles, blocks = 14, 3
    padded = -(-tiles // xcds) * xcds
    found = torch.full((2, blocks * padded), -1, dtype=torch.int32)
    with emulated():
        tile_order[(blocks * padded,)](found[0], found[1], tiles, xcds)
    programs = [(b, t, p % xcds) for p, (b, t) in enumerate(found.T.tolist()) if t < tiles]
    assert sorted((b, t) for b, t, _ in programs) == [(b, t) for b in range(blocks) for t in range(tiles)]
    assert len({(t, xcd) for _, t, xcd in programs}) == tiles


@pytest.mark.parametrize(("units", "xcds"), [(228, 6), (304, 8), (38, 1), (110, 2)])
def test_the_xcds_are_told_from_the_compute_units(units: int, xcds: int) -> None:
    assert Target("hip", "gfx942", 64, units).xcds == xcds
    assert Target("hip", "gfx90a", 64, units).xcds == 1


def test_elsewhere_it_is_an_error_with_a_reason_and_nothing_is_compiled(
    experts: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = make_tokens(2, HIDDEN, EXPERTS, TOP_K, CPU)
    with pytest.raises(ValueError, match=r"impl 'gluon_kernel': its kernels are CDNA3's, .* no gfx942 .* on cpu"):
        partial(experts, tokens, 0, 1)
    for target in (Target("cuda", "sm90", 32), Target("hip", "gfx950", 64)):
        with emulated() as chip, monkeypatch.context() as patch:
            patch.setattr(gluon_kernel, "current_target", lambda target=target: target)
            with pytest.raises(
                ValueError, match=rf"impl 'gluon_kernel': .* for gfx942 alone, and this is {target.arch}"
            ):
                partial(experts, tokens, 0, 1)
        assert chip.launches == []


def test_sizes_that_lanes_do_not_divide_are_an_error_and_auto_takes_triton() -> None:
    small, tokens = make_experts(2, 128, 64, CPU), make_tokens(2, 128, 2, 1, CPU)
    arguments = (tokens.x, small.w13, small.w13_scale, small.w2, small.w2_scale, tokens.ids, tokens.weights)
    with emulated() as chip:
        with pytest.raises(ValueError, match="intermediate_size over tp_size is 64, not a multiple of 128"):
            fused_moe_mxfp4(*arguments, impl="gluon_kernel")
        fused_moe_mxfp4(*arguments)
    assert not {"gate_up_cdna3", "gate_up_route"} & kernels(chip)


def test_tokens_beyond_what_a_buffer_load_reaches_are_left_to_triton() -> None:
    target = Target("hip", "gfx942", 64, 228)
    few, many = (_config_for(tokens, target) for tokens in (8192, 2**31 // 2 // 7168 + 1))
    assert few.kernel == "cdna3"
    assert many.kernel == "tile"
    assert launch_config(8192, 6, 384, 7168, 3072, target, impl="gluon_kernel") == few


def _config_for(tokens: int, target: Target) -> LaunchConfig:
    shape = Shape(
        tokens=tokens, hidden=7168, inner=3072, top_k=6, local=48, known=384, mapped=True, biased=(False, False),
        limited=True, dtypes=(torch.int32, torch.int32, torch.bfloat16), aligned=(True,) * 11, device=CPU, stream=0,
        target=target, tables=None, override=None, impl="gluon_kernel",
    )  # fmt: skip
    return config_of(shape)
