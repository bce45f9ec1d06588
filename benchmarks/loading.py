"""How fast a rank's share of a checkpoint comes from the disk, beside a plain sequential read of the same bytes, cold.

    python benchmarks/loading.py [--gib 4] [--rounds 3] [--folder /var/tmp]

Writes a checkpoint with V4-Flash's tensors (fewer layers, random bytes), then in turns, each in a process of its own
and with the files dropped from the page cache before: `sequential` reads the bytes of rank 0 of EP=4 file by file, each
contiguous stretch from its beginning to its end in pieces of 16 MiB into one buffer; `loader` loads them into the
layers' final tensors, the last of which is compared with the file, `direct` does so by O_DIRECT, and `presharded` loads
rank 0's own file. Prints the median rates, bytes read over bytes needed, and the peak of host memory beside the share.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from moe_ep import manifest as manifests
from moe_ep import preshard
from moe_ep.backends.base import MoEBackend
from moe_ep.checkpoint import Checkpoint
from moe_ep.comm import Alone
from moe_ep.headers import CONFIG, INDEX, encode_header, read_header, read_headers
from moe_ep.loading import Reading, load_layers
from moe_ep.placement import WHOLE, Placement
from moe_ep.ranges import READ_BYTES
from moe_ep.selector import select_backend
from moe_ep.shape import ModelShape
from moe_ep.spec import MoELayerSpec, Mxfp4Config
from moe_ep.tensors import moe_specs

FLASH = ModelShape(hidden=4096, intermediate=2048, layers=1, experts=256, top_k=6, vocab=129280)
EP = 4
WAYS = ("sequential", "loader", "direct", "presharded")
PRESHARDED = "presharded"
"""Folder in the checkpoint's."""


def main() -> None:
    """Make the checkpoint, measure all ways in turns, print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4, help="of the rank's share")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="on the disk that is measured")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments.folder, arguments.way)))
        return
    layers = max(1, round(arguments.gib * 2**30 * EP / (FLASH.experts * FLASH.expert_bytes)))
    folder = Path(tempfile.mkdtemp(prefix="loading-", dir=arguments.folder))
    try:
        write(folder, replace(FLASH, layers=layers))
        preshard_rank(folder)
        report(folder, arguments.rounds)
    finally:
        shutil.rmtree(folder)


def report(folder: Path, rounds: int) -> None:
    """Run all ways in turns and print their medians."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in WAYS[number % 4 :] + WAYS[: number % 4]:  # who comes first changes
            drop_from_cache(folder)
            command = [sys.executable, __file__, "--folder", str(folder), "--way", way]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[way].append(json.loads(done.stdout))
            print(f"# {way} {found[way][-1]}", file=sys.stderr)
    rates = {way: statistics.median(line["rate"] for line in lines) for way, lines in found.items()}
    for way, lines in found.items():
        last = lines[-1]
        each = " ".join(f"{line['rate'] / 1e9:.2f}" for line in lines)
        print(
            f"{way:<11} {rates[way] / 1e9:5.2f} GB/s ({each}), {rates[way] / rates['sequential']:.0%} of sequential; "
            f"read/needed {last['read'] / last['needed']:.4f}, of it from the disk "
            f"{min(line['disk'] / line['read'] for line in lines):.0%}; "
            f"peak host memory {last['peak'] / 2**30:.2f} GiB, share {last['share'] / 2**30:.2f} GiB"
        )


def measure(folder: Path, way: str) -> dict[str, float]:
    """One way in this process: rate in bytes a second, bytes, and memory above what the process had before."""
    headers = read_headers(folder)
    if way == "sequential":
        needed, memory = stretches(folder), memoryview(bytearray(READ_BYTES))
        before, disk, started = peak(), from_disk(), time.perf_counter()
        read = sum(read_through(file, offset, nbytes, memory) for file, offset, nbytes in needed)
        seconds = time.perf_counter() - started
        disk = from_disk() - disk
        return {
            "rate": read / seconds,
            "read": read,
            "disk": disk,
            "needed": read,
            "peak": peak() - before,
            "share": 0,
        }
    shape, backends = headers.shape, backends_of(headers.shape)
    checkpoint, arrived = Checkpoint(headers), [0.0]
    before, disk, started = peak(), from_disk(), time.perf_counter()

    def note(_: object) -> None:
        arrived[0] = time.perf_counter() - started

    if way == "presharded":
        manifest = manifests.read_manifest(folder / PRESHARDED)
        layers, read = preshard.load_rank(
            folder / PRESHARDED, manifest, 0, backends, Alone(), torch.device("cpu"), on_progress=note
        )
        needed_bytes = sum(
            info.nbytes for info in read_header(folder / PRESHARDED / manifest.files[0]).tensors.values()
        )
    else:
        reading = Reading(direct=way == "direct")
        layers = load_layers(checkpoint, backends, Alone(), torch.device("cpu"), reading=reading, on_progress=note)
        read, needed_bytes = checkpoint.bytes_read, sum(nbytes for _, _, nbytes in stretches(folder))
    used, disk = peak() - before, from_disk() - disk
    share = sum(t.nbytes for layer in layers.values() for t in (*layer.parameters(), *layer.buffers()))
    check(folder, layers[shape.layers - 1].experts.get_parameter("w2_weight")[-1])
    return {
        "rate": needed_bytes / arrived[0],
        "read": read,
        "disk": disk,
        "needed": needed_bytes,
        "peak": used,
        "share": share,
    }


