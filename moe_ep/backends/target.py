"""What the kernels are compiled for and run on."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction

from moe_ep.kernels.down import combine_kernel


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which is decided when they are defined."""
    return isinstance(combine_kernel, InterpretedFunction)


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on a device: in Triton's interpreter any, else that of Triton's active driver."""
    if interpreted():
        return True
    try:
        active: torch.device = driver.active.get_active_torch_device()
    except RuntimeError:  # no driver found a device
        return False
    return active.type == device.type


@dataclass(frozen=True)
class Target:
    """What Triton compiles for: "cuda" with sm90, or "hip" with gfx942. The interpreter takes what AMD's GPUs take."""

    backend: str
    arch: str
    warp_size: int
    processors: int = 1
    """Multiprocessors or compute units of the device."""

    @property
    def xcds(self) -> int:
        """Dies of a gfx942, to which workgroups go in turn: 38 compute units each, 6 on an MI300A, 8 on an MI300X."""
        return max(1, self.processors // 38) if self.arch == "gfx942" else 1

    @property
    def pdl(self) -> bool:
        """Whether a kernel may start before the one before it has ended (programmatic dependent launch)."""
        return self.backend == "cuda" and int(self.arch.removeprefix("sm")) >= 90


def current_target() -> Target:
    """Of Triton's active driver and torch's current device."""
    if interpreted():
        return Target("hip", "interpreter", 64)
    target = driver.active.get_current_target()
    if target.backend != "cuda":
        return Target(target.backend, target.arch, target.warp_size, _compute_units(driver.active.get_current_device()))
    return Target("cuda", f"sm{target.arch}", target.warp_size, _processors(torch.cuda.current_device()))


@lru_cache
def _processors(device: int) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@lru_cache
def _compute_units(device: int) -> int:
    count: int = driver.active.utils.get_device_properties(device)["multiprocessor_count"]
    return count
