"""Programs: control flow, waves that part and meet, barriers, grids, and the faults that end a launch."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.gfx942 import scalar
from tests.gfx942.assembler import assemble
from tests.gfx942.assembly import parse, parse_fragment, parse_instruction
from tests.gfx942.faults import DivergentBarrier, Fault, OutOfBounds, Runaway, UnknownOpcode
from tests.gfx942.machine import Grid, Machine
from tests.gfx942.memory import Memory
from tests.gfx942.snippet import buffer, execute, get
from tests.gfx942.waves import LANES, Waves

LANE = np.arange(LANES, dtype=np.uint64)


def test_an_instruction_is_parsed_into_operands_and_modifiers() -> None:
    got = parse_instruction("v_fma_f32 v[0:1], -|v2|, neg(s[4:5]), 0x3f000000 op_sel_hi:[1,0] clamp")
    assert got.operands == ("v[0:1]", "-|v2|", "neg(s[4:5])", "0x3f000000")
    assert got.modifiers == {"op_sel_hi": "[1,0]", "clamp": ""}
    got = parse_instruction('ds_swizzle_b32 v4, v5 offset:swizzle(BITMASK_PERM,"00p11")')
    assert got.operands == ("v4", "v5")
    assert got.modifiers == {"offset": 'swizzle(BITMASK_PERM,"00p11")'}


def test_a_fragment_has_labels_and_no_comments() -> None:
    program = parse_fragment("s_nop 0 ; comment\n.Lend:\n  s_endpgm // comment")
    assert [i.text for i in program.instructions] == ["s_nop 0", "s_endpgm"]
    assert program.labels == {".Lend": 1}


def test_a_text_without_a_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no \.amdhsa_kernel"):
        parse("s_endpgm")


LOOP = """
    s_mov_b32 s4, 0
    .Lloop:
    v_add_u32_e32 v1, v1, v0
    s_add_u32 s4, s4, 1
    s_cmp_lt_u32 s4, s5
    s_cbranch_scc1 .Lloop
