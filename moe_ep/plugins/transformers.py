"""These experts as transformers' experts implementation "moe_ep", and as an EP implementation of the same name.

    from moe_ep.plugins.transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="moe_ep")

What transformers calls an experts module (`DeepseekV4Experts`, or `FP8Experts` in its place where the checkpoint is
quantised) keeps its router and its caller; only the experts' arithmetic is ours. Its weights are one of

- attached: a `RoutedExperts` that someone loaded, of this rank's share or of all (`attach_experts`);
- packed: an `FP8Experts` with `expert_dtype="fp4"`, as transformers' own loader fills it on a GPU;
- dense: refused; `pack_experts` brings weights that mxfp4 holds exactly into the first form.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moe_ep.backends.target import runs_on
from moe_ep.comm import Alone
from moe_ep.fused import fused_moe_mxfp4
from moe_ep.layer import RoutedExperts
from moe_ep.mxfp4 import dequantise, quantise
from moe_ep.order import order_in_place
from moe_ep.placement import Placement
from moe_ep.plugins.versions import PluginError, installed, need_version, plug_in_point
from moe_ep.selector import select_backend
from moe_ep.spec import MoELayerSpec, Mxfp4Config, TopKOutput

NAME = "moe_ep"
OLDEST, TOO_NEW = "5.8", "6"
"""deepseek_v4 came with 5.8."""

_DENSE = ("gate_up_proj", "down_proj")
_PACKED = ("gate_up_proj", "gate_up_proj_scale_inv", "down_proj", "down_proj_scale_inv")
_ORDERED = tuple(f"moe_ep_{name}" for name in ("w13", "w13_scale", "w2", "w2_scale"))


def register() -> str:
    """Register with the installed transformers; returns the name for `experts_implementation=`.

    Where transformers has EP implementations (`DistributedConfig(ep_implementation=...)`), one of the same name is
    registered too: an all-reduce of f32 partials.

    Raises
    ------
    PluginError
        If transformers is not installed, or its version has other plug-in points.
    """
    whose = f"transformers {need_version('transformers', OLDEST, TOO_NEW)}"
    plain = plug_in_point("transformers.integrations.moe", ["ALL_EXPERTS_FUNCTIONS"], whose)
    fp8 = plug_in_point("transformers.integrations.finegrained_fp8", ["ALL_FP8_EXPERTS_FUNCTIONS"], whose)
    for functions in (plain.ALL_EXPERTS_FUNCTIONS, fp8.ALL_FP8_EXPERTS_FUNCTIONS):
        functions.register(NAME, experts_forward)
    if has_ep_implementations():
        from moe_ep.plugins.transformers_ep import register_ep

        register_ep(NAME)
    return NAME


def has_ep_implementations() -> bool:
    """Whether this transformers lets one choose how experts are parallelised."""
    try:
        plug_in_point("transformers.distributed.expert_parallel", ["EPImplementationInterface"], "transformers")
    except PluginError:
        return False
    return True


def experts_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls: the module's experts, hidden_states [M, H] → [M, H] in the same type.

    Ids outside the module's experts are skipped: transformers marks routes to other ranks so. The arithmetic takes
    bf16; other types are rounded to it on the way in.
    """
    attached = getattr(module, "moe_ep_experts", None)
    if attached is None:
        return experts_partial(module, hidden_states, top_k_index, top_k_weights, hidden_states.dtype)
    _refuse_gradients(hidden_states)
    topk = TopKOutput(top_k_weights.float(), top_k_index.int(), None)
    combine: Callable[[Tensor], Tensor] = module.moe_ep_combine  # type: ignore[assignment]  # a callable, kept beside the module's tensors
    return combine(attached(hidden_states.bfloat16(), topk)).to(hidden_states.dtype)


