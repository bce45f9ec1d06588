"""The on-disk form, and reading no more than a rank's share of it."""

import json
from collections.abc import Iterable
from pathlib import Path
from threading import Barrier, Thread

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_ep import headers as ckpt
from moe_ep import loading
from moe_ep.checkpoint import Checkpoint
from moe_ep.comm import Alone
from moe_ep.headers import CheckpointError
from moe_ep.loading import load_layer
from moe_ep.ranges import Piece, Read, plan_reads
from moe_ep.selector import detect_arch, select_backend
from moe_ep.shape import ModelShape
from moe_ep.spec import MoELayerSpec, Mxfp4Config
from moe_ep.synthetic import write_checkpoint

SHAPE = ModelShape(
    hidden=64, intermediate=32, layers=3, experts=5, top_k=2, vocab=16, hash_layers=1, mtp_layers=1, routed_scaling=1.5
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", SHAPE, seed=7)
    return tmp_path / "model"


def test_names_dtypes_and_shapes_are_deepseek_v4s(path: Path) -> None:
    index = json.loads((path / ckpt.INDEX).read_text())
    names = set(index["weight_map"])
    expected = {
        "layers.0.ffn.experts.4.w1.weight": ("I8", [32, 32]),
        "layers.0.ffn.experts.4.w1.scale": ("F8_E8M0", [32, 2]),
        "layers.0.ffn.experts.4.w3.weight": ("I8", [32, 32]),
        "layers.0.ffn.experts.4.w2.weight": ("I8", [64, 16]),
        "layers.0.ffn.experts.4.w2.scale": ("F8_E8M0", [64, 1]),
        "layers.2.ffn.shared_experts.w1.weight": ("F8_E4M3", [32, 64]),
        "layers.2.ffn.shared_experts.w2.scale": ("F8_E8M0", [1, 1]),
        "layers.0.ffn.gate.weight": ("BF16", [5, 64]),
        "layers.0.ffn.gate.tid2eid": ("I64", [16, 2]),
        "layers.1.ffn.gate.bias": ("F32", [5]),
        "mtp.0.ffn.gate.bias": ("F32", [5]),
        "mtp.0.ffn.experts.0.w2.weight": ("I8", [64, 16]),
    }
    for name, (dtype, shape) in expected.items():
        with safe_open(path / index["weight_map"][name], framework="pt") as file:
            part = file.get_slice(name)
            assert (part.get_dtype(), part.get_shape()) == (dtype, shape), name
    assert "layers.0.ffn.gate.bias" not in names, "hash layers have no bias"
    assert "layers.1.ffn.gate.tid2eid" not in names
    assert len(names) == 4 * (5 * 6 + 6 + 2)
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for f in path.glob("*.safetensors") for t in load_file(f).values()
    )


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(path: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "again", SHAPE, seed=7)
    write_checkpoint(tmp_path / "other", SHAPE, seed=8)
    shard = "model-00002-of-00004.safetensors"
    assert (tmp_path / "again" / shard).read_bytes() == (path / shard).read_bytes()
    assert (tmp_path / "other" / shard).read_bytes() != (path / shard).read_bytes()


def test_hash_tables_name_distinct_experts(path: Path) -> None:
    table = Checkpoint.open(path).read_gate(0)["tid2eid"]
    assert all(len(set(row)) == 2 and max(row) < 5 for row in table.tolist())


def test_sizes_come_from_the_checkpoint_itself(path: Path) -> None:
    assert Checkpoint.open(path).shape == SHAPE


def test_an_existing_checkpoint_is_not_overwritten(path: Path) -> None:
    with pytest.raises(FileExistsError, match="not overwritten"):
        write_checkpoint(path, SHAPE)


