"""What the compiler makes of the kernels for gfx942: the invariants, and the committed tables."""

import re
from collections import Counter
from dataclasses import replace

import pytest
import triton

from moe_ep.spec import ActivationDtype
from tests.gfx942.assembly import parse
from tests.gfx942.compiled import LDS_BYTES, Resources, classes, occupancy
from tests.gfx942.configurations import SHAPES, WORKLOADS, RankShape, Workload, configurations, costs, launches
from tests.gfx942.cost import COMPUTE_UNITS, Cost, cost, mfma_cycles
from tests.gfx942.tables import committed, compiled_rows

KERNELS = ("kernel", "stream", "stream_fp8", "cdna3", "route", "route_fp8")
GEMMS = tuple(f"{gemm}_{kernel} " for kernel in KERNELS for gemm in ("gate_up", "down"))


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: shape.name)
def made(request: pytest.FixtureRequest) -> dict[str, Resources]:
    shape: RankShape = request.param
    return configurations(shape)


def gemms(made: dict[str, Resources]) -> dict[str, Resources]:
    return {key: value for key, value in made.items() if any(name in key for name in GEMMS)}


def test_every_block_of_rows_is_chosen_for_some_number_of_tokens(made: dict[str, Resources]) -> None:
    found = {re.search(r"(?:up|down)_(\w+) (\d+)", key).groups() for key in gemms(made)}  # type: ignore[union-attr]
    rows = {kernel: {size for name, size in found if name == kernel} for kernel in KERNELS}
    assert rows["kernel"] | rows["stream"] == rows["stream_fp8"] == {"16", "32", "64"}
    assert rows["cdna3"] == {"16", "32"}
    assert rows["route"] == rows["route_fp8"]


def test_nothing_is_spilled_and_lds_fits(made: dict[str, Resources]) -> None:
    for key, value in made.items():
        assert (value.spills, value.scratch) == (0, 0), key
        assert value.lds <= LDS_BYTES, key
        assert value.occupancy >= 1, key


def test_the_main_loops_load_no_bytes_and_no_halves(made: dict[str, Resources]) -> None:
    for key, value in gemms(made).items():
        assert min(value.loop_loads) >= 4, key
        assert value.loop_loads[16] >= (2 if "gate_up" in key else 1), key


def test_gluon_s_kernels_hold_weights_in_vector_registers_alone(made: dict[str, Resources]) -> None:
    """LDS has what warps add up and one row of activations; sums that lay in accumulation registers would be copied."""
    found = {key: value for key, value in made.items() if "_cdna3" in key or "_route" in key}
    assert len(found) >= 7
    for key, value in found.items():
        assert value.agpr == 0, key
        assert value.lds <= (0 if "_cdna3" in key else 16384), key
        assert value.occupancy >= 2, key


@pytest.mark.parametrize(
    ("tokens", "activation_dtype", "impl"),
    [
        *((tokens, dtype, "triton_kernel") for tokens in (12, 40, 128) for dtype in ("bf16", "fp8")),
        *((tokens, "bf16", "gluon_kernel") for tokens in (1, 12, 40)),
        (1, "fp8", "gluon_kernel"),
    ],
)
def test_weights_are_loaded_at_16_bytes_a_lane_and_scales_by_dwords(
    tokens: int, activation_dtype: ActivationDtype, impl: str
) -> None:
    seen = []
    known = 24 if tokens == 1 else 0
    workload = Workload("any", 1, 256, 128, tokens, activation_dtype=activation_dtype, known=known)
    for launch in launches(workload, impl):
        assert launch.execution is not None
        for name, widths in launch.execution.widths.items():
            if name in ("w13_ptr", "w2_ptr"):
                assert widths == {16}
                seen.append(name)
            elif name == "scale_ptr":
                assert widths == {4}
    assert seen == ["w13_ptr", "w2_ptr"]


def test_the_matrix_units_do_the_products_in_bf16_or_a_block_at_a_time_in_fp8(made: dict[str, Resources]) -> None:
    for key, value in gemms(made).items():
        bf16 = {"f32_16x16x16_bf16", "f32_32x32x8_bf16"}
        assert set(value.mfma) <= ({"f32_16x16x32_fp8_fp8"} if "fp8" in key else bf16), key
        assert value.mfma, key