def experts_partial(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """The sum [M, H] over the module's own experts, by their rows in it; ids outside of them are skipped.

    Raises
    ------
    PluginError
        If the module's weights or activation are not DeepSeek-V4's.
    """
    _refuse_gradients(hidden_states)
    if not hasattr(module, _ORDERED[0]):
        refusal = _refusal(module)
        if refusal is not None:
            raise PluginError(f"{type(module).__name__} with experts_implementation={NAME!r}: {refusal}")
    ordered = hasattr(module, _ORDERED[0]) or (runs_on(hidden_states.device) and _order(module))
    weights = [getattr(module, name) for name in (_ORDERED if ordered else _PACKED)]
    w13, w13_scale, w2, w2_scale = (weight.detach().view(torch.uint8) for weight in weights)
    return fused_moe_mxfp4(
        hidden_states.bfloat16(),
        w13,
        w13_scale,
        w2,
        w2_scale,
        top_k_index,
        top_k_weights,
        swiglu_limit=getattr(module, "limit", None),
        weight_order="kernel" if ordered else "checkpoint",
        out_dtype=out_dtype,
    )


def attach_experts(
    module: nn.Module, experts: RoutedExperts, combine: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Let an experts module compute with `experts`, loaded elsewhere, in the place of its own weights, which it drops.

    `experts` takes global expert ids and returns its rank's partial, `combine` makes the whole of it (default: it is
    the whole). The module's configuration must choose `experts_implementation="moe_ep"`.
    """
    chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if chosen != NAME:
        raise PluginError(
            f"{type(module).__name__} computes with experts_implementation={chosen!r}, which would not see attached "
            f"experts; build the model with experts_implementation={NAME!r}"
        )
    if getattr(module, "_is_expert_parallel", False):
        raise PluginError(
            f"{type(module).__name__} is sharded by transformers' own expert parallelism, which hands it local ids; "
            "attached experts take global ones: load the model without ep_size"
        )
    for name in _PACKED:
        if name in module._parameters:
            module._parameters[name] = None
    module.add_module("moe_ep_experts", experts)
    module.moe_ep_combine = combine or Alone()  # type: ignore[assignment]


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every experts module of a transformers model, in the order of its layers."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "experts" and hasattr(module, "is_concatenated"):
            yield name, module


def pack_experts(
    model: nn.Module,
    *,
    ep_rank: int = 0,
    ep_size: int = 1,
    combine: Callable[[Tensor], Tensor] | None = None,
    impl: str = "auto",
    rounding: bool = False,
) -> int:
    """Bring dense experts into mxfp4, this rank's share of them, and attach them; returns how many modules there were.

    Where transformers dequantises an mxfp4 checkpoint (on a CPU it does), nothing is lost: the values are mxfp4's.

    Raises
    ------
    PluginError
        If a module's weights are not mxfp4's values and `rounding` is False.
    """
    count = 0
    for name, module in experts_modules(model):
        if getattr(module, "moe_ep_experts", None) is not None:
            continue
        attach_experts(module, _packed(name, module, ep_rank, ep_size, impl, rounding), combine)
        count += 1
    return count


def _packed(name: str, module: nn.Module, ep_rank: int, ep_size: int, impl: str, rounding: bool) -> RoutedExperts:
    refusal = _arithmetic_refusal(module)
    gate_up, down = (getattr(module, weight) for weight in _DENSE)
    if refusal is None and not gate_up.dtype.is_floating_point:
        refusal = f"its weights are {gate_up.dtype}, not dense"
    if refusal is not None:
        raise PluginError(f"{name}: {refusal}")
    held = Placement(gate_up.shape[0], ep_size).experts(ep_rank)
    config: Any = module.config
    spec = MoELayerSpec(
        top_k=config.num_experts_per_tok,
        num_experts=gate_up.shape[0],
        num_local_experts=len(held),
        hidden_size=down.shape[1],
        intermediate_size=down.shape[2],
        activation="swiglu",
        tp_rank=0,
        tp_size=1,
        ep_rank=ep_rank,
        ep_size=ep_size,
        prefix=name,
    )
    with gate_up.device:
        experts = RoutedExperts(select_backend(spec, Mxfp4Config(), impl=impl), getattr(module, "limit", None))
    for weight, (codes, scale) in (
        (gate_up, ("w13_weight", "w13_weight_scale")),
        (down, ("w2_weight", "w2_weight_scale")),
    ):
        for row, expert in enumerate(held):
            values = weight[expert].detach().float()
            packed, exponents = quantise(values)
            if not rounding and not torch.equal(dequantise(packed, exponents), values):
                raise PluginError(
                    f"{name}: expert {expert} has values that mxfp4 does not: this is no dequantised mxfp4 checkpoint; "
                    "pack_experts(..., rounding=True) rounds them"
                )
            experts.get_parameter(codes)[row].copy_(packed)
            experts.get_parameter(scale)[row].copy_(exponents)
    experts.process_weights_after_loading()
    return experts


def _refuse_gradients(hidden_states: Tensor) -> None:
    if torch.is_grad_enabled() and hidden_states.requires_grad:
        raise PluginError(
            f"experts_implementation={NAME!r} is for inference and has no gradients: call the model within "
            "torch.inference_mode() or torch.no_grad()"
        )


def _refusal(module: nn.Module) -> str | None:
    """Why the module's own weights cannot be computed with."""
    for name in _PACKED:
        if getattr(module, name, None) is None:
            return (
                f"it has no packed experts (no {name}, transformers {installed('transformers')}): load a checkpoint "
                "whose expert_dtype is 'fp4' on a GPU, or call moe_ep.plugins.transformers.pack_experts(model)"
            )
    if module.gate_up_proj.dtype not in (torch.int8, torch.uint8):
        return f"its gate_up_proj is {module.gate_up_proj.dtype}, expected int8: two e2m1 codes a byte"
    if module.gate_up_proj_scale_inv.dtype not in (torch.uint8, torch.float8_e8m0fnu):
        return f"its scales are {module.gate_up_proj_scale_inv.dtype}, expected float8_e8m0fnu (scale_fmt='ue8m0')"
    return _arithmetic_refusal(module)


def _arithmetic_refusal(module: nn.Module) -> str | None:
    """Why these experts do not compute what the module asks for."""
    if not getattr(module, "has_gate", True):
        return "it has no gate; these experts compute w2 · (silu(w1 · x) · (w3 · x))"
    if not getattr(module, "is_concatenated", True) or getattr(module, "is_transposed", False):
        return "its rows are interleaved or transposed; these experts read w1's rows, then w3's, K last"
    if getattr(module, "has_bias", False):
        return "it has biases, which transformers' mxfp4 experts do not"
    others = [
        name for name in ("swiglu_alpha", "gate_softcap", "up_softcap") if getattr(module, name, None) is not None
    ]
    act = getattr(getattr(module, "config", None), "hidden_act", "silu")
    if others or act not in ("silu", "swish"):
        return f"its activation is {act} with {', '.join(others) or 'nothing else'}; these experts compute silu(g) · u"
    return None


def _order(module: nn.Module) -> bool:
    """Bring packed weights into kernel order, once, in their own memory where K is a multiple of 128.

    Their parameters are dropped, since any other implementation, or a saved checkpoint, would take the new bytes for
    the old: those who look for them fail.
    """
    packed = [getattr(module, name).detach().view(torch.uint8) for name in _PACKED]
    ordered = (*order_in_place(*packed[:2]), *order_in_place(*packed[2:]))
    for name, tensor in zip(_ORDERED, ordered, strict=True):
        module.register_buffer(name, tensor, persistent=False)
    for name in _PACKED:
        module._parameters[name] = None
    module.register_state_dict_pre_hook(_refuse_saving)
    return True


def _refuse_saving(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise PluginError(
        f"{prefix.rstrip('.')}: its weights are in the order that the kernels read; save a model before it has run "
        f"with experts_implementation={NAME!r}"
    )
