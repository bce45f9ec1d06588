"""The backend interface of tokenspeed, and what all mxfp4 backends of this package share."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_ep.fused import fused_moe_mxfp4, fused_moe_mxfp4_by_columns
from moe_ep.placement import Placement
from moe_ep.shape import ACTIVATION_GROUP, MXFP4_BLOCK
from moe_ep.spec import ActivationDtype, BackendKey, MoELayerSpec, Mxfp4Config, TopKOutputFormat


class MoEBackend(ABC):
    """One implementation of the experts of a layer. `forward` returns this rank's partial; the caller reduces."""

    def __init__(
        self,
        key: BackendKey,
        spec: MoELayerSpec,
        quant_config: object,
        routing_config: dict[str, Any] | None = None,
    ) -> None:
        self.key = key
        self.spec = spec
        self.quant_config = quant_config
        self.routing_config = routing_config

    @classmethod
    @abstractmethod
    def supports(cls, spec: MoELayerSpec, quant_config: object) -> bool:
        """Whether this backend takes the layer."""

    @classmethod
    def refusal(cls, spec: MoELayerSpec, quant_config: object, arch: str) -> str | None:
        """Why this backend does not take the layer on `arch`, None if it does.

        A backend that only knows `supports` still gets a line in the record.
        """
        return None if cls.supports(spec, quant_config) else f"{cls.__name__}.supports() is False for {spec}"

    @classmethod
    def launch_configs(cls, spec: MoELayerSpec, quant_config: object, arch: str) -> dict[str, Any] | None:
        """Which launch configurations this rank's layer gets on `arch`, for the selector's record; None without any."""
        return None

    @abstractmethod
    def create_layer_weights(self, layer: nn.Module, *, with_bias: bool = False) -> None:
        """Register empty weights on `layer`, to be filled by the loader."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:  # noqa: B027 - optional step
        """Bring the loaded weights into the order that the kernels read."""

    @abstractmethod
    def forward(
        self,
        layer: nn.Module,
        hidden_states: Tensor,
        topk_output: Any,
        num_global_tokens: int,
        max_num_tokens_per_gpu: int,
    ) -> Tensor:
        """This rank's partial [M, H] of hidden_states [M, H]."""

    @property
    def topk_output_format(self) -> TopKOutputFormat:
        """STANDARD: the router chooses. A backend's own softmax top-k would be wrong for V4."""
        return TopKOutputFormat.STANDARD

    @property
    def apply_routed_scaling_factor_on_output(self) -> bool:
        """False: the routing weights already carry the factor, which must be applied once."""
        return False


