"""Loads, stores and atomics, of device memory, LDS and scratch; and what they must not do."""

import re
from collections.abc import Callable

import numpy as np
import pytest

from tests.gfx942 import global_memory, shared
from tests.gfx942.assembler import assemble
from tests.gfx942.assembly import parse_instruction
from tests.gfx942.faults import LdsRace, OutOfBounds, ReadOnly, SharedMemoryRace, UninitialisedLds, UnknownOpcode
from tests.gfx942.machine import compile_instruction
from tests.gfx942.memory import Memory
from tests.gfx942.snippet import buffer, execute, get
from tests.gfx942.waves import LANES, Waves

LANE = np.arange(LANES, dtype=np.uint64)
SIZES = {"ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2, "short": 2, "byte": 1, "dword": 4, "dwordx2": 8,
         "dwordx3": 12, "dwordx4": 16}  # fmt: skip


def descriptor(address: int, size: int) -> dict[str, int]:
    """s[4:7] as a raw buffer of `size` bytes."""
    return {"s4": address & 0xFFFFFFFF, "s5": address >> 32, "s6": size, "s7": 0x27000}


def random_bytes(count: int = 4096) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, count, dtype=np.uint8)


def loaded(data: np.ndarray, start: int, type_name: str) -> int:
    """What a load of a type at byte `start` gives: extended to 32 bits, or the dwords as one integer."""
    raw = data[start : start + SIZES[type_name]].tobytes()
    value = int.from_bytes(raw, "little", signed=type_name.startswith("s") and type_name != "short")
    return value % 2**32 if SIZES[type_name] < 4 else value


