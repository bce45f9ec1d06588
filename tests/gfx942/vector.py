"""VALU instructions: VOP1, VOP2, VOP3, VOPC, with SDWA and DPP."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tests.gfx942.assembly import Instruction
from tests.gfx942.dpp import dpp_source
from tests.gfx942.faults import UnknownOpcode
from tests.gfx942.formats import BF8, FP8, choose, flush, fma, fma_f16, to_fnuz
from tests.gfx942.integers import leading_zeros, reversed_bits, trailing_zeros
from tests.gfx942.operands import SELECTIONS, TYPES, Kind, Read, bits, destination, register, scalar, vector
from tests.gfx942.waves import LANES, Waves

Step = Callable[[Waves], None]
Array = NDArray[Any]
Source = Kind | Literal["dst", "mask"]
"""Of a vector instruction also: the old value of its destination, and one bit a lane from a scalar pair."""

u32, i32, u64, i64, f32, f64 = np.uint32, np.int32, np.uint64, np.int64, np.float32, np.float64
_BELOW_LOW = np.array([(1 << min(lane, 32)) - 1 for lane in range(LANES)], u32)
_BELOW_HIGH = np.array([(1 << max(lane - 32, 0)) - 1 for lane in range(LANES)], u32)


@dataclass(frozen=True)
class VectorOp:
    """The kinds of what it reads and writes, and what it computes."""

    sources: tuple[Source, ...]
    result: Kind
    compute: Callable[..., Array]


def _transcendental(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Rounded once from f64; the chip is within 1 ulp. Denormals are flushed on the way in and out, as there."""
    return lambda a: flush(function(flush(a).astype(f64)).astype(f32))


def _to_int(low: int, high: int, dtype: type) -> Callable[[Array], Array]:
    """Truncate, saturate; NaN gives 0."""
    return lambda a: np.clip(np.nan_to_num(np.trunc(a.astype(f64)), nan=0.0), low, high).astype(i64).astype(dtype)


def _u24(a: Array) -> Array:
    return a & u32(0xFFFFFF)


def _i24(a: Array) -> Array:
    return (a << u32(8)).view(i32) >> 8


def _mask_of(width: Array) -> Array:
    """`width` ones, 0 … 31 of them."""
    return (u32(1) << (width & u32(31))) - u32(1)


def _bfe_signed(a: Array, first: Array, width: Array) -> Array:
    # Arithmetic: a field that reaches past bit 31 is filled with the sign.
    field = (a.view(i32) >> (first & u32(31)).view(i32)).view(u32) & _mask_of(width)
    sign = (u32(1) << (width & u32(31))) >> u32(1)
    return ((field ^ sign) - sign).view(i32)


def _align(unit: int) -> Callable[..., Array]:
    """The 32 bits that begin `c` units of the 64-bit a:b."""
    limit = u32(32 // unit - 1)

    def compute(a: Array, b: Array, c: Array) -> Array:
        joined = (a.astype(u64) << u64(32)) | b
        return (joined >> ((c & limit) * u32(unit)).astype(u64)).astype(u32)

    return compute


def _perm(a: Array, b: Array, selector: Array) -> Array:
    """Each byte of the selector picks one of the eight bytes of a:b (b has 0…3), a sign, 0x00 or 0xff."""
    joined = (a.astype(u64) << u64(32)) | b
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), u32)
    for i in range(4):
        pick = (selector >> u32(8 * i)) & u32(0xFF)
        byte = joined >> (np.minimum(pick, u32(7)) * u32(8)).astype(u64)
        sign = (joined >> ((np.clip(pick, 8, 11) - u32(8)) * u32(16) + u32(15)).astype(u64)) & u64(1)
        value = np.where(pick < 8, byte & u64(0xFF), np.where(pick < 12, sign * u64(0xFF), u64(0)))
        value = np.where(pick > 12, u64(0xFF), value)
        out |= value.astype(u32) << u32(8 * i)
    return out


