"""Device functions of the Gluon kernels: weights in kernel order to matrix operands in registers, SwiGLU.

The layout that they all build on: a lane loads 16 bytes of a row of weights, eight words of 16 bits, which are four
blocks' codes of the same eight k. That is a lane's part of a matrix operand for each of the four blocks, whatever k it
stands for, as long as the lane that holds the activations has the same. So nothing moves between lanes.
"""

import triton.language as tl
from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_WORDS_PTX = gl.constexpr("""
{
.reg .b32 w, a, b;
mov.b32 w, $4;
and.b32 $0, w, 0x81C081C0;
shl.b32 a, w, 6;
and.b32 $1, a, 0x81C081C0;
shf.r.wrap.b32 a, w, w, 6;
and.b32 $2, a, 0x81C081C0;
shl.b32 a, w, 4;
and.b32 a, a, 0x81808180;
shr.b32 b, w, 4;
lop3.b32 $3, b, $5, a, 0xEA;
}
""")


_PAIRS_GCN = 4  # of words in a lane's 16 bytes


def _words_gcn() -> str:
    """The four blocks of a lane's pairs of words. Operands: a result for each pair, by block; the pairs; the mask.

    9 operations for 8 weights. 7 would do if four rotations of a code's places in bf16, bits 15 and 8 to 6, tiled a
    word of 16; none do. `v_and_or` has no room for a literal, hence the mask in a scalar register.
    """
    lines = []
    for i in range(_PAIRS_GCN):
        first, second, third, fourth = (f"${_PAIRS_GCN * block + i}" for block in range(4))
        pair, mask = f"${4 * _PAIRS_GCN + i}", f"${5 * _PAIRS_GCN}"
        lines += [
            f"v_lshlrev_b32 {fourth}, 4, {pair}",
            f"v_and_b32 {fourth}, 0x81808180, {fourth}",
            f"v_lshrrev_b32 {third}, 4, {pair}",
            f"v_and_or_b32 {fourth}, {third}, {mask}, {fourth}",
            f"v_alignbit_b32 {third}, {pair}, {pair}, 6",
            f"v_and_b32 {third}, 0x81C081C0, {third}",
            f"v_lshlrev_b32 {second}, 6, {pair}",
            f"v_and_b32 {second}, 0x81C081C0, {second}",
            f"v_and_b32 {first}, 0x81C081C0, {pair}",
        ]
    # A matrix instruction may read what a vector one wrote only two states later, and the compiler, which sees to that
    # elsewhere, does not look into this text.
    return "\n".join([*lines, "s_nop 1"])


_WORDS_GCN = gl.constexpr(_words_gcn())
_WORDS_GCN_CONSTRAINTS = gl.constexpr(",".join(["=&v"] * 4 * _PAIRS_GCN + ["v"] * _PAIRS_GCN + ["s"] * 2 * _PAIRS_GCN))