class Mxfp4Backend(MoEBackend):
    """What the mxfp4 backends share: the gate, the weights' layout, the call."""

    impl: ClassVar[str]

    @classmethod
    def device_refusal(cls, arch: str) -> str | None:
        """Why this implementation does not run on `arch`, None if it does."""
        return None

    @classmethod
    def supports(cls, spec: MoELayerSpec, quant_config: object) -> bool:
        """Whether the layer is taken, on whatever device."""
        return _layer_refusal(spec, quant_config) is None

    @classmethod
    def refusal(cls, spec: MoELayerSpec, quant_config: object, arch: str) -> str | None:
        """See `MoEBackend.refusal`: the device first, then the layer."""
        return cls.device_refusal(arch) or _layer_refusal(spec, quant_config)

    def create_layer_weights(self, layer: nn.Module, *, with_bias: bool = False) -> None:
        """Register the rank's weights on `layer`, uninitialised, on torch's default device.

        With L = num_local_experts and I = intermediate_size / tp_size: w13_weight uint8 [L, 2I, H/2] (w1's
        rows, then w3's), w13_weight_scale uint8 [L, 2I, H/32], w2_weight uint8 [L, H, I/2], w2_weight_scale
        uint8 [L, H, I/32], expert_map int32 [E]; with_bias adds f32 w13_weight_bias [L, 2I] and
        w2_weight_bias [L, H]. `layer.swiglu_arg.limit` is the clamp, no clamp where it is absent.

        Raises
        ------
        ValueError
            If `layer` asks for gpt-oss's row order or activation.
        """
        spec = self.spec
        _check_activation(layer)
        local, hidden = spec.num_local_experts, spec.hidden_size
        inner = spec.intermediate_size // spec.tp_size
        shapes = {
            "w13_weight": (local, 2 * inner, hidden // 2),
            "w13_weight_scale": (local, 2 * inner, hidden // MXFP4_BLOCK),
            "w2_weight": (local, hidden, inner // 2),
            "w2_weight_scale": (local, hidden, inner // MXFP4_BLOCK),
        }
        for name, shape in shapes.items():
            _register(layer, name, torch.empty(shape, dtype=torch.uint8))
        if with_bias:
            _register(layer, "w13_weight_bias", torch.empty(local, 2 * inner, dtype=torch.float32))
            _register(layer, "w2_weight_bias", torch.empty(local, hidden, dtype=torch.float32))
        placement = Placement(spec.num_experts, spec.ep_size)
        expert_map = torch.tensor(placement.expert_map(spec.ep_rank), dtype=torch.int32)
        layer.register_buffer("expert_map", expert_map, persistent=False)

    def forward(
        self,
        layer: nn.Module,
        hidden_states: Tensor,
        topk_output: Any,
        num_global_tokens: int,
        max_num_tokens_per_gpu: int,
    ) -> Tensor:
        """This rank's partial [M, H], in the hidden states' type unless `layer.partial_dtype` says another.

        The token counts of the interface are not needed.
        """
        tensors, options = self._call(layer, topk_output)
        return fused_moe_mxfp4(hidden_states, *tensors, **options)

    def by_columns(
        self, layer: nn.Module, hidden_states: Tensor, topk_output: Any, parts: int, spare: int
    ) -> Iterator[Tensor]:
        """`forward` in ranges of columns [M, H / parts]; see `fused_moe_mxfp4_by_columns`."""
        tensors, options = self._call(layer, topk_output)
        return fused_moe_mxfp4_by_columns(hidden_states, *tensors, **options, parts=parts, spare=spare)

    def _call(self, layer: nn.Module, topk_output: Any) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """What the experts take after the hidden states."""
        packed = ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale")
        tensors = *(_tensor(layer, name) for name in packed), topk_output.topk_ids, topk_output.topk_weights
        return tensors, {
            "b13": getattr(layer, "w13_weight_bias", None),
            # Under TP every rank holds a slice of I, but w2's bias must be counted once.
            "b2": getattr(layer, "w2_weight_bias", None) if self.spec.tp_rank == 0 else None,
            "expert_map": _tensor(layer, "expert_map"),
            "swiglu_limit": getattr(getattr(layer, "swiglu_arg", None), "limit", None),
            "activation_dtype": activation_dtype(self.quant_config),
            "weight_order": getattr(layer, "weight_order", "checkpoint"),
            "impl": self.impl,
            "out_dtype": getattr(layer, "partial_dtype", None),
        }


def activation_dtype(quant_config: object) -> ActivationDtype:
    """What a quantisation multiplies weights with."""
    return quant_config.activation_dtype if isinstance(quant_config, Mxfp4Config) else "bf16"


def _register(layer: nn.Module, name: str, tensor: Tensor) -> None:
    layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def _tensor(layer: nn.Module, name: str) -> Tensor:
    tensor: Tensor = getattr(layer, name)
    return tensor


def _layer_refusal(spec: MoELayerSpec, quant_config: object) -> str | None:
    """Why no mxfp4 backend of this package takes the layer."""
    if not isinstance(quant_config, Mxfp4Config):
        return f"quant_config is {type(quant_config).__name__}, expected Mxfp4Config"
    if spec.activation not in ("silu", "swiglu"):
        return f"activation {spec.activation!r} is not silu or swiglu"
    if spec.a2a_backend != "none":
        return f"a2a_backend {spec.a2a_backend!r}: the partials are all-reduced by the caller; use 'none'"
    if spec.tp_size > 1 and spec.ep_size > 1:
        return f"tp_size={spec.tp_size} and ep_size={spec.ep_size} cannot be both > 1"
    if spec.hidden_size % MXFP4_BLOCK:
        return f"hidden_size={spec.hidden_size} is not a multiple of {MXFP4_BLOCK}"
    if spec.intermediate_size % (MXFP4_BLOCK * spec.tp_size):
        return (
            f"intermediate_size={spec.intermediate_size} over tp_size={spec.tp_size} is not a multiple of {MXFP4_BLOCK}"
        )
    inner = spec.intermediate_size // spec.tp_size
    if quant_config.is_w4a8_fp8 and spec.tp_size > 1 and inner % ACTIVATION_GROUP:
        return (
            f"fp8 activations: intermediate_size={spec.intermediate_size} over tp_size={spec.tp_size} gives {inner}, "
            f"not a multiple of {ACTIVATION_GROUP}: activations that share a scale would lie on two ranks; use bf16"
        )
    try:
        held = len(Placement(spec.num_experts, spec.ep_size).experts(spec.ep_rank))
    except ValueError as error:
        return str(error)
    if spec.num_local_experts != held:
        return (
            f"num_local_experts={spec.num_local_experts}, but rank {spec.ep_rank} of {spec.ep_size} holds "
            f"{held} of {spec.num_experts} experts"
        )
    return None


def _check_activation(layer: nn.Module) -> None:
    alpha = getattr(getattr(layer, "swiglu_arg", None), "alpha", None)
    if alpha not in (None, 1.0) or getattr(layer, "swiglu_beta", None):
        raise ValueError(
            f"swiglu alpha={alpha}, beta={getattr(layer, 'swiglu_beta', None)} is gpt-oss's "
            "silu(alpha·g)·(u + beta); these experts compute silu(g)·u"
        )
    rows = getattr(layer, "w13_input_layout", "concatenated")
    if rows != "concatenated":
        raise ValueError(f"w13_input_layout is {rows!r}; these experts read 'concatenated' rows (w1, then w3)")
