"""Bytes that a rank's work takes beside the weights that it holds, from the model's sizes. Needs no torch.

The figures follow what the code allocates: tensors that live at the same time, as torch hands them out. What a library
takes within an operation (a matrix product's workspace, a collective's buffers) is not in them.
"""

from dataclasses import dataclass
from typing import Any

from moe_ep.ranges import EXCHANGE_BYTES
from moe_ep.shape import KERNEL_GROUP, MXFP4_BLOCK, ModelShape

# Bytes for each value while the formats are converted (`order.to_kernel_order`, `mxfp4.dequantise`,
# `fp8.dequantise_blocks`), with what comes of it; of a packed code with its scale on the way from disk to the kernels.
_ORDER, _DEQUANTISE, _DEQUANTISE_FP8 = 9 + 1 / 32, 13.0, 12.0
_PACKED = 1 / 2 + 1 / MXFP4_BLOCK
_BLOCK_ENDS = 1.0
"""Of a route: where its block of a grouped GEMM lies (three int32 for at least 16 routes)."""


@dataclass(frozen=True)
class Sharing:
    """How a pass's tokens lie on the ranks that combine experts. own: ranks that have tokens of their own, a share of
    the pass each; 1 where all have the same. row_bytes: of a token on its way to other ranks. exchanges: whether sums
    come back as rows of every rank, as of an all-to-all and of gloo's reduce-scatter. gpu: activation and sums take one
    pass each, and the router no copy in f32."""

    own: int = 1
    row_bytes: int = 0
    exchanges: bool = True
    gpu: bool = False


ALIKE = Sharing()

PEER_BYTES = 256 << 20
"""Of the memory that the other of two GPUs writes (`moe_ep.comm.peer`): V4-Pro's sums of 8 192 tokens in f32 are 235
MB."""

WORK_OF = {
    "preshard": ("loading",),
    "tune": ("largest pass",),
    "check": ("largest pass",),
    "serve": ("loading", "largest pass"),
}
"""By kind of job, the parts of a probe's work that it has."""


