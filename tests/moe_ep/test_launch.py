"""Launch configurations for every problem: tables by arch and regime, made to fit, and the fallback."""

from dataclasses import replace
from pathlib import Path

import pytest

from moe_ep import tables
from moe_ep.kernels.launch import FALLBACK, Gemm, LaunchConfig, Regime, Table, choose, choose_fp8, fit, tile
from moe_ep.order import padded
from moe_ep.tables import TableError

SHIPPED = sorted(path.stem for path in Path(tables.__file__).parent.glob("*.yaml"))
FLASH, PRO = (256, 4096, 2048), (384, 7168, 3072)


@pytest.mark.parametrize("warp_size", [32, 64])
@pytest.mark.parametrize(("rows", "block_m"), [(0.001, 16), (12, 16), (20, 32), (48, 64)])
def test_a_fallback_tile_holds_the_routes_that_most_experts_have(rows: float, block_m: int, warp_size: int) -> None:
    config = tile(rows, warp_size)
    assert (config.kernel, config.block_m) == ("tile", block_m)


@pytest.mark.parametrize("arch", SHIPPED)
@pytest.mark.parametrize(("experts", "hidden", "inner"), [FLASH, PRO, (256, 4096, 512), (8, 160, 96), (7, 32, 32)])
@pytest.mark.parametrize("routes", [1, 6, 1000, 49152, 10**7])
def test_what_is_chosen_divides_the_problem_or_takes_any(
    arch: str, experts: int, hidden: int, inner: int, routes: int
) -> None:
    config = choose(tables.find(arch), routes, 1, experts, hidden, inner)
    for gemm, k, n in ((config.gate_up, hidden, inner), (config.down, inner, hidden // 2)):
        if config.kernel in ("single", "stream"):
            assert n % gemm.block_n == 0
            assert k % (128 * gemm.slices * gemm.stages) == 0
            assert gemm.block_n % (16 * (gemm.warps // gemm.slices)) == 0
        elif config.kernel == "warpgroup":
            assert n % gemm.block_n == 0
            assert k % 128 == 0
            assert gemm.stages >= 3
            assert gemm.block_n in (64, 128)


@pytest.mark.parametrize("arch", SHIPPED)
@pytest.mark.parametrize(("experts", "hidden", "inner"), [FLASH, PRO, (256, 4096, 512)])
def test_the_kernels_of_a_table_take_v4_at_every_size(arch: str, experts: int, hidden: int, inner: int) -> None:
    table = tables.find(arch)
    assert table is not None
    for regime in table.regimes:
        assert fit(regime.config, hidden, inner) is not None


def test_slices_and_stages_shrink_until_they_divide_k() -> None:
    wide = Gemm(block_n=64, warps=16, stages=4, slices=4)
    fitted = fit(LaunchConfig("stream", 8, wide, wide), hidden=128 * 6, inner=128 * 5)
    assert fitted is not None
    assert fitted.gate_up == Gemm(block_n=64, warps=8, stages=3, slices=2)  # 6 groups: 2 slices of 3 steps
    assert fitted.down == Gemm(block_n=64, warps=4, stages=1, slices=1)  # 5 groups are divided by nothing


def test_tiles_of_both_gemms_of_many_rows_stay_alike() -> None:
    gemm = Gemm(block_n=128, warps=4, stages=8)
    fitted = fit(LaunchConfig("warpgroup", 32, gemm, gemm), hidden=2688, inner=512)
    assert fitted is not None
    assert fitted.gate_up == fitted.down == replace(gemm, block_n=64), "1344 rows of half of H are 21 tiles of 64"


def test_the_single_kernel_s_one_tile_divides_both_gemms() -> None:
    wide = Gemm(block_n=16, warps=4, stages=2, slices=4)
    assert fit(LaunchConfig("single", 8, wide, wide), 4096, 2048) == LaunchConfig("single", 8, wide, wide)
    narrow = fit(LaunchConfig("single", 8, wide, wide), 4096, 512)
    assert narrow is not None
    assert narrow.gate_up == narrow.down == replace(wide, stages=1)  # 4 groups of I are one step of 4 slices
    assert fit(LaunchConfig("single", 8, wide, wide), 4096, 160) is None
    deep = Gemm(block_n=16, warps=2, stages=4, slices=2)
    both = fit(LaunchConfig("single", 8, deep, deep), 4096, 1536)
    assert both is not None
    assert both.down == replace(deep, stages=2)  # 16 and 6 steps: of 4, 3 and 2 stages only 2 divide both


def test_more_tokens_than_the_single_kernel_takes_are_the_next_regime_s() -> None:
    table = tables.find("sm90")
    assert table is not None
    for experts, hidden, inner in (FLASH, PRO):
        assert choose(table, 8, 6, experts, hidden, inner).kernel == "single"
        assert choose(table, 9, 4, experts, hidden, inner).kernel == "stream", "with fewer routes"


def test_stages_shrink_until_shared_memory_holds_them() -> None:
    deep = Gemm(block_n=64, warps=4, stages=8)
    fitted = fit(LaunchConfig("warpgroup", 128, deep, deep), 4096, 256)
    assert fitted is not None
    assert fitted.gate_up.stages == 5, "of 40.5 KiB each"
    assert fitted.down.stages == 5, "the next tile's groups are copied ahead too"


@pytest.mark.parametrize("kernel", ["stream", "warpgroup"])
def test_a_k_of_broken_groups_falls_back(kernel: str) -> None:
    gemm = Gemm(block_n=64, warps=4, stages=3)
    config = LaunchConfig(kernel, 32, gemm, gemm)  # type: ignore[arg-type]
    assert fit(config, 160, 128) is None
    assert choose(Table("x", "", (Regime(1e9, config),)), 1, 1, 1, 160, 128).kernel == "tile"


def test_where_a_regime_cannot_fit_one_for_fewer_rows_is_taken_before_the_fallback() -> None:
    few = LaunchConfig("stream", 16, *(Gemm(block_n=64, warps=4, stages=2),) * 2)
    many, most = (
        LaunchConfig("warpgroup", block_m, *(Gemm(block_n=64, warps=4, stages=4),) * 2) for block_m in (64, 512)
    )
    table = Table("x", "", (Regime(4, few), Regime(1e9, many)))
    assert choose(table, 800, 1, 8, 4096, 512).kernel == "warpgroup"
    assert choose(table, 800, 1, 8, 4096, 96).kernel == "tile"
    table = Table("x", "", (Regime(4, few), Regime(1e9, most)))
    assert choose(table, 800, 1, 8, 4096, 512).kernel == "stream", (
        "three groups of 512 routes are more than there is room"
    )


@pytest.mark.parametrize("regime", ["kernel: single, block_m: 8", "kernel: stream, block_m: 16"])
@pytest.mark.parametrize("arch", ["sm80", "sm90", "gfx942"])
def test_what_multiplies_pairs_is_for_hopper_and_newer(tmp_path: Path, arch: str, regime: str) -> None:
    path = tmp_path / f"{arch}.yaml"
    gemms = "gate_up: &g {block_n: 16, warps: 4, stages: 2, slices: 4}, down: *g"
    path.write_text(f"arch: {arch}\nsource: a test\nregimes: [{{rows: 1, {regime}, {gemms}}}]")
    if arch == "sm90" or (arch == "gfx942" and "stream" in regime):
        assert len(tables.read(path).regimes) == 1
    else:
        with pytest.raises(TableError, match=f"is for sm90 and newer, not {arch}"):
            tables.read(path)


def test_a_table_is_for_the_arch_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "sm91.yaml"
    path.write_text(GOOD)
    with pytest.raises(TableError, match="named for 'sm91'"):
        tables.read(path)


def test_an_arch_without_a_table_has_the_fallback() -> None:
    assert tables.find("sm75") is None
    assert choose(None, 1, 6, 256, 4096, 2048).kernel == "tile"
    assert "any device" in FALLBACK


@pytest.mark.parametrize("arch", SHIPPED)
def test_a_table_comes_back_as_it_was_written(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tables.find(arch)
    assert table is not None
    (tmp_path / f"{arch}.yaml").write_text(tables.text(table))
    monkeypatch.setenv(tables.DIRECTORY_VARIABLE, str(tmp_path))
    again = tables.find(arch)
    assert again is not None
    assert (again.regimes, again.fp8) == (table.regimes, table.fp8)
    assert bool(table.fp8) == arch.startswith("gfx942")
    assert str(tmp_path) in again.source, "a user's table goes before the package's, and the source says so"


@pytest.mark.parametrize("table", [None, Table("x", "", ()), tables.find("gfx942")], ids=["none", "without fp8", "own"])
@pytest.mark.parametrize(("hidden", "inner"), [(4096, 2048), (7168, 3072), (4096, 512), (160, 96), (32, 32)], ids=str)
def test_fp8_activations_find_a_stream_kernel_for_every_shape(table: Table | None, hidden: int, inner: int) -> None:
    for rows, block_m in ((0.1, 16), (12, 16), (20, 32), (1000, 64)):
        config = choose_fp8(table, int(rows * 100), 100, hidden, inner)
        assert (config.kernel, config.block_m) == ("stream", block_m)
        for gemm, k, n in ((config.gate_up, hidden, inner), (config.down, inner, hidden // 2)):
            assert padded(k) // 128 % (gemm.slices * gemm.stages) == 0
            assert n % gemm.block_n == 0
            assert gemm.stages == 1 or block_m < 64, "two stages of 64 rows spill"


FP8 = "{rows: 2, kernel: stream, block_m: 16, gate_up: &g {block_n: 64, warps: 4, stages: 2}, down: *g}"
GOOD = """
arch: sm90
source: a test
regimes:
- rows: 4
  kernel: stream
  block_m: 8
  gate_up: {block_n: 16, warps: 2, stages: 2, slices: 2}
  down: {block_n: 16, warps: 1, stages: 2}
- {rows: 9, kernel: warpgroup, block_m: 64, gate_up: &w {block_n: 64, warps: 4, stages: 4}, down: *w}
"""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("rows: 9", "rows: 3"), "must rise"),
        (("block_m: 8", "block_m: 9"), "regimes.0.block_m"),
        (("kernel: stream", "kernel: steam"), "regimes.0.kernel"),
        (("slices: 2", "slices: 4"), "multiple of slices"),
        (("kernel: stream", "kernel: single"), "takes 8 or 16 tokens, and one tile for both"),
        (("block_n: 64", "block_n: 32"), "block_n = 64 or 128"),
        (("stages: 4", "stages: 2"), "stages >= 3"),
        (("arch: sm90", "arch: sm80"), "is for sm90, not sm80"),
        (("block_m: 64", "block_m: 16"), "takes 32 and more"),
        (("kernel: warpgroup", "kernel: tile"), None),
        (("source: a test", "sauce: a test"), "source"),
        (("regimes:", "regimes: ["), "not YAML"),
        (
            ("source: a test", f"source: a test\nfp8: [{FP8}]"),
            "fp8, rows 2.*for gfx942 and kernels stream, route",
        ),
    ],
)
def test_a_bad_table_is_refused_by_file_and_key(tmp_path: Path, change: tuple[str, str], said: str | None) -> None:
    path = tmp_path / "sm90.yaml"
    path.write_text(GOOD)
    assert len(tables.read(path).regimes) == 2
    path.write_text(GOOD.replace(*change))
    if said is None:
        assert len(tables.read(path).regimes) == 2
        return
    with pytest.raises(TableError, match=said) as error:
        tables.read(path)
    assert str(path) in str(error.value)


GLUON = """
arch: gfx942-gluon
source: a test
regimes:
- {rows: 1, kernel: route, block_m: 16, gate_up: &r {block_n: 16, warps: 4, stages: 2, slices: 4}, down: *r}
- {rows: 9, kernel: cdna3, block_m: 32, gate_up: &c {block_n: 64, warps: 4, stages: 2}, down: *c}
"""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            ("warps: 4, stages: 2, slices: 4", "warps: 8, stages: 2, slices: 4"),
            "must be a multiple of 16 for each warp",
        ),
        (("block_n: 16, warps: 4, stages: 2, slices: 4", "block_n: 64, warps: 4, stages: 2"), "one or two for each"),
        (("block_m: 16", "block_m: 32"), "write 16"),
        (("block_m: 32", "block_m: 64"), "takes 16 and 32"),
        (("kernel: cdna3", "kernel: stream"), "stream, but cdna3 and route make up gfx942-gluon.yaml"),
        (("kernel: route", "kernel: tile"), "only single, stream, cdna3, route slice K"),
        (
            (
                "source: a test",
                "source: a test\nfp8: [{rows: 2, kernel: cdna3, block_m: 16, gate_up: &g {block_n: 64, "
                "warps: 4, stages: 2}, down: *g}]",
            ),
            "fp8, rows 2.*for gfx942 and kernels stream, route",
        ),
        (
            ("source: a test", f"source: a test\nfp8: [{FP8.replace('block_m: 16', 'block_m: 8')}]"),
            "block_m=8, from 16",
        ),
    ],
)
def test_a_bad_table_of_gluon_s_is_refused(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    path = tmp_path / "gfx942-gluon.yaml"
    path.write_text(GLUON)
    assert [regime.config.kernel for regime in tables.read(path).regimes] == ["route", "cdna3"]
    path.write_text(GLUON.replace(*change))
    with pytest.raises(TableError, match=said):
        tables.read(path)


def test_gluon_s_kernels_are_in_no_other_table(tmp_path: Path) -> None:
    path = tmp_path / "gfx942.yaml"
    path.write_text(GLUON.replace("gfx942-gluon", "gfx942"))
    with pytest.raises(TableError, match="route, but cdna3 and route make up gfx942-gluon"):
        tables.read(path)
    shipped = (Path(tables.__file__).parent / path.name).read_text()
    path.write_text(shipped.replace("fp8:\n", f"fp8:\n{GLUON.splitlines()[4]}\n"))
    with pytest.raises(TableError, match=r"fp8, rows 1\.0: route, which only gfx942-gluon\.yaml has"):
        tables.read(path)
