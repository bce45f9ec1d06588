"""Every kernel and launch configuration that the selector can choose on gfx942 for DeepSeek-V4, and named costs."""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any, get_args

import torch

from moe_ep import fused_moe_mxfp4
from moe_ep.order import KernelOrder
from moe_ep.placement import Placement
from moe_ep.spec import ActivationDtype
from tests.gfx942.compiled import Resources, resources
from tests.gfx942.cost import Cost, cost
from tests.gfx942.driver import Launch, emulated


@dataclass(frozen=True)
class RankShape:
    """What one rank of a model holds: `experts` of all over `ep_size` ranks, and `inner` of each expert's I."""

    name: str
    experts: int
    ep_size: int
    hidden: int
    inner: int
    top_k: int = 6


SHAPES = (
    RankShape("flash-ep4", 256, 4, 4096, 2048),
    RankShape("flash-ep8-tp4", 256, 8, 4096, 512),
    RankShape("pro-ep8", 384, 8, 7168, 3072),
)
TOKENS = tuple(1 << n for n in range(14))
IMPLS = ("triton_kernel", "gluon_kernel")
ORDERS: dict[ActivationDtype, KernelOrder] = {"bf16": "kernel", "fp8": "kernel-fp8"}


@cache
def configurations(shape: RankShape) -> dict[str, Resources]:
    """What the compiler makes of each distinct kernel that is launched for 1 to 8192 tokens, by its name and tile, with
    activations of either type.

    Nothing is executed: the weights are never touched, so a rank's full size costs no memory.
    """
    found: dict[str, Resources] = {}
    with emulated() as chip:
        chip.executes = False
        for impl, activation_dtype, tokens in product(IMPLS, get_args(ActivationDtype), TOKENS):
            _launch(shape, tokens, activation_dtype, impl)
        for launch in chip.launches:
            key = f"{shape.name} {tile(launch)}"
            if key not in found:
                found[key] = resources(launch)
    return found


def tile(launch: Launch) -> str:
    """down_kernel 16×64/4/2: the kernel, its block sizes (and a row's parts), warps and stages."""
    sizes = [str(v) for name, v in launch.constants.items() if name.startswith("BLOCK_") or name == "PARTS"]
    stages = launch.constants.get("STAGES", launch.num_stages)
    return f"{launch.program.name} {'×'.join(sizes)}/{launch.num_warps}/{stages}"


def _launch(shape: RankShape, tokens: int, activation_dtype: ActivationDtype, impl: str) -> None:
    local = len(Placement(shape.experts, shape.ep_size).experts(0))
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, shape.experts, generator=generator).argsort(-1)[:, : shape.top_k]
    expert_map = torch.tensor(Placement(shape.experts, shape.ep_size).expert_map(0), dtype=torch.int32)
    fused_moe_mxfp4(
        torch.empty(tokens, shape.hidden, dtype=torch.bfloat16),
        **_weights(local, shape.hidden, shape.inner),
        topk_ids=ids,
        topk_weights=torch.rand(tokens, shape.top_k, generator=generator),
        expert_map=expert_map,
        activation_dtype=activation_dtype,
        weight_order=ORDERS[activation_dtype],
        impl=impl,
    )