def _ieee(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """min and max of IEEE mode: a quiet NaN gives way to a number, a signalling one becomes quiet and wins."""

    def signals(x: Array) -> Array:
        return np.isnan(x) & ((np.ascontiguousarray(x).view(u32) & u32(0x400000)) == 0)

    def compute(a: Array, b: Array) -> Array:
        result = function(a, b)
        signalling = signals(a) | signals(b)
        return choose(signalling, np.array(np.nan, f32), result) if signalling.any() else result

    return compute


def _median(a: Array, b: Array, c: Array) -> Array:
    return np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))


def _median_f32(a: Array, b: Array, c: Array) -> Array:
    """With a NaN among them it is the least of the others."""
    ordered = np.fmax(np.fmin(a, b), np.fmin(np.fmax(a, b), c))
    return np.where(np.isnan(a) | np.isnan(b) | np.isnan(c), np.fmin(np.fmin(a, b), c), ordered)


def _toward_zero_f16(a: Array) -> Array:
    """f32 → the bits of f16, rounded toward zero."""
    half = a.astype(np.float16)
    too_far = np.abs(half.astype(f32)) > np.abs(a)
    return np.where(too_far, half.view(np.uint16) - np.uint16(1), half.view(np.uint16)).astype(u32)


def _table() -> dict[str, VectorOp]:
    ops: dict[str, VectorOp] = {}

    def add(sources: str, result: Kind, **functions: Callable[..., Array]) -> None:
        for name, function in functions.items():
            ops[f"v_{name}"] = VectorOp(tuple(sources.split()), result, function)  # type: ignore[arg-type]

    thirty_one = u32(31)
    add(
        "u32", "u32",
        mov_b32=lambda a: a, not_b32=lambda a: ~a, bfrev_b32=reversed_bits, ffbh_u32=leading_zeros,
        ffbl_b32=trailing_zeros, accvgpr_read_b32=lambda a: a, accvgpr_write_b32=lambda a: a,
        accvgpr_mov_b32=lambda a: a,
    )  # fmt: skip
    add(
        "u32 u32", "u32",
        and_b32=lambda a, b: a & b, or_b32=lambda a, b: a | b, xor_b32=lambda a, b: a ^ b,
        xnor_b32=lambda a, b: ~(a ^ b), lshlrev_b32=lambda a, b: b << (a & thirty_one),
        lshrrev_b32=lambda a, b: b >> (a & thirty_one), add_u32=lambda a, b: a + b, sub_u32=lambda a, b: a - b,
        subrev_u32=lambda a, b: b - a, mul_lo_u32=lambda a, b: a * b,
        mul_hi_u32=lambda a, b: ((a.astype(u64) * b) >> u64(32)).astype(u32),
        mul_u32_u24=lambda a, b: _u24(a) * _u24(b), mul_i32_i24=lambda a, b: (_i24(a) * _i24(b)).view(u32),
        min_u32=np.minimum, max_u32=np.maximum, bfm_b32=lambda a, b: _mask_of(a) << (b & thirty_one),
        bcnt_u32_b32=lambda a, b: np.bitwise_count(a).astype(u32) + b,
        mbcnt_lo_u32_b32=lambda a, b: np.bitwise_count(a & _BELOW_LOW).astype(u32) + b,
        mbcnt_hi_u32_b32=lambda a, b: np.bitwise_count(a & _BELOW_HIGH).astype(u32) + b,
    )  # fmt: skip
    add(
        "u32 u32 u32", "u32",
        or3_b32=lambda a, b, c: a | b | c, and_or_b32=lambda a, b, c: a & b | c, add3_u32=lambda a, b, c: a + b + c,
        lshl_or_b32=lambda a, b, c: a << (b & thirty_one) | c,
        lshl_add_u32=lambda a, b, c: (a << (b & thirty_one)) + c,
        add_lshl_u32=lambda a, b, c: (a + b) << (c & thirty_one), xad_u32=lambda a, b, c: (a ^ b) + c,
        mad_u32_u24=lambda a, b, c: _u24(a) * _u24(b) + c,
        mad_i32_i24=lambda a, b, c: (_i24(a) * _i24(b)).view(u32) + c,
        bfe_u32=lambda a, b, c: (a >> (b & thirty_one)) & _mask_of(c), bfi_b32=lambda a, b, c: a & b | ~a & c,
        alignbit_b32=_align(1), alignbyte_b32=_align(8), perm_b32=_perm,
        min3_u32=lambda a, b, c: np.minimum(np.minimum(a, b), c),
        max3_u32=lambda a, b, c: np.maximum(np.maximum(a, b), c), med3_u32=_median,
    )  # fmt: skip
    add("u32 u32 u32", "i32", bfe_i32=_bfe_signed)
    add("u32 i32", "i32", ashrrev_i32=lambda a, b: b >> (a & thirty_one).view(i32))
    add(
        "i32 i32", "i32",
        min_i32=np.minimum, max_i32=np.maximum, mul_hi_i32=lambda a, b: ((a.astype(i64) * b) >> 32).astype(i32),
    )  # fmt: skip
    add(
        "i32 i32 i32", "i32",
        min3_i32=lambda a, b, c: np.minimum(np.minimum(a, b), c),
        max3_i32=lambda a, b, c: np.maximum(np.maximum(a, b), c), med3_i32=_median,
    )  # fmt: skip
    add(
        "u16 u16", "u16",
        add_u16=lambda a, b: a + b, sub_u16=lambda a, b: a - b, subrev_u16=lambda a, b: b - a,
        mul_lo_u16=lambda a, b: a * b, min_u16=np.minimum, max_u16=np.maximum,
        lshlrev_b16=lambda a, b: b << (a & np.uint16(15)), lshrrev_b16=lambda a, b: b >> (a & np.uint16(15)),
    )  # fmt: skip
    add("u16 i16", "i16", ashrrev_i16=lambda a, b: b >> (a & np.uint16(15)).view(np.int16))
    add("i16 i16", "i16", min_i16=np.minimum, max_i16=np.maximum)
    add("u16 u16 u16", "u16", mad_legacy_u16=lambda a, b, c: a * b + c)
    add("u32 u64", "u64", lshlrev_b64=lambda a, b: b << (a & u32(63)).astype(u64))
    add("u32 u64", "u64", lshrrev_b64=lambda a, b: b >> (a & u32(63)).astype(u64))
    add("u32 i64", "i64", ashrrev_i64=lambda a, b: b >> (a & u32(63)).astype(i64))
    add("u64 u32 u64", "u64", lshl_add_u64=lambda a, b, c: (a << (b & u32(7)).astype(u64)) + c)
    add("u64", "u64", mov_b64=lambda a: a)

    add(
        "f32 f32", "f32",
        add_f32=lambda a, b: a + b, sub_f32=lambda a, b: a - b, subrev_f32=lambda a, b: b - a,
        mul_f32=lambda a, b: a * b, min_f32=_ieee(np.fmin), max_f32=_ieee(np.fmax),
        mul_legacy_f32=lambda a, b: np.where((a == 0) | (b == 0), f32(0), a * b),
    )  # fmt: skip
    add(
        "f32 f32 f32", "f32",
        fma_f32=fma, fmamk_f32=fma, fmaak_f32=fma, med3_f32=_median_f32,
        min3_f32=lambda a, b, c: np.fmin(np.fmin(a, b), c), max3_f32=lambda a, b, c: np.fmax(np.fmax(a, b), c),
    )  # fmt: skip
    add("f32 f32 dst", "f32", fmac_f32=lambda a, b, c: fma(a, b, c.view(f32)))
    add(
        "f32", "f32",
        exp_f32=_transcendental(np.exp2), log_f32=_transcendental(np.log2), rcp_f32=_transcendental(lambda a: 1 / a),
        rcp_iflag_f32=_transcendental(lambda a: 1 / a), rsq_f32=_transcendental(lambda a: 1 / np.sqrt(a)),
        sqrt_f32=_transcendental(np.sqrt), floor_f32=np.floor, ceil_f32=np.ceil, trunc_f32=np.trunc,
        rndne_f32=np.rint,
    )  # fmt: skip
    add("f32 i32", "f32", ldexp_f32=lambda a, b: np.ldexp(a.astype(f64), np.clip(b, -600, 600)).astype(f32))
    add("f16 f16", "f16", add_f16=lambda a, b: a + b, sub_f16=lambda a, b: a - b, mul_f16=lambda a, b: a * b)
    add("f16 f16", "f16", min_f16=np.fmin, max_f16=np.fmax)
    add("f16 f16 f16", "f16", fma_f16=fma_f16)

    add("u32", "f32", cvt_f32_u32=lambda a: a.astype(f32))
    add("i32", "f32", cvt_f32_i32=lambda a: a.astype(f32))
    add("f16", "f32", cvt_f32_f16=lambda a: a.astype(f32))
    add("f32", "u32", cvt_u32_f32=_to_int(0, (1 << 32) - 1, u32))
    add("f32", "i32", cvt_i32_f32=_to_int(-(1 << 31), (1 << 31) - 1, i32))
    add("f32 f32", "u32", cvt_pkrtz_f16_f32=lambda a, b: _toward_zero_f16(a) | _toward_zero_f16(b) << u32(16))
    for i in range(4):
        add("u32", "f32", **{f"cvt_f32_ubyte{i}": lambda a, i=i: ((a >> u32(8 * i)) & u32(0xFF)).astype(f32)})
    add("u32", "f32", cvt_f32_fp8=lambda a: FP8[a & u32(0xFF)], cvt_f32_bf8=lambda a: BF8[a & u32(0xFF)])
    add("u32 u32 mask", "u32", cndmask_b32=lambda a, b, mask: choose(mask, b, a))
    return ops