def test_the_committed_table_is_what_the_compiler_makes() -> None:
    version, rows = committed("compiled")
    if version != triton.__version__:
        pytest.skip(f"the table is of Triton {version}, this is {triton.__version__}")
    assert compiled_rows() == rows, "run: python -m tests.gfx942 compiled --write, and commit what it changes"


@pytest.mark.parametrize("workload", [w for w in WORKLOADS if w.name.startswith("narrow")], ids=lambda w: w.name)
def test_the_committed_costs_are_those_that_are_counted(workload: object) -> None:
    version, rows = committed("cost")
    if version != triton.__version__:
        pytest.skip(f"the table is of Triton {version}, this is {triton.__version__}")
    for key, value in costs(workload).items():  # type: ignore[arg-type]
        row = rows[f"{workload.name}: {key}"]  # type: ignore[attr-defined]
        assert {name: row[name] for name in ("valu", "mfma", "lds", "vmem")} == {
            "valu": value.valu, "mfma": value.mfma, "lds": value.lds, "vmem": value.vmem,
        }, "run: python -m tests.gfx942 cost --write, and commit what it changes"  # fmt: skip


def test_a_product_executes_the_matrix_instructions_that_its_shape_takes() -> None:
    """Counted from the shape: 12 routes of two experts, each padded to 16 rows, by instructions of 16×16×16, or ×32."""
    narrow = next(workload for workload in WORKLOADS if workload.name == "narrow decode")
    gate_up = 2 * 16 * 2 * narrow.inner * narrow.hidden
    for activation_dtype, suffix, each in (("bf16", "", 16 * 16 * 16), ("fp8", "_fp8", 16 * 16 * 32)):
        counted = costs(replace(narrow, activation_dtype=activation_dtype))  # type: ignore[arg-type]
        by_kernel = {key.split()[0]: value for key, value in counted.items()}
        assert by_kernel[f"gate_up_stream{suffix}"].mfma == gate_up // each
        assert by_kernel[f"down_stream{suffix}"].mfma == gate_up // 2 // each


@pytest.mark.skipif(triton.__version__ != committed("cost")[0], reason="the table is of another Triton")
@pytest.mark.parametrize(
    ("kernels", "most"), [("stream ", 3), ("cdna3 ", 2), ("route ", 2), ("stream_fp8 ", 2), ("route_fp8 ", 2)]
)
def test_decode_takes_so_few_operations_a_weight_that_memory_bounds_it(kernels: str, most: float) -> None:
    kind = "single" if kernels.startswith("route") else "decode"
    rows = {key: row for key, row in committed("cost")[1].items() if kind in key and kernels in key}
    assert len(rows) == 6
    if kind == "single":  # made for V4's widths: at K = 1024 its start and end are as long as what is between
        rows = {key: row for key, row in rows.items() if not key.startswith("narrow")}
    for key, row in rows.items():
        assert row["valu/weight"] <= most, key
        assert row["valu µs"] < row["hbm µs"], key


@pytest.mark.skipif(triton.__version__ != committed("cost")[0], reason="the table is of another Triton")
@pytest.mark.parametrize(
    "workload", [f"{m} {kind}" for m in ("flash", "pro") for kind in ("decode", "single", "decode, fp8", "single, fp8")]
)
def test_what_is_beside_gluon_s_gemms_adds_at_most_a_tenth_on_v4_s_widths(workload: str) -> None:
    rows = {key.removeprefix(f"{workload}: "): row["valu"] for key, row in committed("cost")[1].items()}
    gemms = sum(n for key, n in rows.items() if key.startswith(("gate_up", "down")) and "_stream " not in key)
    assert 0 < gemms <= rows["gluon_kernel, whole op"] <= 1.1 * gemms


@pytest.mark.skipif(triton.__version__ != committed("cost")[0], reason="the table is of another Triton")
@pytest.mark.parametrize("workload", ["narrow decode", "narrow prefill", "flash decode", "flash prefill", "pro decode"])
def test_gluon_counts_less_than_triton(workload: str) -> None:
    rows = committed("cost")[1]
    whole = {impl: rows[f"{workload}: {impl}, whole op"] for impl in ("gluon_kernel", "triton_kernel")}
    assert whole["gluon_kernel"]["valu"] < whole["triton_kernel"]["valu"]
    assert whole["gluon_kernel"]["mfma µs"] <= whole["triton_kernel"]["mfma µs"]


