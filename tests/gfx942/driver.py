"""The Triton device: a kernel launched on CPU tensors is compiled for gfx942 and its machine code is executed."""

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import addressof, c_char
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from tests.gfx942.assembly import Program, parse
from tests.gfx942.faults import Fault
from tests.gfx942.machine import LDS_BYTES, Execution, Grid, Machine
from tests.gfx942.memory import Memory

TARGET = GPUTarget("hip", "gfx942", 64)
_DEVICE = 942  # no real device's number: Triton keeps what it compiled by this
_FORMATS = {"fp32": "<f", "fp64": "<d", 8: "<q", 4: "<i", 2: "<h", 1: "<b"}

_assembly_paths: dict[str, Path] = {}
"""Where Triton put the assembly of each kernel that it loaded, by the kernel's hash."""


@dataclass(frozen=True)
class Launch:
    """A kernel that was launched: what it was compiled with, what the compiler made, and what it did.

    `constants` are the constexpr arguments by name. `execution` is None where the chip only compiles.
    """

    program: Program
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    lds_bytes: int
    execution: Execution | None


@dataclass
class Chip:
    """The device while it is active: what was launched on it, and which tensors no kernel may write."""

    launches: list[Launch] = field(default_factory=list)
    read_only: list[Tensor] = field(default_factory=list)
    executes: bool = True
    """Whether kernels run; else they are compiled and recorded, and memory stays as it is."""
    limit: int = 5_000_000
    """Instructions that a batch of waves may take."""
    shares_memory: bool = False
    """Whether workgroups of one launch may read what others store, as those that synchronise by atomics do."""
    rewrite: Callable[[Program], Program] | None = None
    """Changes each program before it runs: what a test is worth shows in programs that are wrong."""

    def protect(self, *tensors: Tensor | None) -> None:
        """Make a store to these tensors a fault."""
        self.read_only += [tensor for tensor in tensors if tensor is not None]


@lru_cache(maxsize=256)
def _machine(path: Path, rewrite: Callable[[Program], Program] | None) -> Machine:
    program = parse(path.read_text())
    return Machine(rewrite(program) if rewrite else program)


@contextmanager
def emulated() -> Iterator[Chip]:
    """Make the emulated chip Triton's device."""
    before = triton.runtime.driver._active
    chip = Chip()
    triton.runtime.driver.set_active(_Driver(chip))
    knobs.runtime.kernel_load_start_hook.add(_remember)
    try:
        yield chip
    finally:
        knobs.runtime.kernel_load_start_hook.remove(_remember)
        triton.runtime.driver._active = before


def _remember(module: object, function: object, name: str, group: dict[str, str], key: str) -> None:
    path = next(path for file, path in group.items() if file.endswith(".amdgcn"))
    _assembly_paths[key] = Path(path)


class _Utils:
    """What Triton asks a driver about its device."""

    def get_device_properties(self, device: int) -> dict[str, Any]:
        return {"max_shared_mem": LDS_BYTES, "multiprocessor_count": 228, "warpSize": 64, "arch": "gfx942"}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return None, name, 0, 0, 1024  # module, function, registers, spills, most threads of a workgroup


class _Launcher:
    """Launches one compiled kernel. What Triton calls with the grid and the arguments."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.signature: dict[str, str] = src.signature
        self.names: Sequence[str] = src.fn.arg_names
        self.metadata = metadata
        self.constants = {
            self.names[path[0]]: value
            for path, value in src.constants.items()
            if self.signature.get(self.names[path[0]]) == "constexpr"
        }

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        function: object,
        packed: object,
        launch_metadata: object,
        enter: object,
        leave: object,
        *arguments: Any,
    ) -> None:
        chip = triton.runtime.driver.active.chip
        passed = [
            (name, self.signature[name], value)
            for name, value in zip(self.names, arguments, strict=True)
            if self.signature[name] != "constexpr"
        ]
        machine = _machine(_assembly_paths[self.metadata.hash], chip.rewrite)
        execution = self._execute(machine, Grid(x, y, z, self.metadata.num_warps), passed, chip)
        launch = Launch(
            machine.program,
            self.constants,
            self.metadata.num_warps,
            self.metadata.num_stages,
            self.metadata.shared,
            execution,
        )
        chip.launches.append(launch)

    def _execute(
        self, machine: Machine, grid: Grid, passed: list[tuple[str, str, Any]], chip: Chip
    ) -> Execution | None:
        if not chip.executes:
            return None
        memory = Memory(shares=chip.shares_memory)
        values = [
            (name, kind, _add_tensor(memory, name, value, chip) if isinstance(value, Tensor) else value)
            for name, kind, value in passed
        ]
        block = _kernarg(machine.program.metadata[".args"], values)
        held = (c_char * len(block)).from_buffer(block)
        kernarg = memory.add("the kernel's arguments", addressof(held), len(block), read_only=True)
        return machine.run(grid, memory, kernarg=kernarg, lds_bytes=self.metadata.shared, limit=chip.limit)


def _add_tensor(memory: Memory, name: str, tensor: Tensor, chip: Chip) -> int:
    """The device address of a tensor, from its first element to its last: a view opens no storage around it."""
    if tensor.device.type != "cpu":
        raise Fault(f"{name} is on {tensor.device}; the emulated chip takes CPU tensors")
    if tensor.numel():
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        size = (last + 1) * tensor.element_size()
        read_only = any(
            tensor.data_ptr() < p.data_ptr() + p.untyped_storage().nbytes() - p.storage_offset() * p.element_size()
            and p.data_ptr() < tensor.data_ptr() + size
            for p in chip.read_only
        )
        return memory.add(name, tensor.data_ptr(), size, read_only=read_only)
    return 0


def _kernarg(layout: list[dict[str, Any]], passed: list[tuple[str, str, Any]]) -> bytearray:
    """The kernel's argument block. Hidden arguments after the kernel's own are 0."""
    block = bytearray(max((arg[".offset"] + arg[".size"] for arg in layout), default=8))
    for argument, (_, kind, value) in zip(layout, passed, strict=False):
        number = value
        form = _FORMATS.get(kind) or _FORMATS[argument[".size"]]
        if isinstance(number, int) and number >= 1 << (8 * argument[".size"] - 1):
            form = form.upper()
        struct.pack_into(form, block, argument[".offset"], number)
    return block


class _Driver(DriverBase):
    """What Triton calls a driver."""

    def __init__(self, chip: Chip) -> None:
        self.chip = chip
        self.utils = _Utils()
        self.launcher_cls = _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is compiled for the host")

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("the emulated chip has no time")

    def get_device_interface(self) -> Any:
        raise NotImplementedError("the emulated chip is no torch device")

    def get_current_device(self) -> int:
        return _DEVICE

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0
