"""Tables of launch configurations, a YAML file for each arch: those here, and others that a user has measured."""

import os
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moe_ep.kernels.launch import (
    FP8_KERNELS,
    REGISTER_KERNELS,
    Gemm,
    LaunchConfig,
    Regime,
    Table,
    has_bf16_products,
)

DIRECTORY_VARIABLE = "MOE_EP_TABLES"
"""A directory whose `<arch>.yaml` are taken before those of the package."""

GLUON_TABLE = "gfx942-gluon"
"""The name of gluon_kernel's table, beside triton_kernel's gfx942."""


class TableError(ValueError):
    """A table that cannot be read; the message names the file, the key, and what would be right."""


class _Gemm(BaseModel):
    model_config = ConfigDict(extra="forbid")
    block_n: Literal[16, 32, 64, 128, 256]
    warps: Literal[1, 2, 4, 8, 16]
    stages: int = Field(ge=1, le=8)
    slices: Literal[1, 2, 4, 8] = 1

    @model_validator(mode="after")
    def _slices_are_warps(self) -> "_Gemm":
        if self.warps % self.slices:
            raise ValueError(f"warps={self.warps} must be a multiple of slices={self.slices}: each warp has one slice")
        return self

    def value(self) -> Gemm:
        return Gemm(**self.model_dump())