@pytest.mark.parametrize("ep_rank", [0, 1])
def test_a_rank_reads_its_own_experts_and_what_is_replicated_and_nothing_else(
    path: Path, ep_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(path)
    read: list[str] = []

    def recorded(pieces: Iterable[Piece]) -> list[Read]:
        listed = list(pieces)
        read.extend(piece.name for piece in listed)
        return plan_reads(listed)

    monkeypatch.setattr(loading, "plan_reads", recorded)
    spec = MoELayerSpec.of_rank(SHAPE, 1, ep_rank, 2)
    backend = select_backend(spec, Mxfp4Config(), arch=detect_arch(), impl="reference")
    layer = load_layer(checkpoint, 1, backend, Alone(), torch.device("cpu"))
    mine = {0: range(3), 1: range(3, 5)}[ep_rank]
    assert {int(n.split(".")[4]) for n in read if ".experts." in n} == set(mine)
    assert len(read) == len(set(read)) == len(mine) * 6 + 6 + 2
    assert all(n.startswith("layers.1.ffn.") for n in read)
    replicated = sum(checkpoint.tensors[n].nbytes for n in read if ".experts." not in n)
    assert checkpoint.bytes_read == len(mine) * SHAPE.expert_bytes + replicated
    # The bytes arrive where the engine's layout has them, bit for bit: w1's rows, then w3's.
    for local, expert in enumerate(mine):
        parts = checkpoint.read_expert(1, expert)
        for part, suffix in (("weight", "weight"), ("scale", "weight_scale")):
            w13 = layer.experts.get_parameter(f"w13_{suffix}")[local]
            assert torch.equal(w13, torch.cat((parts[f"w1.{part}"], parts[f"w3.{part}"])))
            assert torch.equal(layer.experts.get_parameter(f"w2_{suffix}")[local], parts[f"w2.{part}"])


def test_what_a_rank_holds_is_what_was_planned(path: Path) -> None:
    checkpoint = Checkpoint.open(path)
    for number in range(SHAPE.layers):
        spec = MoELayerSpec.of_rank(SHAPE, number, 0, 2)
        # The kernels' backend, which pads: it loads without a device to run on.
        backend = select_backend(spec, Mxfp4Config(), arch="gfx942", impl="triton_kernel")
        layer = load_layer(checkpoint, number, backend, Alone(), torch.device("cpu"))
        held = sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))
        assert held == sum(SHAPE.held_bytes([number], spec.num_local_experts).values())


def rewrite(path: Path, shard: str, **changes: torch.Tensor | None) -> None:
    tensors = load_file(path / shard)
    for name, tensor in changes.items():
        tensors.pop(name)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, path / shard)


SHARD = "model-00002-of-00004.safetensors"
W1 = "layers.1.ffn.experts.2.w1.weight"


def test_a_missing_tensor_is_named_with_its_file(path: Path) -> None:
    rewrite(path, SHARD, **{W1: None})
    with pytest.raises(CheckpointError, match=rf"{SHARD}: tensor {W1} of the index is not in the file"):
        Checkpoint.open(path)


def test_a_tensor_that_stands_in_two_shards_is_read_from_the_one_that_the_index_names(path: Path) -> None:
    right = Checkpoint.open(path).read_gate(1)["weight"]
    other = "model-00003-of-00004.safetensors"
    tensors = load_file(path / other)
    save_file(tensors | {"layers.1.ffn.gate.weight": torch.zeros_like(right)}, path / other)
    assert torch.equal(Checkpoint.open(path).read_gate(1)["weight"], right)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"x": null}',
        b'{"x": {"dtype": "I8", "shape": [1]}}',
        b'{"x": {"dtype": "I8", "shape": null, "data_offsets": [0, 1]}}',
        b'{"x": {"dtype": "I8", "shape": [1], "data_offsets": [4, 1]}}',
        b'{"x": {"dtype": "I8", "shape": [1], "data_offsets": ["a", "b"]}}',
        b"{",
    ],
)
def test_a_damaged_header_is_named_by_its_file(path: Path, header: bytes) -> None:
    (path / SHARD).write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(CheckpointError, match=rf"{SHARD}: not a safetensors file"):
        Checkpoint.open(path)


def test_a_hash_table_that_names_experts_which_do_not_exist_is_refused(path: Path) -> None:
    rewrite(path, "model-00001-of-00004.safetensors", **{"layers.0.ffn.gate.tid2eid": torch.full((16, 2), 5)})
    with pytest.raises(CheckpointError, match=r"layers\.0\.ffn\.gate\.tid2eid names experts outside 0\.\.4"):
        Checkpoint.open(path).read_gate(0)