"""


def test_a_loop_runs_as_often_as_each_wave_says() -> None:
    state = execute(LOOP, {"v0": LANE, "v1": 0, "s5": np.array([1, 7, 3, 5])}, groups=4)
    for group, turns in enumerate([1, 7, 3, 5]):
        assert get(state, "v1")[group].tolist() == (LANE * np.uint64(turns)).tolist()


def test_executed_instructions_are_counted_by_wave() -> None:
    machine = Machine(parse_fragment(LOOP + "\ns_endpgm"))

    def prepare(waves: Waves) -> None:
        waves.scalar[5] = [1, 7, 3]
        waves.vector[:2] = 0

    execution = machine.run(Grid(3), Memory(), prepare=prepare)
    assert execution.executed == Counter(
        s_mov_b32=3, v_add_u32_e32=11, s_add_u32=11, s_cmp_lt_u32=11, s_cbranch_scc1=11, s_endpgm=3
    )


@pytest.mark.parametrize(
    ("branch", "taken"),
    [
        ("s_branch", [1, 1]),
        ("s_cbranch_scc1", [1, 0]),
        ("s_cbranch_scc0", [0, 1]),
        ("s_cbranch_vccnz", [1, 0]),
        ("s_cbranch_vccz", [0, 1]),
        ("s_cbranch_execnz", [1, 0]),
        ("s_cbranch_execz", [0, 1]),
    ],
)
def test_a_branch_is_taken_by_the_waves_where_its_condition_holds(branch: str, taken: list[int]) -> None:
    assemble([f"{branch} 4"])
    set_up = np.array([1, 0])
    text = f"s_cmp_eq_u32 s4, 1\n{branch} .Lover\ns_mov_b32 s8, 0\n.Lover:"
    registers = {"s4": set_up, "s8": 1, "vcc": set_up << 40, "exec": set_up << 40}
    assert get(execute(text, registers, groups=2), "s8").tolist() == taken


def test_every_branch_is_tested() -> None:
    (mark,) = test_a_branch_is_taken_by_the_waves_where_its_condition_holds.pytestmark  # type: ignore[attr-defined]
    assert {name for name, _ in mark.args[1]} == set(scalar.BRANCHES)


@pytest.mark.parametrize("name", sorted(scalar.SAVEEXEC_OPS))
def test_saveexec_keeps_the_old_mask_and_sets_the_new(name: str) -> None:
    a, b = 0x00FF00FF12345678, 0xF0F0F0F0F0F0F0F0  # the operand, exec
    functions = {
        "and": a & b, "or": a | b, "xor": a ^ b, "andn2": a & ~b, "orn2": a | ~b, "nand": ~(a & b), "nor": ~(a | b),
        "xnor": ~(a ^ b),
    }  # fmt: skip
    text = f"{name} s[8:9], s[4:5]\nv_mov_b32_e32 v1, 1"
    assemble(text.split("\n"))
    expected = functions[name.split("_")[1]] & ((1 << 64) - 1)
    state = execute(text, {"s[4:5]": a, "exec": b, "v1": 0})
    assert get(state, "s[8:9]").tolist() == [b]
    assert get(state, "exec").tolist() == [expected]
    assert state.scc.tolist() == [expected != 0]
    assert get(state, "v1")[0].tolist() == [expected >> lane & 1 for lane in range(LANES)]


def test_instructions_that_only_wait_change_nothing() -> None:
    text = ["s_waitcnt vmcnt(0) lgkmcnt(0)", "s_nop 1", "s_sleep 1", "s_setprio 1", "s_icache_inv", "s_dcache_wb"]
    assemble(text)
    assert {line.split()[0] for line in text} | {"s_sethalt", "s_wakeup"} == scalar.NO_OPERATIONS
    state = execute("\n".join(text), {"v0": LANE, "s4": 7})
    assert get(state, "s4").tolist() == [7]


def test_waves_that_part_meet_again_at_a_barrier() -> None:
    text = """
        s_cmp_eq_u32 s4, 0
        s_cbranch_scc1 .Lother
        v_mov_b32_e32 v1, 1
        s_branch .Lmeet
        .Lother:
        v_mov_b32_e32 v1, 2
        .Lmeet:
        ds_write_b32 v0, v1
        s_barrier
        ds_read_b32 v2, v3
    """
    here, there = np.stack([4 * LANE, 256 + 4 * LANE]), np.stack([256 + 4 * LANE, 4 * LANE])
    state = execute(text, {"s4": np.array([0, 1]), "v0": here, "v3": there}, waves=2, lds_bytes=512)
    assert get(state, "v2")[:, 0].tolist() == [1, 2]


def test_different_barriers_are_a_fault() -> None:
    text = """
        s_cmp_eq_u32 s4, 0
        s_cbranch_scc1 .Lother
        s_barrier
        s_branch .Lend
        .Lother:
        s_barrier
        .Lend:
    """
    execute(text, {"s4": 1}, waves=2)
    with pytest.raises(DivergentBarrier, match=r"workgroup \(1, 0, 0\), wave 0.*barriers at 2, 4"):
        execute(text, {"s4": np.array([1, 1, 0, 1])}, waves=2, groups=2)


def test_a_barrier_that_a_wave_never_reaches_is_a_fault() -> None:
    text = "s_cmp_eq_u32 s4, 0\ns_cbranch_scc1 .Lend\ns_barrier\n.Lend:"
    with pytest.raises(DivergentBarrier, match="1 waves have ended"):
        execute(text, {"s4": np.array([0, 1])}, waves=2)


def test_a_loop_that_does_not_end_is_a_fault() -> None:
    with pytest.raises(Runaway, match=r"fragment, workgroup \(0, 0, 0\), wave 0, instruction 0: s_branch .*than 1000"):
        execute(".Lhere:\ns_branch .Lhere", limit=1000)


def test_running_past_the_end_is_a_fault() -> None:
    with pytest.raises(Fault, match="past the last instruction"):
        Machine(parse_fragment("s_nop 0")).run(Grid(1), Memory())


def test_all_unknown_opcodes_are_named_before_anything_runs() -> None:
    with pytest.raises(UnknownOpcode, match=r"v_frob_b32 v0, v1.*s_frob s0"):
        Machine(parse_fragment("s_nop 0\nv_frob_b32 v0, v1\ns_frob s0"))


def test_more_lds_than_a_compute_unit_has_is_a_fault() -> None:
    with pytest.raises(Fault, match="65540 bytes of LDS"):
        Machine(parse_fragment("s_endpgm")).run(Grid(1), Memory(), lds_bytes=65540)


KERNEL = """
	.text
kernel:
	.file	1 "/src" "kernel.py"
	.loc	1 42 8
	s_load_dwordx2 s[4:5], s[0:1], 0x0
	v_lshlrev_b32_e32 v1, 2, v0
	v_mov_b32_e32 v2, s{x}
	global_store_dword v1, v2, s[4:5]
	s_endpgm
	.section	.rodata
	.amdhsa_kernel kernel
		.amdhsa_user_sgpr_count 16
		.amdhsa_user_sgpr_kernarg_segment_ptr 1
		.amdhsa_system_sgpr_workgroup_id_x 1
		.amdhsa_system_sgpr_workgroup_id_y {y}
		.amdhsa_system_sgpr_workgroup_id_z 1
	.end_amdhsa_kernel
