"""The benchmark and the tuner, on a CPU."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from benchmarks.peers import Stage, ratios, stages
from moe_ep import tables
from moe_ep.backends.call import Impl
from moe_ep.bench import peers, report, tuner
from moe_ep.bench.cases import SHAPES, Batch, RankShape, Routing, Weights, random_batch, random_weights
from moe_ep.bench.check import check
from moe_ep.bench.clock import Rates
from moe_ep.bench.contenders import CONTENDERS, OURS, Contender
from moe_ep.bench.peers import Op
from moe_ep.bench.runs import Line, relative_error, time_shape
from moe_ep.bench.tuner import families, table_of, tuned_impl
from moe_ep.kernels.launch import Gemm, LaunchConfig
from tests.engines.on_cpu import forgotten, installed_at
from tests.gfx942.driver import emulated
from tests.waiting import PATIENCE_S

CPU = torch.device("cpu")
TINY = SHAPES["tiny"]


def test_a_rank_holds_its_share_and_an_expert_takes_its_packed_bytes() -> None:
    assert SHAPES["pro-ep32"].held == 12
    assert SHAPES["flash-ep8-i512"].expert_bytes == 3 * 4096 * 512 * 17 / 32
    assert SHAPES["flash-ep4"].route_flops == 2 * 3 * 4096 * 2048


@pytest.mark.parametrize("routing", ["uniform", "zipf", "one"])
def test_a_token_takes_distinct_experts_and_the_rank_has_work(routing: str) -> None:
    shape = SHAPES["pro-ep16"]
    batch = random_batch(shape, 50, routing, CPU, 3)  # type: ignore[arg-type]
    assert all(len(set(row)) == shape.top_k for row in batch.ids.tolist())
    assert len(batch.local(shape.held)) > 0
    assert 0 <= int(batch.ids.min()) <= int(batch.ids.max()) < shape.experts


def test_all_to_one_expert_and_zipf_are_as_skewed_as_they_say() -> None:
    shape = SHAPES["flash-ep4"]
    one = random_batch(shape, 40, "one", CPU, 0)
    assert one.local(shape.held).tolist() == [0] * 40
    counts = Counter(random_batch(shape, 2000, "zipf", CPU, 0).ids.flatten().tolist()).most_common()
    alike = Counter(random_batch(shape, 2000, "uniform", CPU, 0).ids.flatten().tolist()).most_common()
    assert counts[0][1] > 5 * counts[40][1]
    assert alike[0][1] < 3 * alike[-1][1]


def test_the_floor_is_the_larger_of_bytes_and_flops() -> None:
    assert Rates(copy=1e6, matmul=1e30).floor_us(2, 3, 10.0, 7) == 20
    assert Rates(copy=1e30, matmul=1e6).floor_us(2, 3, 10.0, 7) == 21


def _broken(shape: RankShape, weights: Weights) -> Op:
    def op(batch: Batch) -> torch.Tensor:
        raise RuntimeError("does not take this shape")

    return op


def _absent(shape: RankShape, weights: Weights) -> Op:
    raise ImportError("no module of that name")


@pytest.fixture(scope="module")
def lines() -> list[Line]:
    contenders = [Contender("broken", _broken), CONTENDERS["reference"], Contender("absent", _absent)]
    rates = Rates(copy=1e10, matmul=1e11)
    return list(time_shape(TINY, [(3, "uniform"), (70, "zipf")], contenders, rates, CPU))


def test_every_case_has_a_line_and_what_fails_does_not_end_the_run(lines: list[Line]) -> None:
    assert [(line.kernel, line.tokens) for line in lines] == [
        *(("broken", 3), ("broken", 70), ("reference", 3), ("reference", 70), ("absent", 3), ("absent", 70)),
    ]
    assert {line.failure for line in lines[4:]} == {"ImportError: no module of that name"}
    assert lines[0].failure == "RuntimeError: does not take this shape"
    few, many = lines[2:4]
    assert few.error is not None
    assert 0 < few.error < 5e-3
    assert many.error is not None, "of many tokens some are compared"
    assert 0 < many.error < 5e-3
    assert few.eager is not None
    assert few.ratio == few.eager / few.floor
    assert few.gb_per_s == pytest.approx(few.hit * TINY.expert_bytes / few.eager / 1e3)
    assert (lines[0].eager, lines[0].ratio, lines[0].gb_per_s) == (None, None, None)


def test_lines_are_printed_kept_and_drawn(lines: list[Line], tmp_path: Path) -> None:
    about = {"device": "CPU", "torch": "2", "triton": "3", "date": "today"}
    assert "failed: RuntimeError" in report.row(lines[0])
    assert len(report.row(lines[2]).split()) == len(report.heading().split()) == len(report.COLUMNS)
    report.save(tmp_path / "lines.json", about, lines)
    assert json.loads((tmp_path / "lines.json").read_text())["lines"][2]["kernel"] == "reference"
    header, again = report.load(tmp_path / "lines.json")
    assert header == about
    assert again == lines
    report.plot(tmp_path / "lines.png", header, again)
    assert (tmp_path / "lines.png").read_bytes().startswith(b"\x89PNG")


def test_a_kernel_whose_time_is_used_up_is_left_and_the_next_one_is_timed() -> None:
    def slow(shape: RankShape, weights: Weights) -> Op:
        def op(batch: Batch) -> torch.Tensor:
            while True:
                time.sleep(0.01)

        return op

    cases: list[tuple[int, Routing]] = [(1, "uniform"), (2, "uniform")]
    rates = Rates(copy=1e10, matmul=1e11)
    started = time.monotonic()
    list(time_shape(TINY, cases, [CONTENDERS["reference"]], rates, CPU))
    enough = 1 + 5 * (time.monotonic() - started)
    contenders = [Contender("slow", slow), CONTENDERS["reference"]]
    lines = list(time_shape(TINY, cases, contenders, rates, CPU, limit=enough))
    assert [(line.kernel, line.failure) for line in lines] == [
        *[("slow", "TimeoutError: its time was used up")] * 2,
        *[("reference", None)] * 2,
    ]


def _timed(kernel: str, tokens: int, eager: float | None, graph: float | None) -> Line:
    return Line("tiny", tokens, "uniform", kernel, 1, 1, 1, eager, graph, None, None, None)


def test_a_peer_is_compared_where_both_have_a_time_and_the_slowest_peers_come_last() -> None:
    lines = [
        *(_timed(OURS, 1, 20, 10), _timed(OURS, 8, 20, None)),
        *(_timed("marlin", 1, 10, 30), _timed("marlin", 8, 40, 40), _timed("marlin", 64, 1, 1)),
    ]
    assert [(ratio.times, ratio.way, ratio.tokens) for ratio in sorted(ratios(lines))] == [
        *((0.5, "host", 1), (2, "host", 8), (3, "graph", 1)),
    ]
    order = stages(["flash-ep4", "pro-ep8"], [OURS, "marlin", "xkernels"])
    assert [(stage.kernels, stage.shapes, stage.routings) for stage in order] == [
        ((OURS, "marlin"), ("flash-ep4", "pro-ep8"), ("uniform",)),
        ((OURS, "marlin"), ("flash-ep4",), ("zipf", "one")),
        (("xkernels",), ("flash-ep4", "pro-ep8"), ("uniform",)),
        (("xkernels",), ("flash-ep4",), ("zipf", "one")),
    ]


def test_peers_that_are_not_installed_are_left_out() -> None:
    assert not CONTENDERS["marlin"].available
    assert CONTENDERS["reference"].available


@pytest.fixture
def fresh_tokenspeed() -> Iterator[None]:
    """The peer's kernel is imported anew within, whatever was imported before."""
    peers._tokenspeed_kernel.cache_clear()
    with forgotten("tokenspeed_kernel", "tokenspeed_triton"):
        yield
    peers._tokenspeed_kernel.cache_clear()


