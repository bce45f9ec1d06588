"""What the compiler makes of the kernels that Hopper's table names, without a Hopper: ptxas comes with Triton."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moe_ep import tables
from moe_ep.backends.call import Shape, config_of
from moe_ep.backends.gemms import both_of, gemms_of
from moe_ep.backends.op import Op, SingleOp, op_of
from moe_ep.backends.target import Target
from moe_ep.bench.cases import SHAPES, RankShape
from moe_ep.kernels.bound import BoundLaunch
from moe_ep.kernels.boxes import BoxedLaunch, BoxedOp, activations, weights
from moe_ep.kernels.launch import fit

Launch = BoundLaunch | BoxedLaunch | BoxedOp
SHARED_BYTES = 227 * 1024  # that a program may have
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
NVDISASM = CUOBJDUMP.with_name("nvdisasm")
HOPPER = Target("cuda", "sm90", 32, 132)
POINTERS = {"x": "bf16", "h": "bf16", "w13": "u16", "w2": "u16", "scale": "u32", "bias": "fp32", "weight": "fp32"}
POINTERS |= {
    "w13_words": "u16",
    "w13_scales": "u32",
    "s13": "u32",
    "s2": "u32",
    "b13": "fp32",
    "b2": "fp32",
    "out": "bf16",
}

TABLE = tables.find("sm90")
assert TABLE is not None
REGIMES = {f"{regime.config.kernel}-{regime.rows:g}": regime.config for regime in TABLE.regimes}


def boxes(launch: BoxedLaunch | BoxedOp) -> dict[str, str]:
    """The types of its descriptors, which depend on boxes alone."""
    sizes = launch.launch.constants
    if isinstance(launch, BoxedOp):
        found = {f"w13_{name}": box for name, box in _weight_boxes(2 * sizes["INTER"], 2, launch.box_rows).items()}
        found |= {f"w2_{name}": box for name, box in _weight_boxes(sizes["HIDDEN"], 1, launch.box_rows).items()}
    else:
        rows = 2 * sizes["INTER"] if launch.matrices == 2 else sizes["HIDDEN"]
        found = _weight_boxes(rows, launch.matrices, launch.box_rows)
    if launch.x_box_rows:
        found["rows"] = activations(torch.empty(64, 128, dtype=torch.bfloat16, device="meta"), launch.x_box_rows)
    kinds = {"words": "u16", "scales": "u32", "rows": "bf16"}
    return {
        f"{name}_desc": f"tensordesc<{kinds[name.split('_')[-1]]}{box.block_shape},{box.layout!r}>"
        for name, box in found.items()
    }


def _weight_boxes(rows: int, matrices: int, box_rows: int) -> dict[str, TensorDescriptor]:
    words, scales = (torch.empty(1, rows, 128, dtype=dtype, device="meta") for dtype in (torch.uint16, torch.uint32))
    return dict(zip(("words", "scales"), weights(words, scales, matrices, box_rows), strict=True))


def bound(launch: Launch) -> BoundLaunch:
    return launch if isinstance(launch, BoundLaunch) else launch.launch


def compiled(launch: Launch) -> Any:
    """The kernel for sm90, all pointers at multiples of 16."""
    signature, constants, aligned = {}, {}, {}
    described = {} if isinstance(launch, BoundLaunch) else boxes(launch)
    launch = bound(launch)
    for i, name in enumerate(launch.kernel.arg_names):
        if name in described:
            signature[name] = described[name]
        elif name.endswith("_ptr"):
            stem = name.removesuffix("_ptr")
            out = "bf16" if "warpgroup" in launch.kernel.__name__ else "fp32"
            signature[name] = "*" + (out if stem == "y" else POINTERS.get(stem, "i32"))
            aligned[(i,)] = [["tt.divisibility", 16]]
        elif name == "blocks":
            signature[name] = "i32"
        elif name in launch.constants:
            signature[name], constants[name] = "constexpr", launch.constants[name]
        else:
            signature[name] = "fp32" if name == "limit" else "i32"
    source_of = GluonASTSource if isinstance(launch.kernel, GluonJITFunction) else ASTSource
    source = source_of(launch.kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options)


def usage(kernel: Any, folder: Path) -> dict[str, int]:
    """Registers and bytes of a thread's local memory, as ptxas gave them."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    said = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}


def disassembled(kernel: Any, folder: Path) -> str:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    return subprocess.run([NVDISASM, "-c", cubin], capture_output=True, text=True, check=True).stdout