def test_two_writers_of_one_checkpoint_leave_one_that_is_whole(path: Path, tmp_path: Path) -> None:
    both = Barrier(2)
    kept: list[bool] = []

    def write() -> None:
        both.wait()
        try:
            write_checkpoint(tmp_path / "shared", SHAPE, seed=7)
            kept.append(True)
        except FileExistsError:
            kept.append(False)

    writers = [Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert True in kept
    assert Checkpoint.open(tmp_path / "shared").shape == SHAPE
    assert {p.name for p in tmp_path.iterdir()} == {"model", "shared"}, "no unfinished copy is left"


def test_fp8_experts_of_a_base_checkpoint_are_refused_on_opening_though_config_json_does_not_say_so(path: Path) -> None:
    rewrite(path, SHARD, **{W1: torch.zeros(32, 64, dtype=torch.float8_e4m3fn)})
    config = json.loads((path / ckpt.CONFIG).read_text())
    del config["expert_dtype"]
    (path / ckpt.CONFIG).write_text(json.dumps(config))
    message = (
        rf"{SHARD}: {W1} is F8_E4M3 \[32, 64\]: routed experts in fp8, as in the -Base checkpoints; expected mxfp4"
    )
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(path)


def test_experts_of_another_dtype_are_refused_by_it(path: Path) -> None:
    rewrite(path, SHARD, **{W1: torch.zeros(32, 32, dtype=torch.uint8)})
    with pytest.raises(CheckpointError, match=rf"{W1} is U8 \[32, 32\], expected I8 \[32, 32\]"):
        Checkpoint.open(path).read_expert(1, 2)


def test_a_missing_and_a_truncated_shard_are_named(path: Path) -> None:
    shard = path / SHARD
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=rf"{SHARD}: truncated"):
        Checkpoint.open(path)
    shard.write_bytes(b"hello")
    with pytest.raises(CheckpointError, match=rf"{SHARD}: not a safetensors file"):
        Checkpoint.open(path)
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{SHARD}: no such file, but the index names it"):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "deepseek_v41"}, "model_type is 'deepseek_v41', expected 'deepseek_v4'"),
        ({"expert_dtype": "fp8"}, "expert_dtype is 'fp8', expected 'fp4'"),
        ({"hidden_size": 65}, "hidden = 65 must be a positive multiple of 32"),
        ({"n_routed_experts": None}, "missing n_routed_experts"),
        ({"scoring_func": "softmax"}, "not implemented: scoring_func = 'softmax'"),
        ({"hidden_size": "64"}, "hidden = '64' must be a whole number"),
    ],
    ids=["another model", "base experts", "odd size", "missing key", "another router", "a string"],
)
def test_a_config_of_another_model_is_refused(path: Path, change: dict[str, object], message: str) -> None:
    config = json.loads((path / ckpt.CONFIG).read_text()) | change
    (path / ckpt.CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
        Checkpoint.open(path)


def test_early_configs_without_expert_dtype_and_limit_are_read(path: Path) -> None:
    config = json.loads((path / ckpt.CONFIG).read_text())
    del config["expert_dtype"], config["swiglu_limit"]
    (path / ckpt.CONFIG).write_text(json.dumps(config))
    assert Checkpoint.open(path).shape == SHAPE


def test_pro_and_flash_take_the_bytes_that_their_headers_have() -> None:
    pro = ModelShape(hidden=7168, intermediate=3072, layers=61, experts=384, top_k=6, vocab=129280)
    flash = ModelShape(hidden=4096, intermediate=2048, layers=43, experts=256, top_k=6, vocab=129280)
    assert (pro.expert_bytes, flash.expert_bytes) == (35_094_528, 13_369_344)
    assert pro.held_bytes(range(61), 48)["routed experts"] == pytest.approx(102.8e9, rel=1e-3)
    assert flash.held_bytes(range(43), 64)["routed experts"] == pytest.approx(36.8e9, rel=1e-3)