def registers_of(type_name: str, first: int) -> str:
    count = max(1, SIZES[type_name] // 4)
    return f"v{first}" if count == 1 else f"v[{first}:{first + count - 1}]"


def wide(state: Waves, type_name: str, first: int) -> list[int]:
    """The registers of a load as one integer a lane."""
    count = max(1, SIZES[type_name] // 4)
    parts = [get(state, f"v{first + i}")[0].tolist() for i in range(count)]
    return [sum(part[lane] << 32 * i for i, part in enumerate(parts)) for lane in range(LANES)]


def load_text(space: str, type_name: str) -> str:
    target = registers_of(type_name, 10)
    return {
        "buffer": f"buffer_load_{type_name} {target}, v0, s[4:7], s8 offen offset:16",
        "global": f"global_load_{type_name} {target}, v0, s[2:3] offset:-16",
        "flat": f"flat_load_{type_name} {target}, v[2:3] offset:16",
    }[space]


@pytest.mark.parametrize("space", ["buffer", "global", "flat"])
@pytest.mark.parametrize("type_name", ["ubyte", "sbyte", "ushort", "sshort", "dword", "dwordx2", "dwordx3", "dwordx4"])
def test_a_load_reads_its_bytes_at_any_alignment(space: str, type_name: str) -> None:
    data, memory = random_bytes(), Memory()
    address = buffer(memory, data)
    text = load_text(space, type_name)
    assemble([text])
    state = execute(
        text,
        {"v0": 48 + 23 * LANE, "v[2:3]": address + 24 * LANE, "s[2:3]": address, "s8": 8, **descriptor(address, 4096)},
        memory=memory,
    )
    start = {"buffer": 48 + 16 + 8, "global": 48 - 16, "flat": 16}[space]
    step = 24 if space == "flat" else 23
    assert wide(state, type_name, 10) == [loaded(data, start + step * lane, type_name) for lane in range(LANES)]


@pytest.mark.parametrize("space", ["buffer", "global", "flat"])
@pytest.mark.parametrize("type_name", ["byte", "short", "dword", "dwordx2", "dwordx3", "dwordx4"])
def test_a_store_writes_its_bytes_and_no_other_and_only_of_active_lanes(space: str, type_name: str) -> None:
    size = SIZES[type_name]
    data, memory = random_bytes(), Memory()
    before = data.copy()
    address = buffer(memory, data)
    source = registers_of(type_name, 10)
    text = {
        "buffer": f"buffer_store_{type_name} {source}, v0, s[4:7], 0 offen",
        "global": f"global_store_{type_name} v0, {source}, s[2:3]",
        "flat": f"flat_store_{type_name} v[2:3], {source}",
    }[space]
    assemble([text])
    values = [0x11111111 + LANE, 0x22222222 + LANE, 0x33333333 + LANE, 0x44444444 + LANE]
    execute(
        text,
        {
            "v0": 20 * LANE, "v[2:3]": address + 20 * LANE, "s[2:3]": address, **descriptor(address, 4096),
            **{f"v{10 + i}": v for i, v in enumerate(values)}, "exec": 0x00FF00FF00FF00FF,
        },
        memory=memory,
    )  # fmt: skip
    expected = before.copy()
    for lane in range(LANES):
        if lane // 8 % 2 == 0:
            raw = b"".join(int(v[lane]).to_bytes(4, "little") for v in values)[:size]
            expected[20 * lane : 20 * lane + size] = np.frombuffer(raw, np.uint8)
    np.testing.assert_array_equal(data, expected)


@pytest.mark.parametrize("high", ["", "_hi"])
@pytest.mark.parametrize("type_name", ["ubyte", "sbyte", "short"])
@pytest.mark.parametrize("space", ["global", "buffer", "flat", "scratch", "ds"])
def test_d16_loads_one_half_and_does_not_keep_the_other(space: str, type_name: str, high: str) -> None:
    data, memory = random_bytes(), Memory()
    address = buffer(memory, data)
    ds_name = {"ubyte": "u8", "sbyte": "i8", "short": "u16"}[type_name]
    text = {
        "global": f"global_load_{type_name}_d16{high} v10, v0, s[2:3]",
        "buffer": f"buffer_load_{type_name}_d16{high} v10, v0, s[4:7], 0 offen",
        "flat": f"flat_load_{type_name}_d16{high} v10, v[2:3]",
        "scratch": "global_load_dword v1, v0, s[2:3]\nscratch_store_dword off, v1, off\n"
        f"scratch_load_{type_name}_d16{high} v10, off, off",
        "ds": f"global_load_dword v1, v0, s[2:3]\nds_write_b32 v0, v1\nds_read_{ds_name}_d16{high} v10, v0",
    }[space]
    assemble(text.split("\n"))
    state = execute(
        text,
        {
            "v0": 4 * LANE, "v[2:3]": address + 4 * LANE, "s[2:3]": address, **descriptor(address, 4096),
            "v10": 0x12345678,
        },
        memory=memory,
        lds_bytes=256,
        scratch_bytes=4,
    )  # fmt: skip
    for lane, got in enumerate(get(state, "v10")[0].tolist()):
        half = loaded(data, 4 * lane, type_name) & 0xFFFF
        assert got >> (16 if high else 0) & 0xFFFF == half
        assert got >> (0 if high else 16) & 0xFFFF not in (0x1234, 0x5678), "the other half must not be relied on"


@pytest.mark.parametrize("space", ["global", "buffer", "flat", "scratch", "ds"])
@pytest.mark.parametrize("type_name", ["byte", "short"])
def test_d16_hi_stores_the_upper_half(space: str, type_name: str) -> None:
    data, memory = np.zeros(512, np.uint8), Memory()
    address = buffer(memory, data)
    text = {
        "global": f"global_store_{type_name}_d16_hi v0, v10, s[2:3]",
        "buffer": f"buffer_store_{type_name}_d16_hi v10, v0, s[4:7], 0 offen",
        "flat": f"flat_store_{type_name}_d16_hi v[2:3], v10",
        "scratch": f"scratch_store_dword off, v11, off\nscratch_store_{type_name}_d16_hi off, v10, off\n"
        "scratch_load_dword v12, off, off\nglobal_store_dword v0, v12, s[2:3]",
        "ds": f"ds_write_b32 v0, v11\nds_write_b{8 * SIZES[type_name]}_d16_hi v0, v10\n"
        "ds_read_b32 v12, v0\nglobal_store_dword v0, v12, s[2:3]",
    }[space]
    assemble(text.split("\n"))
    registers = {"v0": 4 * LANE, "v[2:3]": address + 4 * LANE, "v10": 0xABCD1234, "v11": 0, "s[2:3]": address}
    execute(text, {**registers, **descriptor(address, 512)}, memory=memory, lds_bytes=256, scratch_bytes=4)
    assert data[:256].reshape(64, 4)[:, : SIZES[type_name]].tolist() == [[0xCD, 0xAB][: SIZES[type_name]]] * 64


def test_a_scalar_load_reads_dwords_for_each_wave() -> None:
    data, memory = random_bytes(), Memory()
    address = buffer(memory, data)
    for name, count in (("", 1), ("x2", 2), ("x4", 4), ("x8", 8), ("x16", 16)):
        target = "s16" if count == 1 else f"s[16:{15 + count}]"
        for offset in ("0x18", "s6"):
            text = f"s_load_dword{name} {target}, s[2:3], {offset}"
            assemble([text])
            groups = np.arange(3, dtype=np.uint64)
            state = execute(text, {"s[2:3]": address + 64 * groups, "s6": 24}, memory=memory, groups=3)
            for i in range(count):
                expected = [loaded(data, int(64 * g + 24 + 4 * i), "dword") for g in groups]
                assert get(state, f"s{16 + i}").tolist() == expected


def test_a_buffer_access_past_num_records_loads_zero_and_stores_nothing() -> None:
    data, memory = random_bytes(512), Memory()
    before = data.copy()
    address = buffer(memory, data)
    text = "buffer_load_dword v10, v0, s[4:7], 0 offen\nbuffer_store_dword v0, v1, s[4:7], 0 offen"
    registers = {"v0": np.where(LANE % 2, 0x80000000, 4 * LANE), "v1": 0xFFFFFFF0, **descriptor(address, 512)}
    state = execute(text, registers, memory=memory)
    got = get(state, "v10")[0].tolist()
    assert got == [0 if lane % 2 else loaded(before, 4 * lane, "dword") for lane in range(LANES)]
    np.testing.assert_array_equal(data, before)


def test_an_access_outside_every_buffer_names_the_nearest() -> None:
    memory = Memory()
    data = random_bytes(100)
    address = buffer(memory, data, "weights")
    with pytest.raises(OutOfBounds, match=r"lane 25 .*39 lanes.*nearest buffer is weights: byte 100 of 100"):
        execute("global_load_dword v1, v0, s[2:3]", {"v0": 4 * LANE, "s[2:3]": address}, memory=memory)
    with pytest.raises(OutOfBounds, match=r"store of 16 bytes .* byte -8 of 100"):
        execute("global_store_dwordx4 v[0:1], v[4:7], off", {"v[0:1]": address - 8}, memory=memory)
    # The last byte of the access decides, and inactive lanes do not access.
    with pytest.raises(OutOfBounds, match="lane 0 "):
        execute("global_load_dwordx4 v[4:7], v0, s[2:3]", {"v0": 88, "s[2:3]": address}, memory=memory)
    execute("global_load_dword v1, v0, s[2:3]", {"v0": 4 * LANE, "s[2:3]": address, "exec": 0x1FFFFFF}, memory=memory)


def test_a_store_to_read_only_memory_is_a_fault() -> None:
    memory = Memory()
    data = random_bytes(256)
    address = buffer(memory, data, "weights", read_only=True)
    registers = {"v0": 4 * LANE, "s[2:3]": address}
    execute("global_load_dword v1, v0, s[2:3]", registers, memory=memory)
    with pytest.raises(ReadOnly, match="store to weights"):
        execute("global_store_dword v0, v1, s[2:3]", registers, memory=memory)


def test_bytes_are_counted_by_buffer() -> None:
    memory = Memory()
    arrays = {name: random_bytes(1024) for name in ("a", "b")}
    first, second = (buffer(memory, data, name) for name, data in arrays.items())
    registers = {"v0": 16 * LANE, "s[2:3]": first, "s[4:5]": second, "exec": 0xFFFF}
    execute("global_load_dwordx4 v[4:7], v0, s[2:3]\nglobal_store_dword v0, v4, s[4:5]", registers, memory=memory)
    assert (memory.loaded, memory.stored) == ({"a": 256}, {"b": 64})
    assert memory.widths == {"a": {16}}


def test_a_swizzled_buffer_is_refused() -> None:
    data, memory = random_bytes(), Memory()
    registers = {"v0": LANE, **descriptor(buffer(memory, data), 4096), "s5": 0x40000000}
    with pytest.raises(UnknownOpcode, match="stride or swizzle"):
        execute("buffer_load_dword v1, v0, s[4:7], 0 offen", registers, memory=memory)


ATOMICS: dict[str, Callable[[int, int], int]] = {
    "add": lambda old, new: (old + new) % 2**32,
    "sub": lambda old, new: (old - new) % 2**32,
    "umin": min,
    "umax": max,
    "smin": lambda old, new: min(old, new, key=lambda x: x - 2**32 * (x >> 31)),
    "smax": lambda old, new: max(old, new, key=lambda x: x - 2**32 * (x >> 31)),
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
    "swap": lambda old, new: new,
}


@pytest.mark.parametrize("name", ATOMICS)
@pytest.mark.parametrize("space", ["global", "buffer"])
def test_an_atomic_changes_memory_lane_after_lane_and_may_return_the_old(name: str, space: str) -> None:
    rng = np.random.default_rng(2)
    values = rng.integers(0, 2**32, LANES, dtype=np.uint64)
    start = rng.integers(0, 2**32, 4, dtype=np.uint32)
    texts = {
        "global": (f"global_atomic_{name} v0, v1, s[2:3]", f"global_atomic_{name} v9, v0, v1, s[2:3] sc0"),
        "buffer": (
            f"buffer_atomic_{name} v1, v0, s[4:7], 0 offen",
            f"buffer_atomic_{name} v9, v0, s[4:7], 0 offen sc0",
        ),
    }[space]
    assemble(list(texts))
    for text in texts:
        data, memory = start.copy(), Memory()
        address = buffer(memory, data)
        registers = {"v0": 4 * (LANE % 4), "v1": values, "v9": values, "s[2:3]": address, **descriptor(address, 16)}
        state = execute(text, registers, memory=memory)
        expected, old = [int(x) for x in start], []
        for lane in range(LANES):
            old.append(expected[lane % 4])
            expected[lane % 4] = ATOMICS[name](expected[lane % 4], int(values[lane]))
        assert data.tolist() == expected
        if "sc0" in text:
            assert get(state, "v9")[0].tolist() == old


@pytest.mark.parametrize(
    ("space", "name"),
    [
        ("global", "add_f32"),
        ("global", "pk_add_f16"),
        ("global", "pk_add_bf16"),
        ("buffer", "add_f32"),
        ("buffer", "pk_add_f16"),
    ],
)
def test_a_floating_atomic_adds(space: str, name: str) -> None:
    one = {"add_f32": 0x3F800000, "pk_add_f16": 0x3C004000, "pk_add_bf16": 0x3F804000}[name]  # 1, or (2, 1)
    total = {"add_f32": 0x42800000, "pk_add_f16": 0x54005800, "pk_add_bf16": 0x42804300}[name]  # 64, or (128, 64)
    data, memory = np.zeros(1, np.uint32), Memory()
    address = buffer(memory, data)
    text = {
        "global": f"global_atomic_{name} v0, v1, s[2:3]",
        "buffer": f"buffer_atomic_{name} v1, v0, s[4:7], 0 offen",
    }[space]
    assemble([text])
    execute(text, {"v0": 0, "v1": one, "s[2:3]": address, **descriptor(address, 4)}, memory=memory)
    assert data[0] == total


def test_scratch_belongs_to_each_lane() -> None:
    text = """
        scratch_store_dword off, v1, s2 offset:4
        scratch_store_dwordx2 off, v[2:3], off offset:16
        scratch_load_dword v4, off, s2 offset:4
        scratch_load_ushort v5, off, off offset:18
        scratch_load_dwordx4 v[6:9], off, off offset:8
    """
    assemble(text.strip().split("\n"))
    registers = {"v1": 7 * LANE, "v2": 0x10000 * LANE, "v3": 5, "s2": 4}
    state = execute(text, registers, scratch_bytes=24)
    assert get(state, "v4")[0].tolist() == get(state, "v6")[0].tolist() == (7 * LANE).tolist()
    assert get(state, "v5")[0].tolist() == LANE.tolist()
    assert set(get(state, "v9").ravel()) == {5}
    with pytest.raises(OutOfBounds, match="scratch byte 16 of 18"):
        execute(text, registers, scratch_bytes=18)


SCRATCH = [0x1000 * i + LANE for i in range(1, 5)]


@pytest.mark.parametrize("type_name", ["ubyte", "sbyte", "ushort", "sshort", "dword", "dwordx2", "dwordx3", "dwordx4"])
def test_scratch_loads_every_type(type_name: str) -> None:
    text = f"scratch_store_dwordx4 off, v[2:5], off\nscratch_load_{type_name} {registers_of(type_name, 10)}, off, off"
    assemble(text.split("\n"))
    registers = {f"v{2 + i}": values | np.uint64(0x80) for i, values in enumerate(SCRATCH)}
    state = execute(text, registers, scratch_bytes=16)
    for lane, got in enumerate(wide(state, type_name, 10)):
        raw = b"".join(int(registers[f"v{2 + i}"][lane]).to_bytes(4, "little") for i in range(4))
        assert got == loaded(np.frombuffer(raw, np.uint8), 0, type_name)


@pytest.mark.parametrize("type_name", ["byte", "short", "dword", "dwordx2", "dwordx3", "dwordx4"])
def test_scratch_stores_every_type_and_no_more(type_name: str) -> None:
    text = (
        "scratch_store_dwordx4 off, v[20:23], off\n"
        f"scratch_store_{type_name} off, {registers_of(type_name, 2)}, off\n"
        "scratch_load_dwordx4 v[10:13], off, off"
    )
    assemble(text.split("\n"))
    registers = {f"v{2 + i}": values for i, values in enumerate(SCRATCH)}
    state = execute(text, {**registers, **{f"v{20 + i}": 0xFFFFFFFF for i in range(4)}}, scratch_bytes=16)
    bits = 8 * SIZES[type_name]
    for lane, got in enumerate(wide(state, "dwordx4", 10)):
        stored = sum(int(values[lane]) << 32 * i for i, values in enumerate(SCRATCH))
        assert got == stored & ((1 << bits) - 1) | ((1 << 128) - 1) >> bits << bits


@pytest.mark.parametrize("dwords", [1, 2, 3, 4])
def test_lds_writes_of_every_width_write_that_and_no_more(dwords: int) -> None:
    source = "v2" if dwords == 1 else f"v[2:{1 + dwords}]"
    text = f"ds_write_b128 v0, v[20:23]\nds_write_b{32 * dwords} v0, {source}\nds_read_b128 v[10:13], v0"
    assemble(text.split("\n"))
    registers = {f"v{2 + i}": values for i, values in enumerate(SCRATCH)}
    ones = {f"v{20 + i}": 0xFFFFFFFF for i in range(4)}
    state = execute(text, {"v0": 16 * LANE, **registers, **ones}, lds_bytes=1024)
    for i in range(4):
        expected = SCRATCH[i].tolist() if i < dwords else [0xFFFFFFFF] * LANES
        assert get(state, f"v{10 + i}")[0].tolist() == expected


LDS_READS = {"b32": 4, "b64": 8, "b96": 12, "b128": 16, "u8": 1, "i8": -1, "u16": 2, "i16": -2}


@pytest.mark.parametrize("type_name", LDS_READS)
def test_an_lds_read_gives_what_its_workgroup_wrote(type_name: str) -> None:
    size = abs(LDS_READS[type_name])
    target = "v10" if size <= 4 else f"v[10:{9 + size // 4}]"
    text = f"ds_write_b128 v0, v[2:5] offset:16\nds_read_{type_name} {target}, v1 offset:16"
    assemble(text.split("\n"))
    values = [np.random.default_rng(i).integers(0, 2**32, (3, LANES), dtype=np.uint64) for i in range(4)]
    at = 16 * LANE + np.uint64(0 if size in (8, 12, 16) else 4 - size)
    registers = {"v0": 16 * LANE, "v1": at, **{f"v{2 + i}": v for i, v in enumerate(values)}}
    state = execute(text, registers, groups=3, lds_bytes=16 + 1024)
    for group in range(3):
        for lane in (0, 5, 63):
            raw = b"".join(int(v[group, lane]).to_bytes(4, "little") for v in values)
            start = 0 if size in (8, 12, 16) else 4 - size
            expected = int.from_bytes(raw[start : start + size], "little", signed=LDS_READS[type_name] < 0)
            parts = [int(get(state, f"v{10 + i}")[group, lane]) for i in range(max(1, size // 4))]
            got = sum(part << 32 * i for i, part in enumerate(parts))
            assert got == (expected % 2**32 if size <= 4 else expected)


@pytest.mark.parametrize("stride", ["", "st64"])
@pytest.mark.parametrize("type_name", ["b32", "b64"])
def test_read2_and_write2_take_two_places(type_name: str, stride: str) -> None:
    width = 1 if type_name == "b32" else 2
    regs = lambda first: f"v{first}" if width == 1 else f"v[{first}:{first + 1}]"  # noqa: E731
    unit = 4 * width * (64 if stride else 1)
    text = (
        f"ds_write2{stride}_{type_name} v0, {regs(2)}, {regs(4)} offset0:1 offset1:3\n"
        f"ds_read_{type_name} {regs(6)}, v0 offset:{unit}\n"
        f"ds_read2{stride}_{type_name} v[10:{9 + 2 * width}], v0 offset0:3 offset1:1"
    )
    assemble(text.split("\n"))
    state = execute(text, {"v0": 0, "v2": 22, "v3": 33, "v4": 44, "v5": 55, "exec": 1}, lds_bytes=4 * unit)
    lane0 = lambda n: int(get(state, f"v{n}")[0, 0])  # noqa: E731
    assert lane0(6) == 22
    assert [lane0(10 + i) for i in range(2 * width)] == ([44, 22] if width == 1 else [44, 55, 22, 33])


@pytest.mark.parametrize("size", [1, 2])
def test_an_lds_write_of_part_of_a_dword_leaves_the_rest(size: int) -> None:
    text = f"ds_write_b32 v0, v1\nds_write_b{8 * size} v0, v2 offset:{size}\nds_read_b32 v3, v0"
    assemble(text.split("\n"))
    got = get(execute(text, {"v0": 4 * LANE, "v1": 0x11223344, "v2": 0xAABB}, lds_bytes=256), "v3")
    assert set(got.ravel()) == {0x1122BB44 if size == 1 else 0xAABB3344}


def test_lds_atomics_add_up_and_do_not_race_with_each_other() -> None:
    text = "ds_write_b32 v1, v2\ns_barrier\nds_add_u32 v0, v3\ns_barrier\nds_read_b32 v4, v0"
    state = execute(text, {"v0": 0, "v1": 0, "v2": 5, "v3": 2, "exec": (1 << 64) - 1}, waves=4, lds_bytes=4)
    assert set(get(state, "v4").ravel()) == {5 + 2 * 4 * 64}
    with pytest.raises(LdsRace, match=r"is read by wave .* was written by"):
        execute("ds_write_b32 v1, v2\ns_barrier\nds_add_u32 v0, v3\nds_read_b32 v4, v0",
                {"v0": 0, "v1": 0, "v2": 5, "v3": 2}, waves=2, lds_bytes=4)  # fmt: skip


def test_a_read_of_lds_that_nobody_wrote_is_a_fault() -> None:
    text = "ds_write_b32 v0, v1\nds_read_b64 v[2:3], v0"
    with pytest.raises(UninitialisedLds, match="LDS byte 256 was never written"):
        execute(text, {"v0": 4 * LANE, "v1": 1}, lds_bytes=260)
    # What another workgroup wrote does not count: LDS is a workgroup's own.
    first_group_only = "s_cmp_eq_u32 s4, 0\ns_cbranch_scc0 .Lskip\nds_write_b32 v0, v1\n.Lskip:\nds_read_b32 v2, v0"
    with pytest.raises(UninitialisedLds):
        execute(first_group_only, {"v0": 4 * LANE, "v1": 1, "s4": np.array([0, 1])}, groups=2, lds_bytes=256)


def test_lds_past_its_end_is_a_fault() -> None:
    with pytest.raises(OutOfBounds, match="LDS write of 4 bytes at 252 by lane 63; the workgroup has 254"):
        execute("ds_write_b32 v0, v1", {"v0": 4 * LANE, "v1": 1}, lds_bytes=254)


NEIGHBOUR = {"v0": np.stack([4 * LANE, 256 + 4 * LANE]), "v1": np.stack([256 + 4 * LANE, 4 * LANE]), "v2": LANE}


@pytest.mark.parametrize(
    ("racy", "message"),
    [
        ("ds_write_b32 v0, v2\nds_read_b32 v3, v1", "is read by wave 0 .* written by wave 1"),
        (
            "ds_write_b32 v0, v2\ns_barrier\nds_read_b32 v3, v1\nds_write_b32 v0, v2",
            "is written by wave 0 .* read by wave 1",
        ),
    ],
    ids=["read after write", "write after read"],
)
def test_a_missing_barrier_between_two_waves_is_a_race(racy: str, message: str) -> None:
    with pytest.raises(LdsRace, match=message):
        execute(racy, NEIGHBOUR, waves=2, lds_bytes=512)
    mended = "ds_write_b32 v0, v2\ns_barrier\nds_read_b32 v3, v1\ns_barrier\nds_write_b32 v0, v2"
    execute(mended, NEIGHBOUR, waves=2, lds_bytes=512)


def test_a_wave_does_not_race_with_itself() -> None:
    execute("ds_write_b32 v0, v2\nds_read_b32 v3, v0\nds_write_b32 v0, v3", NEIGHBOUR, waves=2, lds_bytes=512)


def test_two_waves_may_write_the_same_value_but_not_two_values_to_a_byte() -> None:
    same = {"v0": 4 * LANE, "v1": LANE}
    execute("ds_write_b32 v0, v1", same, waves=2, lds_bytes=256)
    with pytest.raises(LdsRace, match=r"is written by wave 1 .* was written by wave 0"):
        execute("ds_write_b32 v0, v1", {**same, "v1": np.stack([LANE, LANE + np.uint64(1)])}, waves=2, lds_bytes=256)


def test_bytes_of_one_dword_may_belong_to_two_waves() -> None:
    places = np.stack([4 * LANE, 4 * LANE + np.uint64(1)])
    execute("ds_write_b8 v0, v1\nds_read_u8 v2, v0", {"v0": places, "v1": LANE}, waves=2, lds_bytes=256)


@pytest.mark.parametrize("waves", [2, 12, 16])
def test_races_are_found_among_many_waves(waves: int) -> None:
    last = np.zeros((waves, LANES), np.uint64)
    last[:-1] = 512 + 256 * np.arange(waves - 1, dtype=np.uint64)[:, None]
    registers = {"v0": last + 4 * LANE, "v1": 4 * LANE, "v2": LANE}
    write_by_last = "ds_write_b32 v0, v2\nds_read_b32 v3, v1"
    with pytest.raises(LdsRace, match=f"read by wave 0 .* written by wave {waves - 1}"):
        execute(write_by_last, registers, waves=waves, lds_bytes=512 + 256 * waves)


def test_every_memory_opcode_is_an_instruction_of_gfx942() -> None:
    for opcode in sorted(global_memory.OPCODES | shared.OPCODES):
        text = example(opcode)
        assemble([text])
        compile_instruction(parse_instruction(text), {})


def example(opcode: str) -> str:
    """An instruction with this opcode."""
    if opcode in global_memory.NO_OPERATIONS:
        return f"{opcode} sc1"
    if opcode in ("ds_bpermute_b32", "ds_permute_b32"):
        return f"{opcode} v0, v1, v2"
    if opcode == "ds_swizzle_b32":
        return f"{opcode} v0, v1 offset:swizzle(SWAP,16)"
    size = re.search(r"x(\d)$|_b(\d+)$", opcode)
    dwords = 1 if size is None else int(size[1]) if size[1] else max(1, int(size[2]) // 32)
    regs = lambda first, n=dwords: f"v{first}" if n == 1 else f"v[{first}:{first + n - 1}]"  # noqa: E731
    if opcode.startswith("ds_read2"):
        return f"{opcode} {regs(4, 2 * dwords)}, v0"
    if opcode.startswith("ds_write2"):
        return f"{opcode} v0, {regs(4)}, {regs(8)}"
    if opcode.startswith("ds_read"):
        return f"{opcode} {regs(4)}, v0"
    if opcode.startswith("ds_"):
        return f"{opcode} v0, {regs(4)}"
    if opcode.startswith("buffer_"):
        return f"{opcode} {regs(4)}, v0, s[4:7], 0 offen"
    address, base = {"g": ("v0", ", s[2:3]"), "f": ("v[0:1]", ""), "s": ("off", ", s2")}[opcode[0]]
    first, second = (regs(4), address) if "_load_" in opcode else (address, regs(4))
    return f"{opcode} {first}, {second}{base}"


def test_buffers_that_are_neighbours_here_are_far_apart_on_the_device() -> None:
    data, memory = np.arange(64, dtype=np.uint32), Memory()
    first, second = (memory.add(f"half {i}", data.ctypes.data + 128 * i, 128) for i in range(2))
    assert (first ^ data.ctypes.data) % 4096 == 0, "as aligned as here"
    state = execute("global_load_dword v1, v0, s[2:3]", {"v0": 124, "s[2:3]": second}, memory=memory)
    assert get(state, "v1")[0, 0] == 63
    with pytest.raises(OutOfBounds, match="nearest buffer is half 0: byte 128 of 128"):
        execute("global_load_dword v1, v0, s[2:3]", {"v0": 128, "s[2:3]": first}, memory=memory)


STORE = "global_store_dword v0, v1, s[2:3]"


def test_two_workgroups_may_not_store_different_values_to_a_place() -> None:
    data, memory = np.zeros(256, np.uint32), Memory()
    at = {"v0": 4 * LANE, "s[2:3]": buffer(memory, data)}
    values = np.stack([LANE, LANE])
    execute(STORE, {**at, "v1": values}, memory=memory, groups=2)
    different = values + np.array([[0], [1]], np.uint64) * (LANE == 5)
    with pytest.raises(SharedMemoryRace, match="two lanes store different values to byte 20 of data in one instr"):
        execute(STORE, {**at, "v1": different}, memory=memory, groups=2)
    # The same, not at once: the first workgroup goes another way.
    text = f"s_cmp_eq_u32 s4, 0\ns_cbranch_scc1 .Lfirst\n{STORE}\ns_endpgm\n.Lfirst:\n{STORE}"
    with pytest.raises(SharedMemoryRace, match="workgroup 0 stores another value over byte 20 of data, which workgr"):
        execute(text, {**at, "v1": different, "s4": np.array([0, 1])}, memory=memory, groups=2)


def test_a_workgroup_may_not_load_what_another_stored_unless_the_launch_says_so() -> None:
    data = np.zeros(256, np.uint32)
    here, there = np.stack([4 * LANE, 256 + 4 * LANE]), np.stack([256 + 4 * LANE, 4 * LANE])
    for memory in (Memory(), Memory(shares=True)):
        registers = {"v0": here, "v1": 7, "v2": there, "s[2:3]": buffer(memory, data)}
        text = f"{STORE}\nglobal_load_dword v3, v2, s[2:3]"
        if memory._shares:
            execute(text, registers, memory=memory, groups=2)
        else:
            with pytest.raises(SharedMemoryRace, match="workgroup 0 loads byte 256 of data, which workgroup 1 stored"):
                execute(text, registers, memory=memory, groups=2)
    own = Memory()
    registers |= {"s[2:3]": buffer(own, data), "v2": here}
    execute(f"{STORE}\nglobal_load_dword v3, v2, s[2:3]", registers, memory=own, groups=2)


def test_lanes_of_one_wave_may_not_write_two_values_to_a_byte_of_lds() -> None:
    execute("ds_write_b32 v0, v1", {"v0": 0, "v1": 5}, lds_bytes=4)
    with pytest.raises(LdsRace, match="written with two values by lanes of wave 0"):
        execute("ds_write_b32 v0, v1", {"v0": 0, "v1": LANE}, lds_bytes=4)


def test_an_lds_address_wraps_at_32_bits() -> None:
    """lds[63 − lane], as LLVM writes it: a negative address and an offset."""
    text = "ds_write_b32 v0, v1\nds_read_b32 v3, v2 offset:252"
    state = execute(
        text, {"v0": 4 * LANE, "v1": 7 + LANE, "v2": (-4 * LANE.astype(np.int64)) & 0xFFFFFFFF}, lds_bytes=256
    )
    assert get(state, "v3")[0].tolist() == [70 - lane for lane in range(LANES)]


def test_a_scalar_load_takes_a_negative_constant() -> None:
    data, memory = np.arange(64, dtype=np.uint32), Memory()
    address = buffer(memory, data)
    text = "s_load_dword s4, s[2:3], -0x10"
    assemble([text])
    assert get(execute(text, {"s[2:3]": address + 64}, memory=memory), "s4").tolist() == [12]


def test_an_atomic_must_be_aligned() -> None:
    data, memory = np.zeros(4, np.uint32), Memory()
    with pytest.raises(OutOfBounds, match="no multiple of 4"):
        execute("global_atomic_add v0, v1, s[2:3]", {"v0": 1, "v1": 1, "s[2:3]": buffer(memory, data)}, memory=memory)