def loops(text: str, instruction: str) -> list[list[str]]:
    """The innermost loops that have such an instruction, none of which may be outside of them."""
    lines, labels, found, ended = text.splitlines(), {}, [], -1
    for i, line in enumerate(lines):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = i
        branch = re.search(r"BRA `\((\.L_x_\d+)\)", line)
        start = labels.get(branch[1], -1) if branch else -1
        body = lines[start:i] if start > ended else []
        if any(instruction in step for step in body):
            found.append(body)
            ended = i
    assert found, f"no loop has {instruction}"
    inside = sum(instruction in step for body in found for step in body)
    assert inside == sum(instruction in line for line in lines), f"{instruction} outside of loops"
    return found


def _shape(shape: RankShape, tokens: int) -> Shape:
    return Shape(
        *(tokens, shape.hidden, shape.inner, shape.top_k, shape.held, shape.experts),
        mapped=True,
        biased=(False, False),
        limited=True,
        dtypes=(torch.int32, torch.int32, torch.bfloat16),
        aligned=(True,) * 3,
        device=torch.device("cpu"),
        stream=0,
        target=HOPPER,
        tables=None,
        override=None,
    )


def launches(shape: RankShape, regime: str) -> tuple[Launch, ...]:
    """Of gate and up, of down and perhaps of both, or the one of an op."""
    config = fit(REGIMES[regime], shape.hidden, shape.inner)
    assert config is not None
    if config.kernel == "single":
        op = op_of(replace(_shape(shape, config.block_m), override=config))
        assert isinstance(op, SingleOp)
        return (op.launch,)
    gate_up, down = gemms_of(_shape(shape, 64), config, 64)
    both = both_of(_shape(shape, 64), config, 64)
    assert isinstance(gate_up, Launch)
    assert isinstance(down, Launch)
    assert isinstance(both, BoxedOp | None)
    return (gate_up, down) if both is None else (gate_up, down, both)


@pytest.mark.skipif(not CUOBJDUMP.exists(), reason="Triton came without NVIDIA's tools")
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("name", ["pro-ep8", "flash-ep8-i512"])
def test_every_kernel_of_the_table_fits_a_multiprocessor(name: str, regime: str, tmp_path: Path) -> None:
    found = launches(SHAPES[name], regime)
    if name != "pro-ep8":
        found = found[2:] or found  # one launch for both has in it what two have
    for launch in found:
        kernel = compiled(launch)
        used = usage(kernel, tmp_path)
        assert used["REG"] * 32 * kernel.metadata.num_warps <= 65536
        spilled = used["STACK"] + used["LOCAL"]
        if "warpgroup" in regime:
            text = disassembled(kernel, tmp_path)
            steps = [step for body in loops(text, "HGMMA") for step in body]
            spills = [step for step in steps if re.search(r"\b(LDL|STL)\b", step)]
            assert not spills, "what they spill is around the loops that multiply, never in them"
            # Where ptxas lacks registers it waits for each product before the next (its warnings C7511 and C7512), as
            # that of Triton 3.9 does for gate and up in blocks of 128 routes.
            assert not triton.__version__.startswith("3.6") or 4 * text.count("WARPGROUP.DEPBAR") <= text.count(
                "HGMMA."
            )
        else:
            assert not spilled, f"{spilled} bytes a thread"
        assert kernel.metadata.shared <= SHARED_BYTES
        ptx = kernel.asm["ptx"]
        assert ("wgmma.mma_async" if "warpgroup" in regime else "mma.sync") in ptx
        assert ("cp.async.bulk.tensor" in ptx) == ("warpgroup" in regime)
        assert "griddepcontrol.wait" in ptx, "it may start before the kernel before it has ended"


@pytest.mark.skipif(not CUOBJDUMP.exists(), reason="Triton came without NVIDIA's tools")
@pytest.mark.parametrize("regime", [name for name in REGIMES if "warpgroup" in name])
def test_weights_are_decoded_in_few_instructions(regime: str, tmp_path: Path) -> None:
    """In all of a group's loop: masks, shifts, products with scales, and whatever else is not multiplying."""
    both = launches(SHAPES["pro-ep8"], regime)[2]
    weights = 2 * bound(both).constants["BLOCK_N"] * 128 // 256  # of a group, a thread's
    for body in loops(disassembled(compiled(both), tmp_path), "HGMMA"):
        instructions = [step for step in body if re.search(r"/\*[0-9a-f]{4,}\*/", step)]
        decoding = sum(bool(re.search(r"\b(LOP3|SHF|IMAD|HMUL2|PRMT)\b", step)) for step in instructions)
        assert decoding <= 1.88 * weights, "13 for 8 weights, and the scales"