"""


def run_kernel(text: str, size: int, grid: Grid) -> np.ndarray:
    memory, out = Memory(shares=True), np.zeros(size, np.uint32)  # every workgroup stores to the same place
    arguments = np.array([buffer(memory, out, "out")], np.uint64)
    Machine(parse(text)).run(grid, memory, kernarg=buffer(memory, arguments, "arguments", read_only=True))
    return out


def test_a_kernel_starts_with_its_arguments_and_workgroup_ids() -> None:
    # Ids stand in the scalars after the user's, and only those that the kernel asks for.
    assert run_kernel(KERNEL.format(x=17, y=0), 256, Grid(2, 3, 5, waves=4)).tolist() == [4] * 256  # z, the last
    assert run_kernel(KERNEL.format(x=17, y=1), 256, Grid(2, 3, 5, waves=4)).tolist() == [2] * 256  # y


def test_a_fault_names_the_kernel_the_workgroup_the_wave_and_the_source_line() -> None:
    with pytest.raises(Fault, match=r"^kernel, workgroup \(0, 0, 0\), wave 2, instruction 3: global_store_dword "
                                    r"v1, v2, s\[4:5\] \(kernel.py:42\): store of 4 bytes"):  # fmt: skip
        run_kernel(KERNEL.format(x=16, y=0), 128, Grid(1, waves=4))


@pytest.mark.parametrize(
    "line",
    [
        ".amdhsa_user_sgpr_dispatch_ptr 1",
        ".amdhsa_system_vgpr_workitem_id 1",
        ".amdhsa_float_denorm_mode_32 0",
        ".amdhsa_ieee_mode 0",
        ".amdhsa_float_round_mode_32 3",
    ],
)
def test_a_kernel_that_wants_registers_set_up_otherwise_is_refused(line: str) -> None:
    text = KERNEL.format(x=16, y=0).replace(".amdhsa_user_sgpr_count 16", f".amdhsa_user_sgpr_count 16\n\t\t{line}")
    with pytest.raises(UnknownOpcode, match="not emulated"):
        Machine(parse(text))


def test_more_workgroups_than_run_at_once_all_run(tmp_path: Path) -> None:
    memory, out = Memory(), np.zeros(300, np.uint32)
    text = "v_mov_b32_e32 v1, s8\nv_mov_b32_e32 v0, 1\nglobal_atomic_add v2, v0, s[2:3]\ns_endpgm"
    address = buffer(memory, out)
    counter = [0]

    def prepare(waves: Waves) -> None:
        waves.scalar[2], waves.scalar[3] = address & 0xFFFFFFFF, address >> 32
        first = counter[0]
        waves.vector[2] = 4 * (first + np.arange(waves.count))[:, None]
        counter[0] += waves.count

    Machine(parse_fragment(text)).run(Grid(300), memory, prepare=prepare)
    assert out.tolist() == [LANES] * 300


def test_a_kernel_may_use_only_the_registers_that_it_asks_for() -> None:
    asks = ".amdhsa_user_sgpr_count 16\n\t\t.amdhsa_next_free_vgpr {}\n\t\t.amdhsa_accum_offset 4"
    for vectors, message in ((3, None), (2, "v2 is past the 2 registers")):
        text = KERNEL.format(x=16, y=0).replace(".amdhsa_user_sgpr_count 16", asks.format(vectors))
        if message is None:
            Machine(parse(text))
        else:
            with pytest.raises(OutOfBounds, match=message):
                Machine(parse(text))


@pytest.mark.parametrize(
    "text", ["v_mov_b32_e32 v300, 5", "s_mov_b32 s106, 3", "v_mov_b64_e32 v[3:2], 0", "v_mov_b32 a256, 0"]
)
def test_registers_that_do_not_exist_are_refused(text: str) -> None:
    with pytest.raises(UnknownOpcode, match="does not exist"):
        Machine(parse_fragment(text))


def test_saturating_halves_are_refused_where_they_are_not_emulated() -> None:
    with pytest.raises(UnknownOpcode, match="FP16_OVFL of v_add_f16"):
        Machine(parse_fragment("s_setreg_imm32_b32 hwreg(HW_REG_MODE, 23, 1), 1\nv_add_f16_e32 v0, v1, v2"))


def test_a_wave_may_wait_for_what_another_that_is_further_on_will_do() -> None:
    """The first wave goes on to set a flag; the second turns round it, at a lower place in the program."""
    text = """
        s_cmp_eq_u32 s4, 0
        s_cbranch_scc1 .Lset
        .Lspin:
        global_load_dword v1, v0, s[2:3] sc0 sc1
        v_readfirstlane_b32 s5, v1
        s_cmp_eq_u32 s5, 0
        s_cbranch_scc1 .Lspin
        s_endpgm
        .Lset:
        v_mov_b32_e32 v2, 1
        global_store_dword v0, v2, s[2:3]
    """
    flag, memory = np.zeros(1, np.uint32), Memory()
    execute(text, {"s4": np.array([0, 1]), "v0": 0, "s[2:3]": buffer(memory, flag)}, waves=2, memory=memory)
    assert flag[0] == 1


def test_a_signalling_nan_wins_over_a_number() -> None:
    state = execute(
        "v_max_f32_e32 v2, v0, v1\nv_max_f32_e32 v3, v4, v1", {"v0": 0x7FB00000, "v1": 0x3F800000, "v4": 0x7FC00000}
    )
    assert np.isnan(get(state, "v2").astype(np.uint32).view(np.float32)).all()
    assert set(get(state, "v3").ravel()) == {0x3F800000}
