"""What only a GPU shows."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_ep import manifest as manifests
from moe_ep import preshard
from moe_ep.backends.base import MoEBackend
from moe_ep.backends.call import using
from moe_ep.checkpoint import Checkpoint
from moe_ep.comm import Alone
from moe_ep.fused import fused_moe_mxfp4
from moe_ep.kernels.launch import Gemm, LaunchConfig
from moe_ep.layer import MoELayer
from moe_ep.loading import Reading, load_layers
from moe_ep.placement import WHOLE, Placement, Slice
from moe_ep.ranges import READ_BYTES
from moe_ep.selector import select_backend
from moe_ep.shape import ModelShape
from moe_ep.spec import MoELayerSpec, Mxfp4Config
from moe_ep.synthetic import write_checkpoint
from moe_ep.targets import allocator
from moe_ep.weights import ExpertWeights
from tests.moe_ep.experts import Tokens, by_formula, make_experts, make_tokens, partial, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_the_kernels_can_be_captured_and_replayed_on_other_tokens(device: torch.device) -> None:
    experts = make_experts(10, 256, 128, device)
    expert_map = torch.tensor([0, 1, 2, 3] + [-1] * 6, dtype=torch.int32, device=device)
    first, second = (make_tokens(33, 256, 10, 6, device, seed) for seed in range(2))
    held = experts.rows(range(4))
    fixed = Tokens(*(t.clone() for t in vars(first).values()))
    partial(held, fixed, "cuda", expert_map=expert_map)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = partial(held, fixed, "cuda", expert_map=expert_map)
    for batch in (first, second):
        for name, tensor in vars(batch).items():
            getattr(fixed, name).copy_(tensor)
        graph.replay()
        assert relative_error(out, by_formula(experts, batch, only=range(4))) < 4e-3


def _in_one_launch() -> list[Any]:
    """(configuration, tokens) of the kernels that make both GEMMs in one launch, by tickets, where they run."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    wide, whole = Gemm(128, 4, 8), Gemm(128, 4, 4)
    gpu = pytest.mark.skipif(capability < (9, 0), reason="needs Hopper or a newer GPU")
    hopper = pytest.mark.skipif(capability != (9, 0), reason="needs Hopper")
    return [
        pytest.param(LaunchConfig("single", 8, *(Gemm(16, 4, 2, slices=4),) * 2), 8, id="single", marks=gpu),
        pytest.param(LaunchConfig("warpgroup", 32, wide, wide), 300, id="blocks of 32", marks=hopper),
        pytest.param(LaunchConfig("warpgroup", 128, whole, whole), 2000, id="blocks of 128", marks=hopper),
    ]


in_one_launch = pytest.mark.parametrize(("config", "tokens"), _in_one_launch())


@in_one_launch
def test_gemms_in_one_launch_can_be_captured_and_replayed_again_and_again(
    config: LaunchConfig, tokens: int, device: torch.device
) -> None:
    hidden = 1024 if config.kernel == "single" else 768  # no whole number of rows' parts that are zeroed at once
    experts, expert_map = make_experts(64, hidden, 1024, device), torch.arange(64, device=device).int()
    held, expert_map[32:] = experts.rows(range(32)), -1
    batches = [make_tokens(tokens, hidden, 64, 6, device, seed) for seed in range(5)]
    batches[2].ids[:] = 63  # remote
    fixed = Tokens(*(t.clone() for t in vars(batches[0]).values()))
    with using(config):
        expected = [partial(held, batch, "cuda", expert_map=expert_map) for batch in batches]
        for got, batch in zip(expected, batches, strict=True):
            formula = by_formula(experts, batch, only=range(32))
            assert relative_error(got, formula) < 5e-3 if formula.any() else not got.any()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = [partial(held, fixed, "cuda", expert_map=expert_map) for _ in range(3)]
    for turn in range(100):
        batch = batches[turn % 5]
        for name, tensor in vars(batch).items():
            getattr(fixed, name).copy_(tensor)
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(out, expected[turn % 5]) for out in outs)


@in_one_launch
def test_gemms_in_one_launch_on_two_streams_at_once_give_what_they_give_alone(
    config: LaunchConfig, tokens: int, device: torch.device
) -> None:
    experts, batch = make_experts(32, 1024, 1024, device), make_tokens(tokens, 1024, 32, 6, device)
    streams, outs = [torch.cuda.Stream(priority=priority) for priority in (0, -1)], []
    with using(config):
        alone = partial(experts, batch, "cuda")
        torch.cuda.synchronize()
        for _ in range(200):
            for stream in streams:
                with torch.cuda.stream(stream):
                    outs.append(partial(experts, batch, "cuda"))
    torch.cuda.synchronize()
    assert all(torch.equal(out, alone) for out in outs)


