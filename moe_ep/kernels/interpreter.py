"""What Triton's interpreter (TRITON_INTERPRET=1) gets wrong or does again and again, mended.

Triton 3.6 to 3.9 keep a bfloat16 as the integer of its bits, and add, compare and multiply those; they round f32 to
bf16 and fp8 by truncation, or up at every tie; 3.6 does not know AMD's fnuz fp8 types and fails on `range` of a tensor
with numpy 2.4. Here short floats become f32 by torch's types, and go back by them, to nearest even.

They also look through the whole language at each call of a device function, which a launch has done before, and leave
`triton.language.core` changed after it. Here a launch does it once, for all its functions, and undoes all of it.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from numpy.typing import NDArray

Array = NDArray[Any]

_FLOATS = {
    tl.float64: torch.float64,
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5b16: torch.float8_e5m2fnuz,
    tl.float8e4b8: torch.float8_e4m3fnuz,
}
_BITS = {1: (np.uint8, torch.uint8), 2: (np.int16, torch.int16), 4: (np.int32, torch.int32), 8: (np.int64, torch.int64)}
_FNUZ = {"fp8e4b8": "get_fp8e4b8_ty", "fp8e5b16": "get_fp8e5b16_ty"}


def mend() -> None:
    """Change the interpreter of this process, once."""
    if getattr(interpreter, "mended", False):
        return
    builder = interpreter.InterpreterBuilder
    interpreter._convert_float = _converter(interpreter._convert_float)
    builder.binary_op = _binary(builder.binary_op)
    builder.unary_op = _unary(builder.unary_op)
    builder.cast_impl = _cast(builder.cast_impl)
    builder.create_dot = _dot
    interpreter._patch_lang_core = _fnuz_types(interpreter._patch_lang_core)
    interpreter._patch_lang_tensor = _index(interpreter._patch_lang_tensor)
    interpreter._patch_lang = _once(interpreter._patch_lang)
    interpreter.mended = True


def _is_short(dtype: Any) -> bool:
    """Whether numpy has no such float: the interpreter keeps it as bits."""
    return bool(dtype == tl.bfloat16 or (dtype.is_floating() and dtype.primitive_bitwidth == 8))


def _convert(bits: Array, source: Any, target: Any) -> Array:
    """The bits of floats of one type as those of another, rounded to nearest even."""
    width, target_width = source.primitive_bitwidth // 8, target.primitive_bitwidth // 8
    signed = np.ascontiguousarray(bits).view(_BITS[width][0])
    converted = torch.from_numpy(signed.copy()).view(_FLOATS[source]).to(_FLOATS[target])
    out = converted.view(_BITS[target_width][1]).numpy()
    unsigned: Array = out.view(getattr(np, f"uint{8 * target_width}"))
    return unsigned.reshape(bits.shape)


def _values(handle: Any) -> Array:
    """A handle's numbers as numpy floats."""
    dtype = handle.dtype.scalar
    return _convert(handle.data, dtype, tl.float32).view(np.float32) if _is_short(dtype) else handle.data


def _handle(values: Array, dtype: Any) -> Any:
    """A handle of `dtype` from numpy floats; comparisons stay what they are."""
    if values.dtype == np.bool_ or not _is_short(dtype):
        return interpreter.TensorHandle(values, dtype)
    return interpreter.TensorHandle(_convert(values.astype(np.float32), tl.float32, dtype), dtype)


def _converter(original: Callable[..., Array]) -> Callable[..., Array]:
    def convert(bits: Array, source: Any, target: Any, rounding: Any) -> Array:
        toward_zero = rounding is not None and "RTZ" in str(rounding)
        if toward_zero or source not in _FLOATS or target not in _FLOATS:
            return original(bits, source, target, rounding)
        return _convert(bits, source, target)

    return convert


def _binary(original: Callable[..., Any]) -> Callable[..., Any]:
    def binary_op(self: Any, lhs: Any, rhs: Any, op: Callable[[Array, Array], Array]) -> Any:
        if not _is_short(lhs.dtype.scalar):
            return original(self, lhs, rhs, op)
        return _handle(op(_values(lhs), _values(rhs)), lhs.dtype.scalar)

    return binary_op


def _unary(original: Callable[..., Any]) -> Callable[..., Any]:
    def unary_op(self: Any, arg: Any, op: Callable[[Array], Array]) -> Any:
        if not _is_short(arg.dtype.scalar):
            return original(self, arg, op)
        return _handle(op(_values(arg)), arg.dtype.scalar)

    return unary_op


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if _is_short(target):
            return _handle(_values(src).astype(np.float32), target)
        if _is_short(source):
            wide = interpreter.TensorHandle(_values(src), tl.float32)
            return original(self, wide, dst_type)
        return original(self, src, dst_type)

    return cast_impl


def _dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
    """a·b + d with the products exact and the sum in d's type."""
    left, right = (_values(operand).astype(d.data.dtype) for operand in (a, b))
    return interpreter.TensorHandle(np.matmul(left, right) + d.data, d.dtype.scalar)


def _fnuz_types(original: Callable[..., None]) -> Callable[..., None]:
    def patch(lang: Any, scope: Any) -> None:
        original(lang, scope)
        known = lang.dtype.to_ir

        def to_ir(self: Any, builder: Any) -> Any:
            return getattr(builder, _FNUZ[self.name])() if self.name in _FNUZ else known(self, builder)

        scope.set_attr(lang.dtype, "to_ir", to_ir)

    return patch


def _index(original: Callable[..., None]) -> Callable[..., None]:
    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    return patch


def _once(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Both modules of the language that a function may name, by the first call until what it returned is restored."""
    modules = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    patched: list[Any] = []

    def patch(function: Any) -> Any:
        if patched:
            return interpreter._LangPatchScope()
        scope = original(modules)
        undo = scope.restore

        def restore() -> None:
            patched.clear()
            undo()

        scope.restore = restore
        patched.append(scope)
        return scope

    return patch