class _Regime(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rows: float = Field(gt=0)
    kernel: Literal["single", "stream", "warpgroup", "tile", "cdna3", "route"]
    block_m: Literal[8, 16, 32, 64, 128]
    gate_up: _Gemm
    down: _Gemm

    @model_validator(mode="after")
    def _a_kernel_takes_its_tile(self) -> "_Regime":
        for name, gemm in (("gate_up", self.gate_up), ("down", self.down)):
            if self.kernel not in REGISTER_KERNELS and gemm.slices != 1:
                raise ValueError(f"{name}: slices={gemm.slices}, but only {', '.join(REGISTER_KERNELS)} slice K")
            if self.kernel == "route" and gemm.warps > 2 * gemm.slices:
                raise ValueError(f"{name}: warps={gemm.warps}: the route kernel has one or two for each slice")
            if self.kernel in REGISTER_KERNELS and gemm.block_n % (16 * (gemm.warps // gemm.slices)):
                raise ValueError(f"{name}: block_n={gemm.block_n} must be a multiple of 16 for each warp of a slice")
            if self.kernel == "warpgroup" and (gemm.block_n not in (64, 128) or gemm.stages < 3 or gemm.warps != 4):
                raise ValueError(f"{name}: a warpgroup kernel has 4 warps, block_n = 64 or 128 and stages >= 3")
        if self.kernel == "single" and (self.block_m > 16 or self.gate_up != self.down):
            raise ValueError(f"block_m={self.block_m}: the single kernel takes 8 or 16 tokens, and one tile for both")
        if self.kernel == "warpgroup" and self.block_m < 32:
            raise ValueError(f"block_m={self.block_m}: the warpgroup kernel takes 32 and more")
        if self.kernel == "route" and self.block_m != 16:
            raise ValueError(f"block_m={self.block_m}: the route kernel takes one route in 16 columns; write 16")
        if self.kernel == "cdna3" and self.block_m not in (16, 32):
            raise ValueError(f"block_m={self.block_m}: the cdna3 kernel takes 16 and 32, a wave holds no more")
        if self.kernel == "tile" and self.block_m < 16:
            raise ValueError(f"block_m={self.block_m}: the tile kernel takes 16 and more")
        return self


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid")
    arch: str
    source: str
    regimes: list[_Regime] = Field(min_length=1)
    fp8: list[_Regime] = []

    @model_validator(mode="after")
    def _rows_rise(self) -> "_Table":
        for rows in ([regime.rows for regime in regimes] for regimes in (self.regimes, self.fp8)):
            if rows != sorted(set(rows)):
                raise ValueError(f"the regimes' rows are {rows}; they must rise")
        return self

    @model_validator(mode="after")
    def _the_arch_has_the_kernels(self) -> "_Table":
        for regime in self.fp8:
            if self.arch not in ("gfx942", GLUON_TABLE) or regime.kernel not in FP8_KERNELS:
                raise ValueError(f"fp8, rows {regime.rows}: it is for gfx942 and kernels {', '.join(FP8_KERNELS)}")
            if regime.kernel == "route" and self.arch != GLUON_TABLE:
                raise ValueError(f"fp8, rows {regime.rows}: route, which only {GLUON_TABLE}.yaml has")
            if not 16 <= regime.block_m <= 64:
                raise ValueError(f"fp8, rows {regime.rows}: block_m={regime.block_m}, from 16 to 64 are taken")
        for regime in self.regimes:
            if regime.kernel == "warpgroup" and self.arch != "sm90":
                raise ValueError(f"rows {regime.rows}: the warpgroup kernel is for sm90, not {self.arch}")
            if (regime.kernel in ("cdna3", "route")) != (self.arch == GLUON_TABLE):
                raise ValueError(f"rows {regime.rows}: {regime.kernel}, but cdna3 and route make up {GLUON_TABLE}.yaml")
            pairs = regime.kernel == "stream" and regime.block_m >= 16 and self.arch.startswith("sm")
            if (pairs or regime.kernel == "single") and not has_bf16_products(self.arch):
                raise ValueError(
                    f"rows {regime.rows}: {regime.kernel} with block_m={regime.block_m} is for sm90 and newer, not "
                    f"{self.arch}"
                )
            if regime.kernel == "stream" and regime.block_m < 16 and not self.arch.startswith("sm"):
                raise ValueError(f"rows {regime.rows}: block_m={regime.block_m}, but {self.arch} takes 16 and more")
        return self


def read(path: Path) -> Table:
    """The table in a file.

    Raises
    ------
    TableError
        If it is no table, or one for another arch than its name says.
    """
    try:
        table = _Table.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise TableError(f"{path}: not YAML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the table"
        raise TableError(f"{path}: {key}: {first['msg']}") from None
    if table.arch != path.stem:
        raise TableError(f"{path}: arch is {table.arch!r}, but the file is named for {path.stem!r}")
    regimes, fp8 = (
        tuple(Regime(r.rows, LaunchConfig(r.kernel, r.block_m, r.gate_up.value(), r.down.value())) for r in found)
        for found in (table.regimes, table.fp8)
    )
    return Table(table.arch, f"{path}: {table.source}", regimes, fp8)


def text(table: Table) -> str:
    """The table as a file has it."""
    document = {"arch": table.arch, "source": table.source, "regimes": _plain(table.regimes)}
    if table.fp8:
        document["fp8"] = _plain(table.fp8)
    return yaml.safe_dump(document, sort_keys=False, width=120, default_flow_style=None)


def _plain(regimes: tuple[Regime, ...]) -> list[dict[str, Any]]:
    rows = []
    for regime in regimes:
        config = regime.config
        gemms = {name: dict(vars(gemm)) for name, gemm in (("gate_up", config.gate_up), ("down", config.down))}
        rows.append({"rows": regime.rows, "kernel": config.kernel, "block_m": config.block_m, **gemms})
    return rows


def write(path: Path, table: Table) -> None:
    """Write the table, atomically."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text(table), encoding="utf-8")
    partial.replace(path)


def find(arch: str) -> Table | None:
    """The table of an arch ("sm90", "gfx942"): the user's, or the package's, or None."""
    return _find(arch, directory())


def directory() -> str | None:
    """The user's directory of tables."""
    return os.environ.get(DIRECTORY_VARIABLE)


@cache
def _find(arch: str, own: str | None) -> Table | None:
    places = [Path(own)] if own else []
    for place in (*places, Path(__file__).parent):
        path = place / f"{arch}.yaml"
        if path.is_file():
            return read(path)
    return None