def _weights(local: int, hidden: int, inner: int) -> dict[str, Any]:
    shapes = {
        "w13": (local, 2 * inner, hidden // 2),
        "w13_scale": (local, 2 * inner, hidden // 32),
        "w2": (local, hidden, inner // 2),
        "w2_scale": (local, hidden, inner // 32),
    }
    return {name: torch.empty(shape, dtype=torch.uint8) for name, shape in shapes.items()}


@dataclass(frozen=True)
class Workload:
    """Tokens that all go to the experts that are there: `tokens` × `top_k` routes over `experts`, of `known`."""

    name: str
    experts: int
    hidden: int
    inner: int
    tokens: int
    top_k: int = 1
    activation_dtype: ActivationDtype = "bf16"
    known: int = 0
    """Experts of the model, as many as are there unless it says more: by routes an expert a kernel is chosen."""
    impls: tuple[str, ...] = IMPLS

    @property
    def weights(self) -> int:
        """Of the experts that are hit."""
        return min(self.experts, self.tokens * self.top_k) * 3 * self.hidden * self.inner


WORKLOADS = (
    Workload("narrow decode", 2, 1024, 512, 12),
    Workload("narrow prefill", 1, 1024, 512, 128),
    Workload("narrow single", 1, 1024, 512, 1, known=16, impls=("gluon_kernel",)),
    Workload("flash decode", 1, 4096, 2048, 12),
    Workload("flash prefill", 1, 4096, 2048, 128),
    Workload("flash single", 1, 4096, 2048, 1, known=16, impls=("gluon_kernel",)),
    Workload("pro decode", 1, 7168, 3072, 12),
    Workload("pro single", 1, 7168, 3072, 1, known=16, impls=("gluon_kernel",)),
    Workload("narrow decode, fp8", 2, 1024, 512, 12, activation_dtype="fp8", impls=("gluon_kernel",)),
    Workload("narrow prefill, fp8", 1, 1024, 512, 128, activation_dtype="fp8", impls=("gluon_kernel",)),
    Workload("narrow single, fp8", 1, 1024, 512, 1, activation_dtype="fp8", known=16, impls=("gluon_kernel",)),
    Workload("flash decode, fp8", 1, 4096, 2048, 12, activation_dtype="fp8", impls=("gluon_kernel",)),
    Workload("flash prefill, fp8", 1, 4096, 2048, 128, activation_dtype="fp8", impls=("gluon_kernel",)),
    Workload("flash single, fp8", 1, 4096, 2048, 1, activation_dtype="fp8", known=16, impls=("gluon_kernel",)),
    Workload("pro decode, fp8", 1, 7168, 3072, 12, activation_dtype="fp8", impls=("gluon_kernel",)),
    Workload("pro single, fp8", 1, 7168, 3072, 1, activation_dtype="fp8", known=16, impls=("gluon_kernel",)),
)
"""A decode tile is padded to 16 rows, so its cost per weight is that of any number of routes up to 16. With fp8
activations both backends launch the same kernels."""


def launches(workload: Workload, impl: str = "triton_kernel") -> list[Launch]:
    """What one op of a backend launches, executed."""
    generator = torch.Generator().manual_seed(0)
    weights = _weights(workload.experts, workload.hidden, workload.inner)
    for name, tensor in weights.items():
        low, high = (118, 122) if name.endswith("_scale") else (0, 256)
        tensor.random_(low, high, generator=generator)
    routes = torch.arange(workload.tokens * workload.top_k).reshape(workload.tokens, workload.top_k)
    known = max(workload.known, workload.experts)
    expert_map = torch.arange(known, dtype=torch.int32)
    expert_map[workload.experts :] = -1
    with emulated() as chip:
        fused_moe_mxfp4(
            torch.randn(workload.tokens, workload.hidden, generator=generator).bfloat16(),
            **weights,
            topk_ids=routes % workload.experts,
            activation_dtype=workload.activation_dtype,
            weight_order=ORDERS[workload.activation_dtype],
            topk_weights=torch.rand(workload.tokens, workload.top_k, generator=generator),
            expert_map=expert_map,
            impl=impl,
        )
    return chip.launches


def costs(workload: Workload) -> dict[str, Cost]:
    """The counted cost of each GEMM of one op of each backend, by its name and tile; of the whole op, with its plan,
    rounding and combine, by the backend's; and of what rounds activations, on the weights that they are multiplied
    with."""
    found: dict[str, Cost] = {}
    for impl in workload.impls:
        everything: Counter[str] = Counter()
        for launch in launches(workload, impl):
            assert launch.execution is not None
            executed = launch.execution.executed
            everything += executed
            if share := next((n for name, n in _SHARES.items() if launch.program.name.startswith(name)), 0):
                found[tile(launch)] = _cost(executed, workload.weights * share // 3)
        found[f"{impl}, whole op"] = _cost(everything, workload.weights)
    return found


_SHARES = {"gate_up": 2, "quantise_tokens": 2, "down": 1, "quantise_routes": 1, "quantise_local": 1}
"""Of the three matrices' weights, what a kernel multiplies, by the beginning of its name."""


def _cost(executed: Counter[str], weights: int) -> Cost:
    # Packed codes and scales once; activations are small beside them and left out.
    return cost(executed, weights=weights, distinct_bytes=weights // 2 + weights // 32)
