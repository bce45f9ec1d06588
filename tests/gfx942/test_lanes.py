"""What moves values between lanes, and what chooses parts of them: DPP, SDWA, permutes, lanes as scalars."""

import numpy as np
import pytest

from tests.gfx942.assembler import assemble
from tests.gfx942.assembly import parse_instruction
from tests.gfx942.dpp import _source_lanes
from tests.gfx942.snippet import execute, get
from tests.gfx942.statements import f32, f32_bits
from tests.gfx942.vector import _DPP
from tests.gfx942.waves import LANES

LANE = np.arange(LANES, dtype=np.uint64)
OLD = 1000

# Which lane each lane reads, None where there is none: written out by what AMD's ISA says of each control.
DPP: dict[str, list[int | None]] = {
    "quad_perm:[3,0,2,1]": [4 * (i // 4) + [3, 0, 2, 1][i % 4] for i in range(64)],
    "row_shl:3": [i + 3 if i % 16 < 13 else None for i in range(64)],
    "row_shr:3": [i - 3 if i % 16 >= 3 else None for i in range(64)],
    "row_ror:5": [16 * (i // 16) + (i % 16 - 5) % 16 for i in range(64)],
    "row_mirror": [16 * (i // 16) + 15 - i % 16 for i in range(64)],
    "row_half_mirror": [8 * (i // 8) + 7 - i % 8 for i in range(64)],
    "row_bcast:15": [16 * (i // 16) - 1 if i >= 16 else None for i in range(64)],
    "row_bcast:31": [31 if i >= 32 else None for i in range(64)],
    "row_newbcast:6": [16 * (i // 16) + 6 for i in range(64)],
}


@pytest.mark.parametrize("control", DPP)
@pytest.mark.parametrize("bound", ["", " bound_ctrl:1"], ids=["keep", "zero"])
def test_dpp_reads_the_lane_that_its_control_names(control: str, bound: str) -> None:
    text = f"v_mov_b32_dpp v2, v1 {control} row_mask:0xf bank_mask:0xf{bound}"
    assemble([text])
    inactive = 21
    registers = {"v1": 100 + LANE, "v2": OLD, "exec": (1 << 64) - 1 - (1 << inactive)}
    got = get(execute(text, registers), "v2")[0].tolist()
    missing = 0 if bound else OLD
    for lane, source in enumerate(DPP[control]):
        expected = missing if source is None or source == inactive else 100 + source
        assert got[lane] == (OLD if lane == inactive else expected), f"{text}: lane {lane}"


def test_dpp_masks_leave_out_rows_and_banks() -> None:
    text = "v_mov_b32_dpp v2, v1 quad_perm:[0,1,2,3] row_mask:0xa bank_mask:0x3"
    assemble([text])
    got = get(execute(text, {"v1": 100 + LANE, "v2": OLD}), "v2")[0].tolist()
    for lane in range(LANES):
        written = lane // 16 in (1, 3) and lane % 16 // 4 in (0, 1)
        assert got[lane] == (100 + lane if written else OLD)


def test_dpp_moves_the_first_source_of_an_operation() -> None:
    text = "v_sub_f32_dpp v3, v1, v2 row_shr:1 row_mask:0xf bank_mask:0xf bound_ctrl:1"
    assemble([text])
    one, two = (np.array([f32_bits(float(k * i)) for i in range(LANES)], np.uint64) for k in (1, 10))
    got = get(execute(text, {"v1": one, "v2": two}), "v3")[0].tolist()
    for lane in range(LANES):
        moved = float(lane - 1) if lane % 16 else 0.0
        assert f32(int(got[lane])) == moved - 10.0 * lane


def test_every_dpp_control_is_tested() -> None:
    assert {c.split(":")[0] for c in DPP} == set(_DPP) - {"row_mask", "bank_mask", "bound_ctrl"}
    source = parse_instruction("v_mov_b32_dpp v0, v1 row_share:1").modifiers
    with pytest.raises(Exception, match="row_share"):
        _source_lanes(source)


WORD = 0x89ABCDEF
PARTS = {
    "BYTE_0": 0xEF,
    "BYTE_1": 0xCD,
    "BYTE_2": 0xAB,
    "BYTE_3": 0x89,
    "WORD_0": 0xCDEF,
    "WORD_1": 0x89AB,
    "DWORD": WORD,
}
WHERE = {
    "BYTE_0": (0, 8),
    "BYTE_1": (8, 8),
    "BYTE_2": (16, 8),
    "BYTE_3": (24, 8),
    "WORD_0": (0, 16),
    "WORD_1": (16, 16),
}


@pytest.mark.parametrize("part", PARTS)
def test_sdwa_selects_a_part_of_each_source(part: str) -> None:
    text = f"v_or_b32_sdwa v2, v0, v1 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:{part} src1_sel:DWORD"
    swapped = f"v_or_b32_sdwa v3, v1, v0 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:DWORD src1_sel:{part}"
    assemble([text, swapped])
    state = execute(f"{text}\n{swapped}", {"v0": WORD, "v1": 0x10000000})
    assert set(get(state, "v2").ravel()) == set(get(state, "v3").ravel()) == {PARTS[part] | 0x10000000}


@pytest.mark.parametrize("part", ["BYTE_1", "BYTE_3", "WORD_1"])
def test_sdwa_extends_the_sign_where_asked(part: str) -> None:
    text = f"v_add_u32_sdwa v2, sext(v0), v1 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:{part} src1_sel:DWORD"
    assemble([text])
    width = WHERE[part][1]
    state = execute(text, {"v0": WORD, "v1": 1})
    assert set(get(state, "v2").ravel()) == {(PARTS[part] - (1 << width) + 1) % 2**32}


@pytest.mark.parametrize("part", WHERE)
@pytest.mark.parametrize("unused", ["UNUSED_PAD", "UNUSED_PRESERVE"])
def test_sdwa_writes_a_part_of_the_destination(part: str, unused: str) -> None:
    text = f"v_lshlrev_b32_sdwa v2, v0, v1 dst_sel:{part} dst_unused:{unused} src0_sel:DWORD src1_sel:DWORD"
    assemble([text])
    first, width = WHERE[part]
    field = ((1 << width) - 1) << first
    kept = 0x55555555 & ~field if unused == "UNUSED_PRESERVE" else 0
    state = execute(text, {"v0": 1, "v1": 0x12345678, "v2": 0x55555555})
    assert set(get(state, "v2").ravel()) == {(0x2468ACF0 << first) & field | kept}


def test_a_comparison_with_sdwa_compares_the_parts() -> None:
    text = "v_cmp_eq_u16_sdwa s[8:9], v0, v1 src0_sel:BYTE_1 src1_sel:WORD_0"
    assemble([text])
    state = execute(text, {"v0": LANE << np.uint64(8) | np.uint64(0xFF0000), "v1": 7})
    assert get(state, "s[8:9]").tolist() == [1 << 7]


def test_a_comparison_sets_only_active_lanes_and_clears_the_others() -> None:
    state = execute(
        "v_cmp_gt_u32_e64 s[8:9], 40, v0", {"v0": LANE, "exec": 0xFFFFFFFFFFFF0000, "s[8:9]": (1 << 64) - 1}
    )
    assert get(state, "s[8:9]").tolist() == [((1 << 40) - 1) & 0xFFFFFFFFFFFF0000]


def test_inactive_lanes_of_a_vector_register_are_kept() -> None:
    got = get(execute("v_mov_b32_e32 v0, 7", {"v0": LANE, "exec": 0xF}), "v0")[0].tolist()
    assert got == [7, 7, 7, 7, *range(4, 64)]


def test_readfirstlane_reads_the_first_active_lane_or_lane_0() -> None:
    text = "v_readfirstlane_b32 s8, v0"
    assert get(execute(text, {"v0": LANE + np.uint64(5), "exec": 0xF0}), "s8").tolist() == [9]
    assert get(execute(text, {"v0": LANE + np.uint64(5), "exec": 0}), "s8").tolist() == [5]


def test_readlane_and_writelane_ignore_exec() -> None:
    text = "v_readlane_b32 s8, v0, s4\nv_writelane_b32 v1, s8, 63"
    assemble(text.split("\n"))
    state = execute(text, {"v0": LANE + np.uint64(5), "v1": 0, "s4": 64 + 37, "exec": 1})
    assert get(state, "s8").tolist() == [42]  # the lane is taken modulo 64
    assert get(state, "v1")[0].tolist() == [0] * 63 + [42]


def test_bpermute_pulls_and_permute_pushes() -> None:
    pull, push = "ds_bpermute_b32 v2, v0, v1 offset:8", "ds_permute_b32 v3, v0, v1"
    assemble([pull, push])
    source = (LANE * np.uint64(7)) % np.uint64(64)
    state = execute(f"{pull}\n{push}", {"v0": source * np.uint64(4), "v1": 100 + LANE})
    assert get(state, "v2")[0].tolist() == [100 + (7 * i + 2) % 64 for i in range(64)]
    assert get(state, "v3")[0].tolist() == [100 + i * 55 % 64 for i in range(64)]  # 7 · 55 = 1 mod 64


def test_a_permute_gives_zero_for_what_no_active_lane_holds() -> None:
    text = "ds_bpermute_b32 v2, v0, v1\nds_permute_b32 v3, v0, v1"
    state = execute(text, {"v0": (63 - LANE) * np.uint64(4), "v1": 100 + LANE, "exec": 3, "v2": OLD, "v3": OLD})
    assert get(state, "v2")[0, :3].tolist() == [0, 0, OLD]
    assert get(state, "v3")[0, :3].tolist() == [0, 0, OLD]


SWIZZLES: dict[str, list[int]] = {
    "swizzle(SWAP,16)": [i ^ 16 for i in range(64)],
    "swizzle(REVERSE,8)": [8 * (i // 8) + 7 - i % 8 for i in range(64)],
    "swizzle(BROADCAST,16,5)": [16 * (i // 16) + 5 for i in range(64)],
    "swizzle(QUAD_PERM,1,0,3,2)": [i ^ 1 for i in range(64)],
    'swizzle(BITMASK_PERM,"01pip")': [32 * (i // 32) + 8 + (i & 4) + (2 - (i & 2)) + (i & 1) for i in range(64)],
}


@pytest.mark.parametrize("pattern", SWIZZLES)
def test_swizzle_follows_its_pattern(pattern: str) -> None:
    text = f"ds_swizzle_b32 v2, v1 offset:{pattern}"
    assemble([text])
    got = get(execute(text, {"v1": 100 + LANE}), "v2")[0].tolist()
    assert got == [100 + source for source in SWIZZLES[pattern]]


def test_a_division_is_correctly_rounded_and_has_the_special_cases() -> None:
    """The sequence that LLVM emits for a/b."""
    rng = np.random.default_rng(0)
    ordinary = rng.uniform(-100, 100, 40)
    special = [0.0, -0.0, 1.0, -3.0, np.inf, -np.inf, np.nan, 1e-40, -1e-38, 3e38, 1e30, 2.0**-149]
    a = np.array([*ordinary, *special, *special], np.float32)
    b = np.array([*ordinary[::-1], *special, *special[5:], *special[:5]], np.float32)
    text = """
        v_div_scale_f32 v4, s[2:3], v1, v1, v0
        v_rcp_f32_e32 v5, v4
        v_div_scale_f32 v6, vcc, v0, v1, v0
        v_fma_f32 v7, -v4, v5, 1.0
        v_fmac_f32_e32 v5, v7, v5
        v_mul_f32_e32 v7, v6, v5
        v_fma_f32 v8, -v4, v7, v6
        v_fmac_f32_e32 v7, v8, v5
        v_fma_f32 v4, -v4, v7, v6
        v_div_fmas_f32 v4, v4, v5, v7
        v_div_fixup_f32 v2, v4, v1, v0
    """
    state = execute(text, {"v0": a.view(np.uint32), "v1": b.view(np.uint32)})
    with np.errstate(all="ignore"):
        expected = (a.astype(np.float64) / b).astype(np.float32)
    np.testing.assert_array_equal(get(state, "v2")[0].astype(np.uint32).view(np.float32), expected)
