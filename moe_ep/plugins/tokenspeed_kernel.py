"""These experts as a kernel of tokenspeed_kernel's family "moe", mode "apply". Imports tokenspeed_kernel."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from moe_ep.fused import fused_moe_mxfp4
from moe_ep.order import order_in_place
from moe_ep.placement import Placement
from moe_ep.plugins.versions import plug_in_point
from moe_ep.shape import MXFP4_BLOCK

NAME = "moe_ep_mxfp4_precomputed_moe_apply"
SOLUTION = "moe_ep"

_WEIGHTS = ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale")
_ONLY: dict[str, set[Any]] = {
    "weight_dtype": {"mxfp4"},
    "activation": {"silu", "swiglu"},
    "swiglu_form": {"standard"},
    "routing_mode": {"precomputed_topk"},
    "internal_activation_dtype": {"input"},
    "combine_order": {"rank"},
    "supports_deferred_finalize": {False},
    "supports_ep": {False, True},
    "supports_all_to_all_ep": {False},
    "supports_bias": {False, True},
    "ispp_alignment": {MXFP4_BLOCK},
    "hidden_alignment": {MXFP4_BLOCK},
    "persistent_workspace": {False},
}
"""What `moe_plan` may ask for and get these experts; everything else goes to tokenspeed's own kernels."""


def register_kernels(versions: str) -> None:
    """Register, above tokenspeed's own kernels (`Priority.PLUGIN`), on AMD's and NVIDIA's GPUs.

    Raises
    ------
    PluginError
        If the installed tokenspeed_kernel has another registry than 0.1.4's.
    """
    registry = plug_in_point("tokenspeed_kernel.registry", ["Priority", "register_kernel"], versions)
    platform = plug_in_point("tokenspeed_kernel.platform", ["CapabilityRequirement"], versions)
    signature = plug_in_point("tokenspeed_kernel.signature", ["format_signatures"], versions)
    registry.register_kernel(
        "moe",
        "apply",
        name=NAME,
        solution=SOLUTION,
        weight_preprocessor=process_weights,
        capability=platform.CapabilityRequirement(vendors=frozenset({"amd", "nvidia"})),
        signatures=signature.format_signatures("x", "dense", {torch.bfloat16}),
        traits={name: frozenset(values) for name, values in _ONLY.items()},
        priority=registry.Priority.PLUGIN,
    )(apply)


def process_weights(plan: dict[str, Any], w: Any) -> None:
    """Bring a loaded layer's weights into the order that the kernels read, where the kernels run.

    Raises
    ------
    TypeError, ValueError
        If a weight is missing or no uint8, or the rows are gpt-oss's.
    """
    from moe_ep.backends.target import runs_on

    for name in _WEIGHTS:
        weight = getattr(w, name, None)
        if weight is None or weight.dtype != torch.uint8:
            raise TypeError(f"moe_ep: {name} is {weight if weight is None else weight.dtype}, expected torch.uint8")
    if getattr(w, "w13_input_layout", "concatenated") != "concatenated":
        raise ValueError("moe_ep: the rows of w13 are interleaved (gpt-oss); these experts read w1's rows, then w3's")
    if getattr(w, "weight_order", "checkpoint") == "kernel" or not runs_on(w.w13_weight.device):
        return
    for name in ("w13_weight", "w2_weight"):
        weight, scale = w.get_parameter(name), w.get_parameter(f"{name}_scale")
        weight.data, scale.data = order_in_place(weight.data, scale.data)
    w.weight_order = "kernel"


def apply(
    plan: dict[str, Any],
    x: Tensor,
    w: Any,
    router_logits: Tensor | None,
    topk_weights: Tensor | None = None,
    topk_ids: Tensor | None = None,
    num_tokens_global: int | None = None,
    max_num_tokens_per_gpu: int | None = None,
    do_finalize: bool = True,
    enable_pdl: bool = False,
) -> Tensor:
    """This rank's partial [M, H] of x bf16 [M, H]: the caller adds the ranks up (`combine_order` "rank").

    topk_ids: global experts [M, k]; topk_weights [M, k]. `w` is tokenspeed's layer.

    Raises
    ------
    ValueError
        If the plan did not route, or wants the unfinished output.
    """
    if topk_weights is None or topk_ids is None:
        raise ValueError("moe_ep: topk_weights and topk_ids are missing: these experts are routed to by the model")
    if not do_finalize:
        raise ValueError("moe_ep: do_finalize=False is not supported")
    swiglu = getattr(w, "swiglu_arg", None)
    w13, w13_scale, w2, w2_scale = (getattr(w, name).detach() for name in _WEIGHTS)
    return fused_moe_mxfp4(
        x,
        w13,
        w13_scale,
        w2,
        w2_scale,
        topk_ids,
        topk_weights,
        b13=getattr(w, "w13_weight_bias", None),
        # Under TP every rank holds a slice of I, but w2's bias must be counted once.
        b2=getattr(w, "w2_weight_bias", None) if int(getattr(w, "tp_rank", 0)) == 0 else None,
        expert_map=_expert_map(w, x.device),
        swiglu_limit=getattr(swiglu, "limit", None),
        weight_order=getattr(w, "weight_order", "checkpoint"),
    )


def _expert_map(w: Any, device: torch.device) -> Tensor:
    held, size, rank = w.w13_weight.shape[0], int(getattr(w, "ep_size", 1)), int(getattr(w, "ep_rank", 0))
    return _map(int(getattr(w, "num_experts", held * size)), size, rank, device)


@cache
def _map(experts: int, ep_size: int, ep_rank: int, device: torch.device) -> Tensor:
    return torch.tensor(Placement(experts, ep_size).expert_map(ep_rank), dtype=torch.int32, device=device)