@pytest.mark.parametrize("tokens", [1, 64, 700])
def test_v4_sized_experts_agree_with_the_reference(tokens: int, device: torch.device) -> None:
    experts = make_experts(6, 4096, 2048, device, bias=True)
    batch = make_tokens(tokens, 4096, 8, 6, device)
    expert_map = torch.tensor([0, 1, 2, 3, 4, 5, -1, -1], dtype=torch.int32, device=device)
    got = partial(experts, batch, "cuda", expert_map=expert_map)
    assert relative_error(got, partial(experts, batch, "reference", expert_map=expert_map)) < 4e-3


@pytest.mark.parametrize("tokens", [1, 64, 700, 4000])
def test_after_the_first_call_of_a_shape_nothing_is_allocated(tokens: int, device: torch.device) -> None:
    experts, batch = make_experts(6, 1024, 512, device), make_tokens(tokens, 1024, 6, 6, device)
    plain = ExpertWeights(experts.w13, experts.w13_scale, experts.w2, experts.w2_scale, None, None)
    weights, out = plain.in_kernel_order(), torch.empty_like(batch.x)

    def call() -> None:
        packed = (weights.w13, weights.w13_scale, weights.w2, weights.w2_scale)
        fused_moe_mxfp4(batch.x, *packed, batch.ids, batch.weights, weight_order="kernel", out=out)

    def allocations() -> int:
        return int(torch.cuda.memory_stats(device)["allocation.all.allocated"])

    call()
    before = allocations()
    for _ in range(3):
        call()
    assert allocations() == before


# A rank's share is several blocks of 16 MiB, so that the threads use their buffers again and again.
SHAPE = ModelShape(hidden=1024, intermediate=1024, layers=3, experts=32, top_k=6, vocab=512, hash_layers=1)
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    write_checkpoint(path, SHAPE, seed=3)
    return path


def backends(ep: Slice = WHOLE, tp: Slice = WHOLE) -> dict[int, MoEBackend]:
    specs = {n: MoELayerSpec.of_rank(SHAPE, n, ep.rank, ep.size, tp.rank, tp.size) for n in SHAPE.all_layers}
    return {n: select_backend(s, Mxfp4Config(), impl="triton_kernel") for n, s in specs.items()}


def held(layers: dict[int, MoELayer]) -> dict[str, torch.Tensor]:
    return {
        f"{number}.{name}": tensor
        for number, layer in layers.items()
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers())
    }


def assert_same(on_gpu: dict[int, MoELayer], expected: dict[int, MoELayer]) -> None:
    left, right = held(on_gpu), held(expected)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.device.type == "cuda", name
        assert torch.equal(tensor.cpu().view(torch.uint8), right[name].view(torch.uint8)), name


def test_buffers_for_a_gpu_are_pinned() -> None:
    assert torch.frombuffer(allocator(GPU)(READ_BYTES), dtype=torch.uint8).is_pinned()


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("cut", ["ep", "tp"])
def test_a_share_arrives_on_the_gpu_bit_for_bit_as_in_host_memory(checkpoint: Path, cut: str, direct: bool) -> None:
    place, taken = Slice(1, 2), []
    mine = {cut: place}
    shared = place if cut == "tp" else WHOLE
    give = allocator(GPU)

    def allocate(nbytes: int) -> memoryview:
        taken.append(nbytes)
        return give(nbytes)

    reading = Reading(threads=3, direct=direct)
    source = Checkpoint.open(checkpoint)
    on_gpu = load_layers(source, backends(**mine), Alone(), GPU, shared=shared, reading=reading, allocate=allocate)
    assert_same(on_gpu, load_layers(Checkpoint.open(checkpoint), backends(**mine), Alone(), CPU, shared=shared))
    assert taken == [READ_BYTES] * 3, "whatever the share, a buffer a thread"
    assert source.bytes_read > 3 * sum(taken) // 2


def test_a_pre_sharded_file_is_written_from_a_gpu_and_read_to_one(checkpoint: Path, tmp_path: Path) -> None:
    source, place = Checkpoint.open(checkpoint), Slice(1, 2)
    mine, experts = backends(ep=place), [Placement(SHAPE.experts, 2).experts(rank) for rank in range(2)]
    manifest = manifests.manifest_of(source, mine, experts, WHOLE)
    preshard.write_rank(tmp_path, manifest, 1, source, mine, WHOLE, GPU)
    layers, _ = preshard.load_rank(tmp_path, manifest, 1, mine, Alone(), GPU)
    assert_same(layers, load_layers(source, mine, Alone(), CPU))