@pytest.mark.skipif(not CUOBJDUMP.exists(), reason="Triton came without NVIDIA's tools")
@pytest.mark.parametrize("regime", [name for name in REGIMES if "warpgroup" in name])
def test_activations_are_gathered_in_few_instructions(regime: str, tmp_path: Path) -> None:
    """Where they took 7.4 for 16 bytes a lane, a third of them for predicates, the warpgroups waited for them."""
    both = launches(SHAPES["pro-ep8"], regime)[2]
    gathering = loops(disassembled(compiled(both), tmp_path), "LDGSTS")
    assert len(gathering) == 2, "a loop for each warp, which waits for no other"
    rows = bound(both).constants["BLOCK_M"]
    for body in gathering:
        instructions = [step for step in body if re.search(r"/\*[0-9a-f]{4,}\*/", step)]
        copies = sum("LDGSTS" in step for step in instructions)
        assert copies == rows // 2 * 256 // 512, "half of the rows' 256 bytes, 16 a lane"
        assert len(instructions) <= 50 + 5 * copies
        assert not any(re.search(r"\b(LDL|STL|BAR)\b", step) for step in instructions)


def test_the_combine_reads_nothing_before_the_kernels_before_it_have_ended() -> None:
    """Past the first-level cache it could; as it reads, an earlier op's routes may still lie there."""
    op = op_of(_shape(SHAPES["pro-ep8"], 64))
    assert isinstance(op, Op)
    before, waits, after = compiled(op.combine).asm["ptx"].partition("griddepcontrol.wait")
    assert waits
    assert "ld.global" not in before
    assert "ld.global" in after


def test_what_others_made_is_read_only_after_an_acquire() -> None:
    """Triton leaves an atomic out whose value nothing takes, and the acquire with it."""
    regime = next(name for name in REGIMES if "single" in name)
    (launch,) = launches(SHAPES["pro-ep8"], regime)
    ptx = compiled(launch).asm["ptx"]
    loads = re.findall(r"ld\.\S*(?:acquire|relaxed)\S*", ptx)
    assert len(loads) == 1, "the loop that waits for h"
    assert "acquire" in loads[0]
    atomics = re.findall(r"\b(?:atom|red)\.\S*?(relaxed|acquire|release|acq_rel)", ptx)
    assert sorted(atomics) == ["acq_rel", "acq_rel", "relaxed", "relaxed", "release"]


def test_h_is_read_by_the_copy_engine_only_after_an_acquire_and_a_fence_between_proxies() -> None:
    regime = next(name for name in REGIMES if "warpgroup" in name)
    both = launches(SHAPES["pro-ep8"], regime)[2]
    ptx = compiled(both).asm["ptx"]
    atomics = re.findall(r"\b(?:atom|red)\.\S*?(relaxed|acquire|release|acq_rel)", ptx)
    assert sorted(atomics) == ["relaxed", "relaxed", "release", "release"], "two tickets; both warpgroups' tiles"
    assert len(re.findall(r"ld\.\S*acquire", ptx)) == 1, "the loop that waits for h"
    assert ptx.count("fence.proxy.async.global") == 3
    # One thread arrives for all of its warps: after what these did last there must be a barrier.
    accesses = r"(?:ld|st)\.shared|cp\.async\.wait_group|wgmma\.wait_group|try_wait"
    arrivals = re.split(r"mbarrier\.arrive\.shared::cta", ptx)[:-1]
    assert arrivals
    assert all(re.search(r"bar\.(warp\.)?sync", re.split(accesses, before)[-1]) for before in arrivals)


@pytest.mark.parametrize("regime", [name for name in REGIMES if "stream" in name])
def test_weights_stream_at_16_bytes_a_lane_past_shared_memory(regime: str) -> None:
    for launch in launches(SHAPES["pro-ep8"], regime):
        kernel = compiled(launch)
        loads = re.findall(r"ld\.global\S*?\.(v4\.b32|v2\.b32|b32|b16)", kernel.asm["ptx"])
        assert loads.count("v4.b32") > loads.count("b32"), "what is left are scales, and once the plan"
        assert not {"v2.b32", "b16"} & set(loads)
        slices = bound(launch).constants["SLICES"]
        # Shared memory is for the sums of the slices at the end, and for nothing else.
        assert (kernel.metadata.shared > 0) == (slices > 1)


def test_what_asynchronous_copies_cannot_take_goes_to_the_tile_kernel() -> None:
    shape = SHAPES["pro-ep8"]
    what = _shape(shape, tokens=8192)
    assert config_of(what).kernel == "warpgroup"
    assert config_of(replace(what, aligned=(True, False, True))).kernel == "tile"
    assert config_of(replace(what, aligned=(True, True, True, False, True))).kernel == "tile"
    assert config_of(replace(what, tokens=300_000)).kernel == "tile", "offsets of activations have 32 bits"
    assert config_of(replace(what, tokens=16, aligned=(True, False, True))).kernel == "stream", (
        "plain loads take any address"
    )