# One block of the four, times its scale.
@constexpr_function
def _scaled_ptx(BLOCK):
    places = (
        "and.b32 a, $1, 0x81C081C0;",
        "shl.b32 a, $1, 6; and.b32 a, a, 0x81C081C0;",
        "shf.r.wrap.b32 a, $1, $1, 6; and.b32 a, a, 0x81C081C0;",
        "shl.b32 a, $1, 4; and.b32 a, a, 0x81808180; shr.b32 b, $1, 4; lop3.b32 a, b, 0x00400040, a, 0xEA;",
    )[BLOCK]
    half = ("low", "high")[BLOCK // 2]
    return "\n".join(
        (
            "{ .reg .b32 a, b, scale; .reg .b16 low, high;",
            places,
            f"mov.b32 {{low, high}}, $2; mov.b32 scale, {{{half}, {half}}};",
            "mul.rn.bf16x2 $0, a, scale; }",
        )
    )


_FIELDS_PTX = gl.constexpr(
    (
        "{ .reg .b32 a; shl.b32 a, $1, 7; and.b32 $0, a, 0x7F807F80; }",
        "{ .reg .b32 a; shr.b32 a, $1, 1; and.b32 $0, a, 0x7F807F80; }",
    )
)


# One operation: the shift takes a byte of its source.
_FIELD_GCN = gl.constexpr(
    tuple(
        f"v_lshlrev_b32_sdwa $0, $2, $1 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:DWORD src1_sel:BYTE_{block}"
        for block in range(4)
    )
)


@gluon.jit
def decode(words, CDNA: gl.constexpr):
    """uint16 words → the four blocks bf16 of the same shape: value · 2^-126."""
    mask = gl.full(words.shape, 0x00400040, gl.int32, layout=words.type.layout)
    return gl.inline_asm_elementwise(
        _WORDS_GCN if CDNA else _WORDS_PTX,
        _WORDS_GCN_CONSTRAINTS if CDNA else "=r,=r,=r,=r,r,n,n",
        [words, mask],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=8 if CDNA else 2,
    )


@gluon.jit
def decode_fp8(words, mma: gl.constexpr):
    """int32 [S, N, 16] in "kernel-fp8" order, four words a lane → the four blocks e4m3fnuz [S, N, 32]: value · 2^-7."""
    first = words & -0x63636364  # 0x9C9C9C9C
    second = ((words << 2) & -0x73737374) | ((words >> 2) & 0x10101010)  # 0x8C8C8C8C
    # To take the words apart into elements costs nothing as long as LLVM does not see what is in them: else it masks
    # each byte by itself. This is no instruction, so the compiler sees to the waits between these and the products.
    first, second = gl.inline_asm_elementwise(
        "", "=v,=v,0,1", [first, second], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    pairs = gl.join(first, second).reshape([words.shape[0], words.shape[1], 4, 2, 2, 2])  # q, block / 2, block % 2
    even, odd = gl.split(pairs.permute([0, 1, 2, 3, 5, 4]))
    w0, w2 = gl.split(even.permute([0, 1, 2, 4, 3]))
    w1, w3 = gl.split(odd.permute([0, 1, 2, 4, 3]))
    return _elements(w0, mma), _elements(w1, mma), _elements(w2, mma), _elements(w3, mma)


@gluon.jit
def _elements(words, mma: gl.constexpr):
    """int32 [S, N, 4, 2], four elements each → e4m3fnuz [S, N, 32]."""
    low = gl.join(words.to(gl.int8), (words >> 16).to(gl.int8))
    high = gl.join((words >> 8).to(gl.int8), (words >> 24).to(gl.int8))
    elements = gl.join(low, high).reshape([words.shape[0], words.shape[1], 32])
    return gl.convert_layout(elements, gl.DotOperandLayout(0, mma, 8)).to(gl.float8e4b8, bitcast=True)


@gluon.jit
def scale_f32(fields, BLOCK: gl.constexpr, CDNA: gl.constexpr):
    """uint32, a group's four exponent fields → f32 2^(field−127) of block BLOCK: 0 for 0, infinity for 255."""
    if CDNA:
        places = gl.full(fields.shape, 23, gl.int32, layout=fields.type.layout)
        return gl.inline_asm_elementwise(
            _FIELD_GCN[BLOCK], "=v,v,s", [fields, places], dtype=gl.float32, is_pure=True, pack=1
        )
    bits = fields >> 1 if BLOCK == 3 else fields << (23 - 8 * BLOCK)
    return (bits & 0x7F800000).to(gl.uint32).to(gl.float32, bitcast=True)


@gluon.jit
def _scales_bf16(fields, PAIR: gl.constexpr):
    """The same as bf16 of block PAIR in the low 16 bits, and of block PAIR + 2 in the high ones."""
    return gl.inline_asm_elementwise(_FIELDS_PTX[PAIR], "=r,r", [fields], dtype=gl.uint32, is_pure=True, pack=1)


@gluon.jit
def decode_scaled(words, fields, BLOCK: gl.constexpr):
    """uint16 words [..., 32], fields uint32 [..., 1] → block BLOCK bf16 [..., 32] times its scale · 2^-126."""
    scales, _ = gl.broadcast(_scales_bf16(fields, BLOCK % 2), words)
    # The scales of two neighbours in a row are one: the second's register is not read.
    return gl.inline_asm_elementwise(
        _scaled_ptx(BLOCK), "=r,r,r,r", [words, scales], dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def apart(sums):
    """The same sums, on CDNA. Else LLVM, seeing what is done to two of them at the end, pairs their elements for packed
    operations all the way up, through copies in the loop; an instruction's own four elements are pairs as they are."""
    return gl.inline_asm_elementwise("", "=v,0", [sums], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def swiglu(gate, up, limit, HAS_LIMIT: gl.constexpr):
    """`swiglu_f32` → bf16."""
    return swiglu_f32(gate, up, limit, HAS_LIMIT).to(gl.bfloat16)


@gluon.jit
def swiglu_f32(gate, up, limit, HAS_LIMIT: gl.constexpr):
    """silu(min(gate, limit)) · clamp(up, ±limit) in f32."""
    if HAS_LIMIT:
        # V4's clamp is asymmetric, and a NaN must stay one.
        gate = gl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = gl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
        up = gl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
    return gate / (1.0 + gl.exp(-gate)) * up


@gluon.jit
def shifted(h):
    """bf16 times 2^64, exactly."""
    return (h.to(gl.float32) * 18446744073709551616.0).to(gl.bfloat16)


@gluon.jit
def shifted_pairs(x):
    """The same of an operand's elements, two at a time on NVIDIA."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 s; mov.b32 s, 0x5F805F80; mul.rn.bf16x2 $0, $1, s; }",  # 2^64
        "=r,r",
        [x],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def local_rows(ids_ptr, map_ptr, route, inside, known, LOCAL: gl.constexpr, HAS_MAP: gl.constexpr):
    """`plan.local_row` in Gluon, of routes that all programs must see the same."""
    wide = gl.load(ids_ptr + route, mask=inside, other=-1, cache_modifier=".cg")
    exists = inside & (wide >= 0) & (wide < known)
    expert = gl.where(exists, wide, 0).to(gl.int32)
    row = gl.load(map_ptr + expert, mask=exists, other=-1).to(gl.int32) if HAS_MAP else expert
    return gl.where(exists & (row < LOCAL), row, -1)