VECTOR_OPS = _table()

SATURATING_OPS = {
    "v_add_u32": VectorOp(("u32", "u32"), "u32", lambda a, b: np.where(a + b < a, u32(0xFFFFFFFF), a + b)),
    "v_sub_u32": VectorOp(("u32", "u32"), "u32", lambda a, b: np.where(a < b, u32(0), a - b)),
}
"""What `clamp` makes of an integer instruction."""

_ORDERED: dict[str, Callable[[Array, Array], Array]] = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal,
}  # fmt: skip


def _negated(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda a, b: ~function(a, b)


def _compares() -> dict[str, tuple[Kind, Callable[[Array, Array], Array]]]:
    out: dict[str, tuple[Kind, Callable[[Array, Array], Array]]] = {}
    kinds: tuple[Kind, ...] = ("u16", "i16", "u32", "i32", "u64", "i64")
    for kind in kinds:
        for name, function in {**_ORDERED, "ne": lambda a, b: a != b}.items():
            out[f"v_cmp_{name}_{kind}"] = (kind, function)
    floats: tuple[Kind, ...] = ("f16", "f32", "f64")
    for kind in floats:
        for name, function in _ORDERED.items():
            out[f"v_cmp_{name}_{kind}"] = (kind, function)
            negated = "neq" if name == "eq" else f"n{name}"
            out[f"v_cmp_{negated}_{kind}"] = (kind, _negated(function))
        out[f"v_cmp_lg_{kind}"] = (kind, lambda a, b: (a < b) | (a > b))
        out[f"v_cmp_nlg_{kind}"] = (kind, lambda a, b: ~((a < b) | (a > b)))
        out[f"v_cmp_o_{kind}"] = (kind, lambda a, b: ~(np.isnan(a) | np.isnan(b)))
        out[f"v_cmp_u_{kind}"] = (kind, lambda a, b: np.isnan(a) | np.isnan(b))
    return out


COMPARE_OPS = _compares()


def compile_vector(instruction: Instruction) -> Step:
    """Raises `UnknownOpcode` for what is not implemented."""
    base = instruction.base
    if base in COMPARE_OPS:
        return _compare(instruction, *COMPARE_OPS[base])
    if base in SPECIAL_OPS:
        _only(instruction, "op_sel", "src0_sel", "src1_sel")
        return SPECIAL_OPS[base](instruction)
    if base in VECTOR_OPS:
        return _operation(instruction, VECTOR_OPS[base])
    raise UnknownOpcode(instruction.text)


def _only(instruction: Instruction, *known: str) -> None:
    """No modifier but these may stand here; one that is ignored would give a wrong result in silence."""
    unknown = set(instruction.modifiers) - set(known)
    if unknown:
        raise UnknownOpcode(f"{instruction.text}: modifier {', '.join(sorted(unknown))}")


def _selections(instruction: Instruction) -> list[str]:
    return [instruction.modifiers.get(f"src{i}_sel", "DWORD") for i in range(2)] + ["DWORD"]


def _source(text: str, kind: Source, select: str, old: int) -> Read:
    if kind == "dst":
        return lambda waves: waves.vector[old]
    if kind == "mask":
        pair = register(text)
        assert pair is not None
        return lambda waves: waves.mask(pair.index)
    return vector(text, kind, select)


_DPP = (
    "quad_perm", "row_shl", "row_shr", "row_ror", "row_mirror", "row_half_mirror", "row_bcast", "row_newbcast",
    "row_mask", "bank_mask", "bound_ctrl",
)  # fmt: skip


def _operation(instruction: Instruction, op: VectorOp) -> Step:
    _only(instruction, "clamp", "mul", "div", "dst_sel", "dst_unused", "src0_sel", "src1_sel", *_DPP)
    operands, modifiers = instruction.operands, instruction.modifiers
    n = destination(operands[0])
    texts = iter(operands[1:])
    reads = [
        _source("" if kind == "dst" else next(texts), kind, select, n)
        for kind, select in zip(op.sources, _selections(instruction), strict=False)
    ]
    if "clamp" in modifiers and op.result[0] != "f":
        if instruction.base not in SATURATING_OPS:
            raise UnknownOpcode(f"{instruction.text}: clamp of this instruction")
        op = SATURATING_OPS[instruction.base]
    finish = _finish(instruction, op)
    if instruction.opcode.endswith("_dpp"):
        if bits(op.result) == 64:
            raise UnknownOpcode(f"{instruction.text}: DPP of 64 bits")
        return _dpp_operation(modifiers, op, reads, n, finish)
    if bits(op.result) == 64:
        return lambda waves: waves.set_vector_pair(n, op.compute(*(read(waves) for read in reads)).view(u64))
    write = _sdwa_write(modifiers, n)
    return lambda waves: write(waves, finish(op.compute(*(read(waves) for read in reads))))


def _finish(instruction: Instruction, op: VectorOp) -> Callable[[Array], Array]:
    """Output modifiers, then the bits of the result."""
    modifiers, result = instruction.modifiers, op.result
    steps: list[Callable[[Array], Array]] = []
    factor = float(modifiers.get("mul", 1)) / float(modifiers.get("div", 1))
    if factor != 1:
        steps.append(lambda value: value * TYPES[result](factor))
    if "clamp" in modifiers and result[0] == "f":
        # A NaN becomes 0: Triton's kernels run with dx10_clamp.
        steps.append(lambda value: np.nan_to_num(np.clip(value, 0, 1), nan=0.0))

    def finish(value: Array) -> Array:
        for step in steps:
            value = step(value)
        return _as_u32(value, result)

    return finish


def _as_u32(value: Array, kind: Kind) -> Array:
    """The 32 bits of a result. Those of 16 bits leave the upper half 0."""
    value = np.ascontiguousarray(value, TYPES[kind])
    return value.view(np.uint16).astype(u32) if bits(kind) == 16 else value.view(u32)


def _sdwa_write(modifiers: dict[str, str], n: int) -> Callable[[Waves, Array], None]:
    select = modifiers.get("dst_sel", "DWORD")
    if select == "DWORD":
        return lambda waves, value: waves.set_vector(n, value)
    first, width = SELECTIONS[select]
    field = u32(((1 << width) - 1) << first)
    if modifiers.get("dst_unused") == "UNUSED_PRESERVE":
        return lambda waves, value: waves.set_vector(n, (value << u32(first)) & field | waves.vector[n] & ~field)
    if modifiers.get("dst_unused") == "UNUSED_PAD":
        return lambda waves, value: waves.set_vector(n, (value << u32(first)) & field)
    raise UnknownOpcode(f"dst_unused:{modifiers.get('dst_unused')}")


def _dpp_operation(
    modifiers: dict[str, str], op: VectorOp, reads: list[Read], n: int, finish: Callable[[Array], Array]
) -> Step:
    first = dpp_source(reads[0], modifiers)

    def step(waves: Waves) -> None:
        moved, written = first(waves)
        value = finish(op.compute(moved, *(read(waves) for read in reads[1:])))
        waves.set_vector(n, np.where(written, value, waves.vector[n]))

    return step


def _compare(instruction: Instruction, kind: Kind, function: Callable[[Array, Array], Array]) -> Step:
    _only(instruction, "src0_sel", "src1_sel")
    n = destination(instruction.operands[0], scalar=True)
    selects = _selections(instruction)
    a, b = (vector(text, kind, selects[i]) for i, text in enumerate(instruction.operands[1:3]))
    shape = (1, LANES)
    return lambda waves: waves.set_mask(n, np.broadcast_to(function(a(waves), b(waves)), (waves.count, shape[1])))


# What does not fit the table: several results, lanes of their own, state beside the registers.


def _readfirstlane(instruction: Instruction) -> Step:
    n, source = destination(instruction.operands[0], scalar=True), vector(instruction.operands[1], "u32")

    def step(waves: Waves) -> None:
        lane = np.argmax(waves.lanes, axis=1)  # lane 0 where none is active
        values = np.broadcast_to(source(waves), (waves.count, LANES))
        waves.set_scalar(n, values[np.arange(waves.count), lane])

    return step


def _readlane(instruction: Instruction) -> Step:
    target, source, lane = instruction.operands
    n, values, which = destination(target, scalar=True), vector(source, "u32"), scalar(lane)
    return lambda waves: waves.set_scalar(n, values(waves)[np.arange(waves.count), which(waves) & u32(63)])


def _writelane(instruction: Instruction) -> Step:
    target, source, lane = instruction.operands
    n, value, which = destination(target), scalar(source), scalar(lane)

    def step(waves: Waves) -> None:
        wave = np.nonzero(waves.running)[0]  # regardless of exec
        waves.vector[n][wave, (which(waves) & u32(63))[wave]] = value(waves)[wave]

    return step


def _carrying(compute: Callable[[Array, Array, Array], Array]) -> Callable[[Instruction], Step]:
    """Sum or difference with a carry: the low half, and a mask of the lanes that left [0, 2^32)."""

    def build(instruction: Instruction) -> Step:
        target, carry_out, first, second, *carry_in = instruction.operands
        n, out = destination(target), destination(carry_out, scalar=True)
        a, b = vector(first, "u32"), vector(second, "u32")
        pair = register(carry_in[0]) if carry_in else None

        def step(waves: Waves) -> None:
            carry = waves.mask(pair.index).astype(i64) if pair else np.zeros((1, 1), i64)
            total = np.broadcast_to(compute(a(waves).astype(i64), b(waves).astype(i64), carry), (waves.count, LANES))
            waves.set_vector(n, (total & 0xFFFFFFFF).astype(u32))
            waves.set_mask(out, (total < 0) | (total > 0xFFFFFFFF))

        return step

    return build


def _mad_64(kind: Kind, wide: type) -> Callable[[Instruction], Step]:
    """a·b + c with a 64-bit c; the carry is that of the addition of unsigned numbers."""

    def build(instruction: Instruction) -> Step:
        target, carry, *sources = instruction.operands
        n, out = destination(target), destination(carry, scalar=True)
        a, b, c = vector(sources[0], kind), vector(sources[1], kind), vector(sources[2], "u64")

        def step(waves: Waves) -> None:
            product = (a(waves).astype(wide) * b(waves).astype(wide)).view(u64)
            total = np.broadcast_to(product + c(waves), (waves.count, LANES))
            waves.set_vector_pair(n, total)
            waves.set_mask(out, np.broadcast_to(total < product, (waves.count, LANES)))

        return step

    return build


def _unpack_fp8(values: Array) -> Callable[[Instruction], Step]:
    """Two bytes to two f32. The source may be a register that is written, so both are read first."""

    def build(instruction: Instruction) -> Step:
        n = destination(instruction.operands[0])
        source = vector(instruction.operands[1], "u32", instruction.modifiers.get("src0_sel", "DWORD"))

        def step(waves: Waves) -> None:
            codes = source(waves)
            low, high = values[codes & u32(0xFF)], values[(codes >> u32(8)) & u32(0xFF)]
            waves.set_vector(n, low.view(u32))
            waves.set_vector(n + 1, high.view(u32))

        return step

    return build


def _pack_fp8(values: Array) -> Callable[[Instruction], Step]:
    """Two f32 to two bytes of one half of the destination, which op_sel chooses; the other half stays."""

    def build(instruction: Instruction) -> Step:
        n = destination(instruction.operands[0])
        a, b = (vector(text, "f32") for text in instruction.operands[1:3])
        high = instruction.modifiers.get("op_sel", "[0,0,0]").strip("[]").split(",")[-1] == "1"
        shift, kept = (u32(16), u32(0xFFFF)) if high else (u32(0), u32(0xFFFF0000))

        def step(waves: Waves) -> None:
            saturate = waves.saturates_fp16[:, None]
            first, second = (to_fnuz(read(waves), values, saturate=saturate) for read in (a, b))
            waves.set_vector(n, waves.vector[n] & kept | (first | second << u32(8)) << shift)

        return step

    return build


def _cvt_f16(instruction: Instruction) -> Step:
    n, source = destination(instruction.operands[0]), vector(instruction.operands[1], "f32")

    def step(waves: Waves) -> None:
        x = source(waves)
        half = x.astype(np.float16)
        overflowed = np.isinf(half) & np.isfinite(x) & waves.saturates_fp16[:, None]
        half = np.where(overflowed, np.copysign(np.float16(65504), half), half)
        waves.set_vector(n, _as_u32(half, "f16"))

    return step


# A division is div_scale ×2, rcp, Newton steps in fma, div_fmas and div_fixup. Where neither scaling nor a special
# case is needed the quotient comes from those steps as on the chip; elsewhere div_fixup divides. So div_scale
# passes its operand on unscaled and reports no scaling, which AMD's documents do not state for each case.


def _div_scale(instruction: Instruction) -> Step:
    target, carry, first, _, _ = instruction.operands
    n, out, source = destination(target), destination(carry, scalar=True), vector(first, "f32")

    def step(waves: Waves) -> None:
        waves.set_vector(n, source(waves).view(u32))
        waves.set_mask(out, np.zeros((waves.count, LANES), bool))

    return step


def _div_fixup(quotient: Array, denominator: Array, numerator: Array) -> Array:
    exponents = [np.frexp(x.astype(f64))[1] for x in (numerator, denominator)]
    ordinary = np.isfinite(numerator) & np.isfinite(denominator) & (numerator != 0) & (denominator != 0)
    ordinary &= (np.abs(exponents[0]) < 96) & (np.abs(exponents[1]) < 96)
    ordinary &= np.abs(exponents[0] - exponents[1]) < 96
    signed = np.copysign(quotient, np.sign(denominator) * np.sign(numerator))
    return np.where(ordinary, signed, numerator / denominator)


VECTOR_OPS["v_div_fmas_f32"] = VectorOp(("f32", "f32", "f32"), "f32", fma)
VECTOR_OPS["v_div_fixup_f32"] = VectorOp(("f32", "f32", "f32"), "f32", _div_fixup)

SPECIAL_OPS: dict[str, Callable[[Instruction], Step]] = {
    "v_readfirstlane_b32": _readfirstlane,
    "v_readlane_b32": _readlane,
    "v_writelane_b32": _writelane,
    "v_add_co_u32": _carrying(lambda a, b, c: a + b),
    "v_sub_co_u32": _carrying(lambda a, b, c: a - b),
    "v_subrev_co_u32": _carrying(lambda a, b, c: b - a),
    "v_addc_co_u32": _carrying(lambda a, b, c: a + b + c),
    "v_subb_co_u32": _carrying(lambda a, b, c: a - b - c),
    "v_subbrev_co_u32": _carrying(lambda a, b, c: b - a - c),
    "v_mad_u64_u32": _mad_64("u32", u64),
    "v_mad_i64_i32": _mad_64("i32", i64),
    "v_cvt_pk_f32_fp8": _unpack_fp8(FP8),
    "v_cvt_pk_f32_bf8": _unpack_fp8(BF8),
    "v_cvt_pk_fp8_f32": _pack_fp8(FP8),
    "v_cvt_pk_bf8_f32": _pack_fp8(BF8),
    "v_cvt_f16_f32": _cvt_f16,
    "v_div_scale_f32": _div_scale,
}
OPCODES = {*VECTOR_OPS, *COMPARE_OPS, *SPECIAL_OPS}