_TOKENSPEED = """
from tokenspeed_kernel.ops.moe.triton._beside import tl

def triton_mxfp4_moe_weights(plan, layer):
    assert plan["internal_activation_dtype"] == "input"
    assert layer.w13_weight.shape[1] == 2 * layer.w2_weight.shape[2] * 2

def triton_mxfp4_precomputed_moe_apply(plan, x, layer, router_logits, topk_weights, topk_ids):
    return topk_ids
"""


def test_of_tokenspeed_only_its_portable_kernel_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_tokenspeed: None
) -> None:
    if any(installed_at(package) for package in ("tokenspeed_kernel", "tokenspeed_triton")):
        pytest.skip("the installed package is tested instead: both cannot be imported in one process")
    folder = tmp_path / "tokenspeed_kernel/ops/moe/triton"
    folder.mkdir(parents=True)
    for parent in (folder, *list(folder.parents)[:3]):
        (parent / "__init__.py").write_text("import cutlass, flashinfer")
    (folder / "_beside.py").write_text("from tokenspeed_triton import language as tl\nimport tokenspeed_triton")
    (folder / "mxfp4.py").write_text(_TOKENSPEED)
    monkeypatch.syspath_prepend(tmp_path)
    assert CONTENDERS["tokenspeed"].available
    op = CONTENDERS["tokenspeed"].prepare(TINY, random_weights(TINY, CPU, 0))
    batch = random_batch(TINY, 9, "uniform", CPU, 0)
    assert torch.equal(op(batch), torch.where(batch.ids < TINY.held, batch.ids, -1)), "experts are local, or -1"
    assert not [name for name in sys.modules if name.startswith("tokenspeed_kernel")], "later imports get all of it"


