"""A call as the kernels see it, and the configuration that computes it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from moe_ep import tables
from moe_ep.backends.target import Target
from moe_ep.kernels.launch import FP8_KERNELS, LaunchConfig, choose, choose_fp8, tile
from moe_ep.order import KernelOrder
from moe_ep.spec import ActivationDtype

Impl = Literal["triton_kernel", "gluon_kernel"]
"""The backends that launch these kernels."""

_OFFSETS = 2**31
"""Elements that an offset of 32 bits reaches."""
_BUFFER_BYTES = 2**31
"""What a buffer load reaches from its base."""


def order_for(activations: ActivationDtype, arch: str) -> KernelOrder:
    """The order in which the kernels read weights on an arch, "gfx942" or "gfx94": only these multiply e4m3fnuz."""
    return "kernel-fp8" if activations == "fp8" and arch.startswith("gfx94") else "kernel"


def table_name(arch: str, impl: Impl) -> str:
    """The table that a backend's launches are chosen from: gluon_kernel has one of its own."""
    return tables.GLUON_TABLE if impl == "gluon_kernel" else arch


def launch_config(
    tokens: int,
    top_k: int,
    num_experts: int,
    hidden: int,
    inner: int,
    target: Target,
    activations: ActivationDtype = "bf16",
    order: KernelOrder = "kernel",
    impl: Impl = "triton_kernel",
) -> LaunchConfig:
    """What computes tokens' routes over all of the model's experts on this target, with weights in this order."""
    table = tables.find(table_name(target.arch, impl))
    if order == "kernel-fp8":
        return choose_fp8(table, tokens * top_k, num_experts, hidden, inner)
    if activations == "fp8":  # the routing weight is in what is rounded, which of the bf16 kernels only this one does
        return tile(tokens * top_k / num_experts, target.warp_size)
    return choose(table, tokens, top_k, num_experts, hidden, inner, target.warp_size)


_override: LaunchConfig | None = None


@contextmanager
def using(config: LaunchConfig) -> Iterator[None]:
    """Compute all ops with one configuration, which must fit them, whatever the tables say."""
    global _override
    before, _override = _override, config
    try:
        yield
    finally:
        _override = before


def override() -> LaunchConfig | None:
    """The configuration of `using`, where that is under way."""
    return _override


@dataclass(frozen=True)
class Shape:
    """All that the launches of an op depend on, besides what its tensors hold."""

    tokens: int
    hidden: int
    inner: int
    top_k: int
    local: int
    known: int
    mapped: bool
    biased: tuple[bool, bool]
    limited: bool
    dtypes: tuple[torch.dtype, ...]
    aligned: tuple[bool, ...]
    """Whether each tensor lies at a multiple of 16 bytes: activations and codes first."""
    device: torch.device
    stream: int
    target: Target
    tables: str | None
    override: LaunchConfig | None
    activations: ActivationDtype = "bf16"
    order: KernelOrder = "kernel"
    impl: Impl = "triton_kernel"

    @property
    def rounds(self) -> bool:
        """Whether activations are rounded to fp8."""
        return self.activations == "fp8"

    @property
    def fp8(self) -> bool:
        """Whether they are multiplied as fp8 too."""
        return self.order == "kernel-fp8"

    @property
    def copied(self) -> bool:
        """Whether asynchronous copies take the activations, codes and scales."""
        return all(self.aligned[:5])


def config_of(shape: Shape) -> LaunchConfig:
    impl = shape.impl if 2 * shape.tokens * shape.hidden < _BUFFER_BYTES else "triton_kernel"
    config = shape.override or launch_config(
        *(shape.tokens, shape.top_k, shape.known, shape.hidden, shape.inner, shape.target),
        shape.activations,
        shape.order,
        impl,
    )
    if shape.rounds and config.kernel not in (FP8_KERNELS if shape.fp8 else ("tile",)):
        raise ValueError(f"fp8 activations with weights in {shape.order} order: no {config.kernel} kernel takes them")
    if config.kernel == "warpgroup" and (not shape.copied or shape.tokens * shape.hidden >= _OFFSETS):
        return tile(shape.tokens * shape.top_k / shape.known, shape.target.warp_size)
    return config