def work_bytes(
    shape: ModelShape,
    layers: int,
    local_experts: int,
    *,
    tokens: int,
    parity_tokens: int,
    parity_share: int,
    expert_tp: int = 1,
    shared_tp: int = 1,
    kernels: bool = True,
    presharded: bool = False,
    made: bool = False,
    fp8: bool = False,
    sharing: Sharing = ALIKE,
) -> dict[str, int]:
    """Of a probe, by part of its work; one part follows another. `tokens`: of its largest pass. `parity_share`: ranks
    that share out the comparison. `kernels`: whether they compute, or the reference. `presharded`: nothing is
    converted. `made`: weights are, on the device. `fp8`: activations are rounded to it."""
    cut: dict[str, Any] = {"expert_tp": expert_tp, "shared_tp": shared_tp, "kernels": kernels}
    loading = 0 if presharded else loading_bytes(shape, layers, local_experts, **cut)
    mine = -(-parity_tokens // parity_share)
    return {
        "loading": loading,
        "parity": parity_bytes(shape, parity_tokens, mine, **cut, made=made, fp8=fp8, sharing=sharing),
        "largest pass": pass_bytes(shape, tokens, **cut, kept=parity_tokens, fp8=fp8, sharing=sharing),
    }


def loading_bytes(
    shape: ModelShape, layers: int, local_experts: int, *, expert_tp: int = 1, shared_tp: int = 1, kernels: bool = True
) -> int:
    """The most beyond the weights that stay, while `layers` layers are read and converted: the larger of an expert on
    its way to kernel order and of the shared expert on its way from fp8 to bf16, which comes last."""
    hidden, inner = shape.hidden, shape.intermediate // expert_tp
    shared = hidden * shape.shared_experts * shape.intermediate // shared_tp
    most = (
        13.0 * shared
    )  # two in bf16 and the third in f32 with its scales, beside all in fp8: 4 + 12 + 3 − 6 that stay
    if kernels:
        matrices = ((2 * inner, hidden), (hidden, inner))
        most = max(most, *(_ordering(rows, width, local_experts) - 3.0 * shared for rows, width in matrices))
    if expert_tp > 1:
        matrix = hidden * inner // 2
        together = matrix * max(1, min(local_experts, EXCHANGE_BYTES // matrix))
        most = max(most, 2.0 * together - 3.0 * shared * layers)
    return int(most)


def pass_bytes(
    shape: ModelShape,
    tokens: int,
    *,
    expert_tp: int = 1,
    shared_tp: int = 1,
    kernels: bool = True,
    kept: int = 0,
    fp8: bool = False,
    sharing: Sharing = ALIKE,
) -> int:
    """The most while one layer after another takes `tokens` tokens: its input, the output of the one before, and what
    the router, the dispatch or the shared expert takes beside the sum of the routed experts.

    Of tokens that ranks have of their own each has its share, and the experts all of them: gathered as rows, which are
    unpacked, and their sums scattered; an all-to-all, which moves fewer, is planned as if every rank were hit.
    `kept`: tokens of a pass before, whose workspace stays beside the larger one (`moe_ep.workspace`).
    """
    hidden, inner, own = shape.hidden, shape.intermediate // expert_tp, sharing.own
    shared = shape.shared_experts * shape.intermediate // shared_tp
    mine = -(-tokens // own)
    passed_on = mine * (2 * 2 * hidden + 8 + 8 * shape.top_k)
    gathered = tokens * (2 * hidden + 8 * shape.top_k) if own > 1 else 0
    packed = (mine + tokens) * sharing.row_bytes if own > 1 else 0
    scattered = 4 * hidden * (tokens if sharing.exchanges else mine) if own > 1 else 0
    if sharing.gpu:
        router = 3 * 4 * shape.experts * mine
        beside = max(6 * shared, 2 * shared + 2 * hidden, 4 * hidden)
    else:
        router = 4 * shape.experts * (hidden + mine) + 4 * hidden * mine
        beside = max(24 * shared, (6 if own == 1 else 12) * hidden)
    after = gathered + scattered + 4 * hidden * tokens + beside * (tokens if shared_tp > 1 else mine)
    most = max(router, gathered + packed, after)
    if kernels:
        return passed_on + kept_bytes(shape, tokens, expert_tp=expert_tp, before=kept, fp8=fp8) + most
    # The reference: input, sum, result and an expert's output in f32, beside the next one's w13 on its way to f32.
    experts = gathered + 4 * 4 * hidden * tokens + int(_DEQUANTISE * 2 * hidden * inner)
    return passed_on + max(most, experts)


def kept_bytes(shape: ModelShape, tokens: int, *, expert_tp: int = 1, before: int = 0, fp8: bool = False) -> int:
    """What the kernels keep from call to call: of every route, since which are local is not known beforehand, the
    activation (bf16; where it is rounded to `fp8` up to twice more) and the output (f32), and the tokens once more
    (bf16)."""
    route = (6 if fp8 else 2) * shape.intermediate // expert_tp + 4 * shape.hidden + 4 + _BLOCK_ENDS
    token = int(shape.top_k * route) + 2 * shape.hidden
    if before >= tokens:
        return before * token
    return (before + max(tokens, 2 * before)) * token


def parity_bytes(
    shape: ModelShape,
    tokens: int,
    mine: int,
    *,
    expert_tp: int = 1,
    shared_tp: int = 1,
    kernels: bool = True,
    made: bool = False,
    fp8: bool = False,
    sharing: Sharing = ALIKE,
) -> int:
    """The most while a layer is held against the dense reference: `tokens` pass, `mine` of them are compared.

    The reference holds three matrices of one expert, the last on its way to f32, beside them as they were read, and the
    router, of a hash layer with its table. What is read from files reaches a GPU a matrix at a time, what is `made`
    there all at once.
    """
    cut = {"expert_tp": expert_tp, "shared_tp": shared_tp}
    kept = kept_bytes(shape, tokens, expert_tp=expert_tp, fp8=fp8) if kernels else 0
    matrix, read = shape.hidden * shape.intermediate, 1 if sharing.gpu and not made else 3
    routed = (2 * 4 + _DEQUANTISE + read * _PACKED) * matrix
    shared = (2 * 4 + _DEQUANTISE_FP8 + read) * matrix * shape.shared_experts
    router = 2 * shape.experts * shape.hidden + (8 * shape.vocab * shape.top_k if shape.hash_layers else 0)
    reference = kept + 4 * shape.hidden * tokens + 8 * shape.hidden * mine + router + int(max(routed, shared))
    return max(reference, pass_bytes(shape, tokens, **cut, kernels=kernels, fp8=fp8, sharing=sharing))


def _ordering(rows: int, width: int, local_experts: int) -> float:
    """Of a matrix of codes: one expert's on its way, with the one before; where K is padded, it once more as it was and
    all experts' as they were read."""
    whole = -(-width // KERNEL_GROUP) * KERNEL_GROUP
    moved = 0.0 if whole == width else rows * width * (1 + local_experts * _PACKED)
    return rows * whole * (_ORDER + _PACKED) + moved