@pytest.mark.skipif(not installed_at("tokenspeed_kernel"), reason="tokenspeed-kernel is not installed")
@pytest.mark.parametrize("routing", ["uniform", "one"])
def test_tokenspeed_s_kernel_is_called_as_it_wants(
    routing: Routing, monkeypatch: pytest.MonkeyPatch, fresh_tokenspeed: None
) -> None:
    kernel = peers._tokenspeed_kernel()
    monkeypatch.setattr(kernel, "triton_mxfp4_moe_weights", lambda plan, layer: None)  # these two want a GPU's tensors
    monkeypatch.setattr(
        kernel, "_validate", lambda plan, x, layer, weights, ids, *_: (weights, ids, plan["activation"])
    )
    monkeypatch.setattr(kernel, "_num_programs", lambda *_: 5)
    weights, batch = random_weights(TINY, CPU, 0), random_batch(TINY, 9, routing, CPU, 1)
    with emulated():
        assert relative_error(CONTENDERS["tokenspeed"].prepare(TINY, weights), weights, batch) < 5e-3


@pytest.mark.parametrize(
    ("arch", "rows", "kernels"),
    [
        ("sm90", 0.1, {("single", 8), ("stream", 8), ("stream", 16)}),
        ("sm90", 2.0, {("stream", 8), ("stream", 16), ("warpgroup", 32)}),
        ("sm80", 0.1, {("stream", 8), ("tile", 16)}),
        ("sm90", 100.0, {("warpgroup", 32), ("warpgroup", 64), ("warpgroup", 128)}),
        ("gfx942", 0.1, {("stream", 16), ("tile", 16)}),
        ("gfx942", 100.0, {("tile", 32), ("tile", 64)}),
        ("sm75", 40.0, {("tile", 16), ("tile", 32), ("tile", 64), ("tile", 128)}),
    ],
)
def test_the_tuner_tries_what_an_arch_has_and_rows_need(arch: str, rows: float, kernels: set[tuple[str, int]]) -> None:
    assert {(kernel, block_m) for kernel, block_m, _ in families(arch, rows)} == kernels


@pytest.mark.parametrize(
    ("rows", "kernels"),
    [(0.1, {("route", 16), ("cdna3", 16)}), (20, {("cdna3", 16), ("cdna3", 32)}), (500, {("cdna3", 32)})],
)
def test_the_tuner_tries_gluon_s_kernels_by_rows(rows: float, kernels: set[tuple[str, int]]) -> None:
    assert {(kernel, block_m) for kernel, block_m, _ in families("gfx942", rows, "gluon_kernel")} == kernels


def test_the_check_takes_gluon_first_where_it_runs_and_compares_the_others_with_it() -> None:
    shape = RankShape("small", 256, 128, 4, 2, top_k=2)
    with emulated():
        assert tuned_impl() == "gluon_kernel"
        lines = list(check(shape, [3], CPU))
        fp8 = list(check(shape, [2], CPU, "fp8"))
    assert all(line.wrong is None for line in fp8)
    assert [line.same for line in fp8[:2]] == [1, 1], "the same kernels"
    assert [(line.tokens, line.kernel) for line in lines] == [
        (3, kernel) for kernel in ("gluon_kernel", "triton_kernel", "reference")
    ]
    assert all(line.wrong is None for line in lines)
    assert all(line.same == 1 for line in lines if line.kernel != "reference")
    assert (
        replace(lines[0], error=float("nan")).wrong == "gluon_kernel at 3 tokens: error nan against f64, at most 0.01"
    )
    assert replace(lines[1], repeats=False).wrong == "triton_kernel at 3 tokens: a second call gave other bits"


