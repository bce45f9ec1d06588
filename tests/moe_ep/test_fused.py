"""`fused_moe_mxfp4`: both implementations against the formulas, and the traps of mxfp4 with EP."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_ep import fused_moe_mxfp4
from moe_ep.fused import fused_moe_mxfp4_by_columns
from moe_ep.order import to_kernel_order
from moe_ep.placement import Placement
from moe_ep.spec import ActivationDtype
from moe_ep.weights import Order
from tests.moe_ep.experts import by_formula, make_experts, make_tokens, partial, relative_error
from tests.moe_ep.ways import Way, call, every_way, impl_of

TOLERANCE = 4e-3  # one rounding to bf16 between the two GEMMs

pytestmark = every_way


@pytest.mark.parametrize("tokens", [1, 5, 33])
@pytest.mark.parametrize(
    ("hidden", "inner", "top_k"), [(64, 32, 6), (160, 96, 1), (256, 64, 5)], ids=["even", "odd tiles", "k=5"]
)
def test_one_rank_computes_the_formula(
    way: Way, tokens: int, hidden: int, inner: int, top_k: int, device: torch.device
) -> None:
    experts = make_experts(8, hidden, inner, device)
    batch = make_tokens(tokens, hidden, 8, top_k, device)
    assert relative_error(partial(experts, batch, way), by_formula(experts, batch)) < TOLERANCE


@pytest.mark.parametrize("ep_size", [2, 3, 4])
def test_partials_add_up_to_the_whole_and_each_is_its_experts_share(
    way: Way, ep_size: int, device: torch.device
) -> None:
    experts = make_experts(10, 64, 64, device, bias=True)  # 10 over 3 and 4 ranks: uneven
    batch = make_tokens(9, 64, 10, 6, device)
    placement = Placement(10, ep_size)
    partials = [partial(experts, batch, way, ep_rank=r, ep_size=ep_size) for r in range(ep_size)]
    for rank, got in enumerate(partials):
        assert relative_error(got, by_formula(experts, batch, only=placement.experts(rank))) < TOLERANCE
    assert relative_error(torch.stack(partials).sum(0), by_formula(experts, batch)) < TOLERANCE


def test_many_routes_to_one_expert_fill_several_blocks(way: Way, device: torch.device) -> None:
    experts = make_experts(4, 64, 32, device)
    batch = make_tokens(70, 64, 4, 2, device)
    batch = replace(batch, ids=torch.full_like(batch.ids, 3) - torch.tensor([0, 1], device=device).int())
    assert relative_error(partial(experts, batch, way), by_formula(experts, batch)) < TOLERANCE


def test_no_tokens_give_an_empty_partial(way: Way, device: torch.device) -> None:
    experts = make_experts(4, 64, 32, device)
    assert partial(experts, make_tokens(0, 64, 4, 3, device), way).shape == (0, 64)


def test_a_rank_that_no_token_hits_gives_zeros(way: Way, device: torch.device) -> None:
    experts = make_experts(4, 64, 32, device)
    batch = make_tokens(5, 64, 2, 2, device)  # experts 0 and 1 only
    assert not partial(experts, batch, way, ep_rank=1, ep_size=2).any()


def test_padding_ids_are_dropped_and_do_not_wrap_to_the_last_expert(way: Way, device: torch.device) -> None:
    experts = make_experts(4, 64, 32, device)
    batch = make_tokens(5, 64, 4, 3, device)
    batch.ids[1] = -1
    batch.ids[3, 2] = -1
    got = partial(experts, batch, way, ep_rank=1, ep_size=2)  # this rank holds the last expert
    assert relative_error(got, by_formula(experts, batch, only=range(2, 4))) < TOLERANCE
    assert not got[1].any()


def test_remote_routes_are_skipped_not_computed_with_weight_zero(way: Way, device: torch.device) -> None:
    experts = make_experts(4, 64, 32, device)
    experts.w13_scale[2] = 255  # local row 0 of rank 1 is NaN: 0 × NaN would leak
    batch = make_tokens(6, 64, 2, 2, device)
    assert torch.equal(partial(experts, batch, way, ep_rank=1, ep_size=2), torch.zeros(6, 64, device=device))


def test_a_nan_scale_stays_nan_for_the_tokens_that_hit_it_and_no_other(way: Way, device: torch.device) -> None:
    experts = make_experts(4, 64, 32, device)
    experts.w13_scale[0, 3, 1] = 255
    batch = make_tokens(4, 64, 4, 1, device)
    batch.ids[:, 0] = torch.tensor([0, 1, 2, 0])
    assert partial(experts, batch, way).isnan().any(-1).tolist() == [True, False, False, True]


def test_the_smallest_scale_is_a_denormal_or_where_it_says_so_flushed(way: Way, device: torch.device) -> None:
    experts = make_experts(1, 64, 32, device)
    experts.w2_scale.fill_(0)
    batch = make_tokens(2, 64, 1, 1, device)
    batch = replace(batch, weights=torch.full_like(batch.weights, 2.0**100))
    got, expected = partial(experts, batch, way), by_formula(experts, batch)
    if way == "cuda":  # the documented flush: see kernels.decode
        assert torch.equal(got, torch.zeros_like(got))
        return
    assert got.any()
    assert relative_error(got * 2.0**20, expected * 2.0**20) < TOLERANCE


def test_a_negative_zero_is_a_zero(way: Way, device: torch.device) -> None:
    experts = make_experts(2, 64, 32, device)
    batch = make_tokens(5, 64, 2, 2, device)
    zeros = []
    for nibble in (0x0, 0x8):  # in fnuz formats the bits of −0 are NaN
        low = torch.where(experts.w13 & 0x7 < 4, experts.w13 & 0xF0 | nibble, experts.w13)
        high = torch.where(experts.w2 & 0x70 < 0x40, experts.w2 & 0xF | nibble << 4, experts.w2)
        zeros.append(replace(experts, w13=low, w2=high))
    positive, negative = (partial(e, batch, way) for e in zeros)
    assert torch.equal(positive, negative)
    assert relative_error(positive, by_formula(zeros[0], batch)) < TOLERANCE


def test_the_clamp_is_asymmetric_and_comes_before_rounding(way: Way, device: torch.device) -> None:
    experts = make_experts(3, 64, 32, device)
    batch = make_tokens(8, 64, 3, 2, device)
    clamped = by_formula(experts, batch, limit=0.5)
    assert relative_error(clamped, by_formula(experts, batch, limit=None)) > 0.1, "the limit must bite here"
    assert relative_error(partial(experts, batch, way, limit=0.5), clamped) < TOLERANCE
    assert relative_error(partial(experts, batch, way, limit=None), by_formula(experts, batch, limit=None)) < TOLERANCE


def test_gate_rows_come_before_up_rows(way: Way, device: torch.device) -> None:
    experts = make_experts(1, 64, 32, device)
    experts.w13[:, 32:] = 0  # w3 = 0: up is 0, so nothing comes out; with w1 = 0, silu(0) = 0 neither
    batch = make_tokens(3, 64, 1, 1, device)
    assert not partial(experts, batch, way).any()
    biased = replace(experts, b13=torch.zeros(1, 64, device=device), b2=torch.zeros(1, 64, device=device))
    assert biased.b13 is not None
    biased.b13[:, 32:] = 1  # u = 1: silu(g) alone
    assert relative_error(partial(biased, batch, way), by_formula(biased, batch)) < TOLERANCE


def test_the_down_bias_counts_once_per_route_times_its_weight(way: Way, device: torch.device) -> None:
    experts = make_experts(4, 64, 32, device, bias=True)
    experts.w2.zero_()
    assert experts.b2 is not None
    batch = make_tokens(3, 64, 4, 2, device)
    expected = (batch.weights.unsqueeze(-1) * experts.b2[batch.ids.long()]).sum(1)
    torch.testing.assert_close(partial(experts, batch, way), expected)


def test_equal_inputs_give_equal_bits(way: Way, device: torch.device) -> None:
    experts = make_experts(6, 64, 64, device)
    batch = make_tokens(40, 64, 6, 6, device)
    assert torch.equal(partial(experts, batch, way), partial(experts, batch, way))


def by_columns(*args: Any, **options: Any) -> list[torch.Tensor]:
    return list(fused_moe_mxfp4_by_columns(*args, **options))


@pytest.mark.parametrize("activations", ["bf16", "fp8"])
@pytest.mark.parametrize("hidden", [256, 160])
@pytest.mark.parametrize("tokens", [0, 33])
def test_ranges_of_columns_are_those_of_the_whole_bit_by_bit(
    way: Way, tokens: int, hidden: int, activations: ActivationDtype, device: torch.device
) -> None:
    """Of 160 features a quarter is no multiple of 16 rows, which kernels do not cut. NumPy, with which the interpreter
    multiplies, rounds a row by its place in the tile."""
    experts = make_experts(8, hidden, 128, device, bias=True).rows(range(4))
    batch = make_tokens(tokens, hidden, 8, 3, device)
    packed = (batch.x, experts.w13, experts.w13_scale, experts.w2, experts.w2_scale, batch.ids, batch.weights)
    expert_map = torch.tensor([0, 1, 2, 3, -1, -1, -1, -1], dtype=torch.int32, device=device)
    options: dict[str, Any] = {"b13": experts.b13, "b2": experts.b2, "expert_map": expert_map}
    options |= {"activation_dtype": activations, "impl": impl_of(way), "out_dtype": torch.float32}
    whole = call(way, fused_moe_mxfp4, *packed, **options)
    for parts in (1, 2, 4):
        ranges = call(way, by_columns, *packed, **options, parts=parts, spare=24)
        assert [part.shape for part in ranges] == [(tokens, hidden // parts)] * parts
        assert all(part.is_contiguous() for part in ranges), "they go to collectives"
        together = torch.cat(ranges, 1)
        assert torch.equal(together, whole) or (way == "interpreter" and relative_error(together, whole) < 1e-6)


def test_ranges_that_do_not_divide_the_hidden_size_are_refused(way: Way, device: torch.device) -> None:
    experts, batch = make_experts(4, 64, 32, device), make_tokens(2, 64, 4, 2, device)
    packed = (batch.x, experts.w13, experts.w13_scale, experts.w2, experts.w2_scale, batch.ids, batch.weights)
    with pytest.raises(ValueError, match="parts is 3, expected a divisor of H = 64"):
        call(way, by_columns, *packed, parts=3, impl=impl_of(way))


def test_scales_may_come_as_e8m0_or_as_bytes(way: Way, device: torch.device) -> None:
    experts = make_experts(4, 64, 32, device)
    typed = replace(
        experts,
        w13_scale=experts.w13_scale.view(torch.float8_e8m0fnu),
        w2_scale=experts.w2_scale.view(torch.float8_e8m0fnu),
    )
    batch = make_tokens(3, 64, 4, 2, device)
    assert torch.equal(partial(experts, batch, way), partial(typed, batch, way))


def test_without_a_map_the_ids_are_local_rows(way: Way, device: torch.device) -> None:
    experts = make_experts(4, 64, 32, device)
    batch = make_tokens(3, 64, 4, 2, device)
    got = call(
        way,
        fused_moe_mxfp4,
        batch.x,
        experts.w13,
        experts.w13_scale,
        experts.w2,
        experts.w2_scale,
        batch.ids,
        batch.weights,
        impl=impl_of(way),
    )
    assert got.dtype == torch.bfloat16, "the partial has the type of the hidden states unless asked otherwise"
    assert relative_error(got, by_formula(experts, batch)) < 1e-2


def test_an_expert_past_two_gigabytes_of_weights_is_found(way: Way, device: torch.device) -> None:
    if way == "interpreter":
        pytest.skip("its process would get a copy of 2 GB")
    # Row offsets pass 2^31 bytes. The pages of the other experts are never touched.
    hidden, inner, last = 8192, 1024, 259
    one = make_experts(1, hidden, inner, device)
    batch = make_tokens(1, hidden, 1, 1, device)
    expected = by_formula(one, batch)
    order: Order = "checkpoint" if way == "reference" else "kernel"
    if order == "kernel":  # else a copy in that order would be made, of all
        w13, w13_scale = to_kernel_order(one.w13, one.w13_scale)
        w2, w2_scale = to_kernel_order(one.w2, one.w2_scale)
        one = replace(one, w13=w13, w13_scale=w13_scale, w2=w2, w2_scale=w2_scale)
    stack = {
        name: torch.empty(last + 1, *t.shape[1:], dtype=t.dtype, device=device)
        for name, t in vars(one).items()
        if t is not None
    }
    assert stack["w13"][last].data_ptr() - stack["w13"].data_ptr() > 2**31
    for name, tensor in stack.items():
        tensor[last] = getattr(one, name)[0]
    got = call(
        way,
        fused_moe_mxfp4,
        batch.x,
        stack["w13"],
        stack["w13_scale"],
        stack["w2"],
        stack["w2_scale"],
        torch.full_like(batch.ids, last),
        batch.weights,
        weight_order=order,
        impl=impl_of(way),
        out_dtype=torch.float32,
    )
    assert relative_error(got, expected) < TOLERANCE


def test_a_mask_in_place_of_a_map_is_refused(way: Way, device: torch.device) -> None:
    experts = make_experts(4, 64, 32, device)
    batch = make_tokens(3, 64, 4, 2, device)
    # The map may stay on the CPU, where a 0/1 mask of integers can be told too.
    masks = [[False, False, True, True], [0, 0, 1, 1], [0, 1, 2, 99], [0, -5, 1, 2], []]
    for mask in (torch.tensor(values) for values in masks):
        with pytest.raises(ValueError, match=r"expert_map is .* -1 where it is not local"):
            partial(experts, batch, way, expert_map=mask)


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), float("inf")])
def test_a_limit_that_is_none_is_refused(way: Way, limit: float, device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"swiglu_limit is .* expected a finite number above 0, or None"):
        partial(make_experts(4, 64, 32, device), make_tokens(3, 64, 4, 2, device), way, limit=limit)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w13_scale": torch.zeros(4, 64, 3, dtype=torch.uint8)}, r"w13_scale has shape \[4, 64, 3\], expected"),
        ({"w2": torch.zeros(4, 64, 16, dtype=torch.int8)}, "packed weights are torch.int8"),
        ({"w2_scale": torch.zeros(4, 64, 1)}, "scales are torch.float32"),
        ({"b2": torch.zeros(4, 63)}, "b2 has shape"),
    ],
    ids=["scale shape", "weight dtype", "scale dtype", "bias shape"],
)
def test_what_does_not_fit_is_named(
    way: Way, change: dict[str, torch.Tensor], message: str, device: torch.device
) -> None:
    experts = replace(make_experts(4, 64, 32, device), **{name: t.to(device) for name, t in change.items()})
    with pytest.raises((ValueError, TypeError), match=message):
        partial(experts, make_tokens(3, 64, 4, 2, device), way)