def backends_of(shape: ModelShape) -> dict[int, MoEBackend]:
    """Of rank 0, which keeps weights as they come."""
    specs = {layer: MoELayerSpec.of_rank(shape, layer, 0, EP) for layer in range(shape.layers)}
    return {n: select_backend(s, Mxfp4Config(), arch="cpu", impl="reference") for n, s in specs.items()}


def preshard_rank(folder: Path) -> None:
    """Write rank 0's file."""
    checkpoint = Checkpoint.open(folder)
    backends, experts = backends_of(checkpoint.shape), Placement(checkpoint.shape.experts, EP)
    manifest = manifests.manifest_of(checkpoint, backends, [experts.experts(r) for r in range(EP)], WHOLE)
    preshard.write_rank(folder / PRESHARDED, manifest, 0, checkpoint, backends, WHOLE, torch.device("cpu"))
    manifests.write_manifest(folder / PRESHARDED, manifest)
    os.sync()


def check(folder: Path, arrived: torch.Tensor) -> None:
    """The last tensor that was read is, byte for byte, what the file holds."""
    checkpoint = Checkpoint.open(folder)
    shape = checkpoint.shape
    expected = checkpoint.read_expert(shape.layers - 1, shape.experts // EP - 1)["w2.weight"]
    if not torch.equal(arrived, expected):
        sys.exit("what was loaded is not what the file holds")


def stretches(folder: Path) -> list[tuple[Path, int, int]]:
    """(file, offset, bytes) of what rank 0 needs, neighbours joined, in the order of the files."""
    headers = read_headers(folder)
    mine = range(headers.shape.experts // EP)
    wanted = [
        info
        for name, info in headers.tensors.items()
        if ".experts." not in name or int(name.split(".experts.")[1].split(".")[0]) in mine
    ]
    found: list[tuple[Path, int, int]] = []
    for info in sorted(wanted, key=lambda i: (i.file, i.offset)):
        if found and found[-1][0] == info.file and sum(found[-1][1:]) == info.offset:
            found[-1] = (info.file, found[-1][1], found[-1][2] + info.nbytes)
        else:
            found.append((info.file, info.offset, info.nbytes))
    return found


def read_through(file: Path, offset: int, nbytes: int, memory: memoryview) -> int:
    """Read a stretch in order."""
    done = 0
    with file.open("rb", buffering=0) as f:
        f.seek(offset)
        while done < nbytes:
            done += f.readinto(memory[: nbytes - done]) or sys.exit(f"{file}: too short")
    return done


def write(folder: Path, shape: ModelShape) -> None:
    """A checkpoint of `shape` with random bytes; no scale is NaN."""
    (folder / CONFIG).write_text(json.dumps(shape.to_config()))
    weight_map: dict[str, str] = {}
    block = os.urandom(READ_BYTES).replace(b"\xff", b"\x7f")
    for layer in range(shape.layers):
        file = folder / f"model-{layer + 1:05d}.safetensors"
        specs = moe_specs(shape, layer)
        weight_map |= dict.fromkeys(specs, file.name)
        with file.open("wb") as f:
            f.write(encode_header(specs, {}))
            for spec in specs.values():
                data = bytes(spec.nbytes) if spec.dtype == "I64" else (block * (spec.nbytes // len(block) + 1))
                f.write(memoryview(data)[: spec.nbytes])
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    os.sync()


def drop_from_cache(folder: Path) -> None:
    """The files' pages leave the page cache."""
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        with file.open("rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def from_disk() -> int:
    """Bytes that the kernel has fetched from storage for this process: not what the page cache had."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def peak() -> int:
    """The most bytes that this process has had resident (getrusage's figure begins with the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main()
