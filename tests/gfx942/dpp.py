"""DPP: a vector instruction's first source taken from other lanes of the wave."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.gfx942.faults import UnknownOpcode
from tests.gfx942.operands import Read
from tests.gfx942.waves import LANES, Waves

Array = NDArray[Any]
_LANE = np.arange(LANES)
_ROW = _LANE & ~15  # a row is 16 lanes, a bank 4
_ALL = np.ones(LANES, bool)


def _source_lanes(modifiers: dict[str, str]) -> tuple[Array, NDArray[np.bool_]]:
    """For each lane the lane that it reads, and whether there is one."""
    if "quad_perm" in modifiers:
        order = np.array([int(x) for x in modifiers["quad_perm"].strip("[]").split(",")])
        return (_LANE & ~3) + order[_LANE & 3], _ALL
    if "row_shl" in modifiers:
        source = _LANE + int(modifiers["row_shl"])
        return source, (source & ~15) == _ROW
    if "row_shr" in modifiers:
        source = _LANE - int(modifiers["row_shr"])
        return source, (source & ~15) == _ROW
    if "row_ror" in modifiers:
        return _ROW + ((_LANE - int(modifiers["row_ror"])) & 15), _ALL
    if "row_mirror" in modifiers:
        return _ROW + 15 - (_LANE & 15), _ALL
    if "row_half_mirror" in modifiers:
        return (_LANE & ~7) + 7 - (_LANE & 7), _ALL
    if modifiers.get("row_bcast") == "15":  # the last lane of each row to the next row
        return _ROW - 1, _LANE >= 16
    if modifiers.get("row_bcast") == "31":
        return np.full(LANES, 31), _LANE >= 32
    if "row_newbcast" in modifiers:
        return _ROW + int(modifiers["row_newbcast"]), _ALL
    raise UnknownOpcode(f"dpp {modifiers}")


def dpp_source(read: Read, modifiers: dict[str, str]) -> Callable[[Waves], tuple[Array, NDArray[np.bool_]]]:
    """(the moved values, which lanes are written).

    A source lane that is outside the row or inactive gives 0 with bound_ctrl, else the lane is not written.
    """
    source, exists = _source_lanes(modifiers)
    source = np.clip(source, 0, LANES - 1)
    rows, banks = (int(modifiers.get(f"{name}_mask", "0xf"), 0) for name in ("row", "bank"))
    enabled = ((rows >> (_LANE >> 4)) & 1).astype(bool) & ((banks >> ((_LANE >> 2) & 3)) & 1).astype(bool)
    bound = "bound_ctrl" in modifiers

    def moved(waves: Waves) -> tuple[Array, NDArray[np.bool_]]:
        values = np.broadcast_to(read(waves), (waves.count, LANES))
        valid = exists & waves.lanes[:, source]
        return np.where(valid, values[:, source], values.dtype.type(0)), enabled & (valid | bound)

    return moved
