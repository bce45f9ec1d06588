"""What is timed against what: this package's op, and others' where they can be imported."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from moe_ep.bench import peers
from moe_ep.bench.cases import Batch, RankShape, Weights
from moe_ep.bench.exact import LIMIT
from moe_ep.bench.peers import Op
from moe_ep.fused import fused_moe_mxfp4
from moe_ep.shape import KERNEL_GROUP
from moe_ep.spec import ActivationDtype
from moe_ep.weights import ExpertWeights


@dataclass(frozen=True)
class Contender:
    """A kernel under its name. `prepare` does once what a server does when it loads weights."""

    name: str
    prepare: Callable[[RankShape, Weights], Op]
    module: str | None = None
    """What must be importable."""
    capturable: bool = True
    """Whether its launches need no number from the device."""
    checked: bool = True
    """Whether its result is compared: not where its weights' order is not made."""
    runs_here: Callable[[], bool] = lambda: True
    activations: ActivationDtype = "bf16"
    """Of the op, and of what its result is compared with."""

    @property
    def available(self) -> bool:
        """Whether it can be imported, and runs, here."""
        if not self.runs_here():
            return False
        try:
            return self.module is None or find_spec(self.module) is not None
        except ModuleNotFoundError:  # a package above it is missing
            return False


def own(impl: str, activations: ActivationDtype = "bf16") -> Callable[[RankShape, Weights], Op]:
    """What prepares a backend of this package, with weights in the order of this device for these activations."""

    def prepare(shape: RankShape, weights: Weights) -> Op:
        from moe_ep.backends.call import order_for
        from moe_ep.backends.target import current_target

        plain = activations == "bf16" or impl == "reference"  # which need ask no device
        order = "kernel" if plain else order_for(activations, current_target().arch)
        ordered = ExpertWeights(*weights.packed, None, None).in_kernel_order(order)

        def op(batch: Batch) -> Tensor:
            return fused_moe_mxfp4(
                *(batch.x, ordered.w13, ordered.w13_scale, ordered.w2, ordered.w2_scale, batch.ids, batch.weights),
                expert_map=weights.expert_map,
                swiglu_limit=LIMIT,
                activation_dtype=activations,
                weight_order=order,
                impl=impl,
            )

        return op

    return prepare


def _on_cdna3() -> bool:
    from moe_ep.backends.gluon_kernel import call_refusal

    return (
        call_refusal(torch.device("cuda" if torch.cuda.is_available() else "cpu"), KERNEL_GROUP, KERNEL_GROUP) is None
    )


OURS = "triton_kernel"
OWN = ("gluon_kernel", OURS, "reference")
"""This package's backends."""
CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("gluon_kernel", own("gluon_kernel"), runs_here=_on_cdna3),
        Contender(OURS, own("triton_kernel")),
        Contender("reference", own("reference"), capturable=False),
        Contender("xkernels", peers.xkernels, "xkernels"),
        Contender("triton_kernels", peers.triton_kernels, "triton_kernels"),
        Contender("marlin", peers.marlin, "vllm._moe_C", checked=False),
        Contender("tokenspeed", peers.tokenspeed, "tokenspeed_kernel"),
        Contender("gluon_kernel-fp8", own("gluon_kernel", "fp8"), runs_here=_on_cdna3, activations="fp8"),
        Contender("triton_kernel-fp8", own("triton_kernel", "fp8"), activations="fp8"),
    )
}
