"""The experts on CDNA3, as Gluon kernels laid out for its matrix units; docs/cdna3.md describes them."""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from moe_ep.backends import triton_kernel
from moe_ep.backends.call import Impl
from moe_ep.backends.target import current_target, runs_on
from moe_ep.backends.triton_kernel import TritonKernelBackend
from moe_ep.shape import KERNEL_GROUP
from moe_ep.spec import ActivationDtype, MoELayerSpec
from moe_ep.weights import ExpertWeights


def experts(
    x: Tensor,
    weights: ExpertWeights,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    topk_weights: Tensor,
    swiglu_limit: float | None,
    out: Tensor,
    activation_dtype: ActivationDtype = "bf16",
) -> None:
    """As `triton_kernel.experts`, with its workspace, plan and combine; the GEMMs are of `kernels.cdna3`, or with fp8
    activations of `kernels.stream_fp8`.

    Raises `ValueError` where they are not of x's device or of these sizes.
    """
    if reason := call_refusal(x.device, x.shape[1], weights.inner):
        raise ValueError(f"impl 'gluon_kernel': {reason}")
    triton_kernel.experts(
        x, weights, topk_ids, expert_map, topk_weights, swiglu_limit, out, activation_dtype, "gluon_kernel"
    )


def experts_by_columns(
    x: Tensor,
    weights: ExpertWeights,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    topk_weights: Tensor,
    swiglu_limit: float | None,
    outs: Sequence[Tensor],
    activation_dtype: ActivationDtype = "bf16",
    spare: int = 0,
) -> Iterator[None]:
    """As `triton_kernel.experts_by_columns`, with the GEMMs of `experts`."""
    if reason := call_refusal(x.device, x.shape[1], weights.inner):
        raise ValueError(f"impl 'gluon_kernel': {reason}")
    routes = (topk_ids, expert_map, topk_weights)
    return triton_kernel.experts_by_columns(
        x, weights, *routes, swiglu_limit, outs, activation_dtype, spare, "gluon_kernel"
    )


def arch_refusal(arch: str) -> str | None:
    """Why these kernels are not compiled for an arch ("gfx942", "gfx94"): for another than CDNA3's, LLVM would end the
    process."""
    if arch.startswith("gfx94"):
        return None
    return f"its kernels are CDNA3's, for gfx942 alone, and this is {arch}; triton_kernel runs on any GPU"


def shape_refusal(hidden: int, inner: int) -> str | None:
    """Why these kernels do not take H and this rank's I."""
    for name, size in (("hidden_size", hidden), ("intermediate_size over tp_size", inner)):
        if size % KERNEL_GROUP:
            return f"{name} is {size}, not a multiple of {KERNEL_GROUP}, the group in which lanes hold weights"
    return None


def call_refusal(device: torch.device, hidden: int, inner: int) -> str | None:
    """Why a call with tensors on `device` is not taken."""
    if not runs_on(device):
        return f"its kernels are CDNA3's, and Triton has no gfx942 for tensors on {device}"
    return arch_refusal(current_target().arch) or shape_refusal(hidden, inner)


class GluonKernelBackend(TritonKernelBackend):
    """CDNA3 only. Weights are in the same order as triton_kernel's, so a pre-sharded folder serves both."""

    impl: ClassVar[Impl] = "gluon_kernel"

    @classmethod
    def device_refusal(cls, arch: str) -> str | None:
        """Any arch but CDNA3's."""
        return arch_refusal(arch)

    @classmethod
    def refusal(cls, spec: MoELayerSpec, quant_config: object, arch: str) -> str | None:
        """See `MoEBackend.refusal`: the device, what no mxfp4 backend takes, then the sizes."""
        inner = spec.intermediate_size // spec.tp_size
        return super().refusal(spec, quant_config, arch) or shape_refusal(spec.hidden_size, inner)