def test_a_backend_s_measured_table_has_its_name() -> None:
    gemm = Gemm(16, 4, 2, slices=4)
    shape = RankShape("small", 256, 128, 4, 2, top_k=2)
    with emulated():
        found = {1: LaunchConfig("route", 16, gemm, gemm)}
        assert table_of(shape, found, "x", "gluon_kernel").arch == "gfx942-gluon"
        assert table_of(shape, found, "x", "triton_kernel").arch == "gfx942"


@pytest.mark.parametrize(
    ("arch", "rows", "blocks"),
    [("gfx942", 0.1, {16}), ("gfx942", 20, {16, 32, 64}), ("gfx942", 300, {64}), ("sm90", 20, set())],
)
def test_with_fp8_activations_the_tuner_tries_gfx942_s_stream_and_gluon_s_route(
    arch: str, rows: float, blocks: set[int]
) -> None:
    for impl in get_args(Impl):
        tried = list(families(arch, rows, impl, "fp8"))
        assert {block_m for _, block_m, _ in tried} == blocks
        few = {"route"} if impl == "gluon_kernel" and rows <= 1 else set()
        assert {kernel for kernel, _, _ in tried} == ({"stream"} | few if blocks else set())


def test_fp8_s_tiles_are_measured_beside_those_of_bf16_in_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = RankShape("small", 256, 128, 4, 2, top_k=2)
    monkeypatch.setattr(tuner, "_STREAM", (Gemm(16, 1, 1),))
    before = tables.find("gfx942")
    assert before is not None
    with emulated():
        found = {n: timed.config for n, timed in tuner.measure(shape, [2], CPU, False, "triton_kernel", "fp8")}
        table = table_of(shape, found, "here", "triton_kernel", "fp8", before)
        again = table_of(shape, found, "here too", "triton_kernel", "bf16", table)
        with pytest.raises(ValueError, match="gfx942-gluon: there is no table whose regimes for bf16"):
            table_of(shape, found, "here", "gluon_kernel", "fp8")
    assert found[2].kernel == "stream"
    assert (table.regimes, [regime.config for regime in table.fp8]) == (before.regimes, [found[2]])
    assert table.source == f"fp8 here; the rest: {before.source}"
    assert again.fp8 == table.fp8
    assert again.source == "bf16 here too; the rest: fp8 here"
    tables.write(tmp_path / "gfx942.yaml", table)
    assert tables.read(tmp_path / "gfx942.yaml").fp8 == table.fp8


def _module(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE_S, check=False)


def test_the_tuner_writes_a_table_that_is_then_used(tmp_path: Path) -> None:
    made = _module("moe_ep.bench.tune", "--shape=tiny", "--tokens=1", "--tokens=4", "--quick", f"--out={tmp_path}")
    assert made.returncode == 0, made.stderr
    table = tables.read(tmp_path / "interpreter.yaml")
    assert [regime.rows for regime in table.regimes] == [0.5, 1e6]  # √(1·4) tokens · 2 of 8 experts
    assert "measured on a CPU" in table.source


def test_the_command_times_and_writes_and_names_what_it_does_not_know(tmp_path: Path) -> None:
    out = tmp_path / "lines.json"
    ran = _module(*Stage("tiny", ("triton_kernel",), ("tiny",), ("uniform",)).command([2], out)[2:])
    assert ran.returncode == 0, ran.stderr
    header, lines = report.load(out)
    assert header["device"] == "CPU"
    assert [line.kernel for line in lines] == ["triton_kernel"]
    assert lines[0].error is not None
    assert lines[0].error < 5e-3
    refused = _module("moe_ep.bench", "--shape=huge")
    assert refused.returncode == 2
    assert "--shape huge: there are flash-ep4" in refused.stderr