@pytest.mark.skipif(triton.__version__ != committed("cost")[0], reason="the table is of another Triton")
def test_to_round_activations_is_a_tenth_of_what_v4s_decode_takes_at_most() -> None:
    rows = committed("cost")[1]
    for model in ("flash", "pro"):
        valu = {key.split()[3]: row["valu"] for key, row in rows.items() if key.startswith(f"{model} decode, fp8")}
        rounding = valu["quantise_tokens"] + valu["quantise_routes"]
        assert rounding <= 0.1 * (valu["gate_up_stream_fp8"] + valu["down_stream_fp8"]), model


@pytest.mark.parametrize(
    ("vgpr", "agpr", "sgpr", "lds", "waves", "expected"),
    [
        (32, 0, 32, 0, 4, 8),  # nothing binds
        (64, 0, 32, 0, 4, 8),
        (65, 0, 32, 0, 4, 7),  # 72 registers
        (128, 0, 32, 0, 4, 4),
        (100, 28, 32, 0, 4, 4),
        (101, 28, 32, 0, 4, 3),  # 104 + 28 = 132 → 136
        (256, 256, 32, 0, 4, 1),
        (32, 0, 102, 0, 4, 7),  # 112 scalars
        (32, 0, 32, 65536, 4, 1),
        (32, 0, 32, 20480, 4, 3),  # three workgroups of a wave a SIMD
        (32, 0, 32, 20480, 8, 6),
        (128, 0, 32, 0, 8, 4),
        (256, 0, 32, 0, 8, 2),
        (32, 0, 32, 32768, 1, 1),  # two waves on four SIMDs
    ],
)
def test_occupancy_is_what_registers_and_lds_allow(
    vgpr: int, agpr: int, sgpr: int, lds: int, waves: int, expected: int
) -> None:
    assert occupancy(vgpr, agpr, sgpr, lds, waves) == expected


def test_matrix_instructions_take_the_cycles_of_the_data_sheet() -> None:
    # 980.6 TFLOP/s of bf16 and 1961.2 of fp8 on 228 compute units at 2.1 GHz.
    for opcode, flops, rate in (
        ("v_mfma_f32_16x16x16_bf16", 2 * 16 * 16 * 16, 980.6e12),
        ("v_mfma_f32_32x32x16_fp8_fp8", 2 * 32 * 32 * 16, 1961.2e12),
    ):
        a_second = COMPUTE_UNITS * 4 * 2.1e9 / mfma_cycles(opcode)
        assert a_second * flops == pytest.approx(rate, rel=2e-3)


def test_a_cost_adds_up_by_class_and_bounds_by_the_rates() -> None:
    executed = Counter({"v_add_u32_e32": 100, "v_mfma_f32_16x16x16_bf16": 8, "ds_read_b128": 3, "s_nop": 5,
                        "buffer_load_dwordx4": 2, "s_endpgm": 1})  # fmt: skip
    assert classes(executed) == {"valu": 100, "mfma": 8, "lds": 3, "vmem": 2, "scalar": 6}
    got = cost(executed, weights=3200, distinct_bytes=53)
    assert got == Cost(100, 8, 3, 2, 6, 8 * 16, 3200, 53)
    assert got.valu_per_weight == 2
    assert got.bounds["hbm"] == pytest.approx(1e-11)
    assert got.bounds["valu"] == pytest.approx(100 / (228 * 2.1e9))
    assert got.bounds["mfma"] == pytest.approx(128 / (228 * 4 * 2.1e9))


def test_loops_are_told_from_what_surrounds_them() -> None:
    from tests.gfx942.compiled import _in_loops
    from tests.gfx942.test_machine import KERNEL

    text = KERNEL.format(x=16, y=0).replace("\tv_lshlrev", ".Lhere:\n\tv_lshlrev").replace(
        "\ts_endpgm", "\ts_cbranch_scc1 .Lhere\n\ts_endpgm"
    )  # fmt: skip
    assert _in_loops(parse(text)) == [False, True, True, True, True, False]
