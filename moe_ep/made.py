"""A model's MoE weights made from a seed on the device that holds them: sizes of which no checkpoint is at hand.

Every part of every layer has a generator of its own, so a rank makes only what it holds, and whoever compares
(`moe_ep.dense`) makes the same once more. Devices of another kind make other numbers of the same seed.
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moe_ep.arrangement import Arrangement
from moe_ep.backends.base import MoEBackend
from moe_ep.checkpoint import DTYPES
from moe_ep.comm import Combine
from moe_ep.fp8 import quantise_blocks
from moe_ep.layer import MoELayer
from moe_ep.loading import Parts, empty_parts, expert_rows, finished
from moe_ep.mxfp4 import E2M1_MAGNITUDES
from moe_ep.placement import WHOLE, Slice
from moe_ep.reading import Progress
from moe_ep.shape import ModelShape
from moe_ep.tensors import expert_specs, gate_specs, shared_specs

_E8M0_BIAS = 127
_SPREAD = 1  # a block's scale is up to so many powers of two beside the middle one


class MadeWeights:
    """The MoE layers of a model, as `Checkpoint` gives them, but made on `device` each time they are asked for.

    Experts' codes are uniform over the sixteen of e2m1, their scales over three powers of two, with a variance of about
    1/K, so that activations keep their size. `skew`: standard deviation of the routers' selection bias; the larger it
    is, the fewer experts get most of the tokens.
    """

    def __init__(self, shape: ModelShape, seed: int, device: torch.device, skew: float) -> None:
        self.shape = shape
        self._seed, self._device, self._skew = seed, device, skew

    def read_expert(self, layer: int, expert: int) -> dict[str, Tensor]:
        """w1, w2, w3 of one routed expert: `.weight` and `.scale`, uint8."""
        generator = self._generator(f"{layer} expert {expert}")
        parts: dict[str, Tensor] = {}
        for name, spec in expert_specs(self.shape).items():
            if name.endswith(".weight"):
                words = torch.empty(math.prod(spec.shape) // 8, dtype=torch.int64, device=self._device)
                parts[name] = words.random_(-(2**63), None, generator=generator).view(torch.uint8).view(spec.shape)
                middle = _E8M0_BIAS + _exponent(2 * spec.shape[1])
            else:
                scale = torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device=self._device)
                parts[name] = scale.random_(middle - _SPREAD, middle + _SPREAD + 1, generator=generator)
        return parts

    def read_shared_expert(self, layer: int) -> dict[str, Tensor]:
        """w1, w2, w3 of the shared expert: `.weight` float8_e4m3fn and `.scale` uint8."""
        generator = self._generator(f"{layer} shared expert")
        parts: dict[str, Tensor] = {}
        for name, spec in shared_specs(self.shape).items():
            if name.endswith(".weight"):
                values = self._normal(generator, *spec.shape) / spec.shape[1] ** 0.5
                parts[name], parts[f"{name.removesuffix('weight')}scale"] = quantise_blocks(values)
        return parts

    def read_gate(self, layer: int) -> dict[str, Tensor]:
        """The router: `weight` bf16, and `bias` f32 or, in a hash layer, `tid2eid` int64."""
        shape, generator = self.shape, self._generator(f"{layer} gate")
        values: dict[str, Callable[[], Tensor]] = {
            "weight": lambda: (self._normal(generator, shape.experts, shape.hidden) / shape.hidden**0.5).bfloat16(),
            "bias": lambda: self._normal(generator, shape.experts) * self._skew,
            "tid2eid": lambda: self._normal(generator, shape.vocab, shape.experts).topk(shape.top_k).indices,
        }
        return {name: values[name]() for name in gate_specs(shape, hash_layer=shape.is_hash_layer(layer))}

    def _normal(self, generator: torch.Generator, *size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=self._device)

    def _generator(self, what: str) -> torch.Generator:
        digest = hashlib.blake2b(f"{self._seed} {what}".encode(), digest_size=7).digest()
        return torch.Generator(self._device).manual_seed(int.from_bytes(digest, "little"))


def make_layers(
    made: MadeWeights,
    backends: Mapping[int, MoEBackend],
    combine: Combine,
    device: torch.device,
    *,
    shared: Slice = WHOLE,
    arrangements: Mapping[int, Arrangement] | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> dict[int, MoELayer]:
    """What the backends' rank holds of each layer, one layer after another; the arguments are `load_layers`'."""
    layers: dict[int, MoELayer] = {}
    started, done = time.monotonic(), 0
    for number, backend in backends.items():
        parts = empty_parts(made.shape, number, backend, shared, device, (arrangements or {}).get(number))
        _fill(made, number, parts)
        layers[number] = finished(parts, made.shape, combine, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        done += sum(t.untyped_storage().nbytes() for t in layers[number].state_dict().values())
        on_progress(Progress(done, done * len(backends) // len(layers), time.monotonic() - started))
    return layers


def _fill(made: MadeWeights, layer: int, parts: Parts) -> None:
    spec = parts.experts.backend.spec
    for local, expert in enumerate(parts.held):
        for name, tensor in made.read_expert(layer, expert).items():
            expert_rows(parts.experts, local, name).copy_(_part(tensor, name, Slice(spec.tp_rank, spec.tp_size)))
    if parts.shared:
        for name, tensor in made.read_shared_expert(layer).items():
            parts.shared[name].copy_(_part(tensor, name, parts.shared_slice))
    parts.gate.update(made.read_gate(layer))


def _part(tensor: Tensor, name: str, place: Slice) -> Tensor:
    """A rank's rows of w1 and w3, or columns of w2."""
    return tensor.chunk(place.size, dim=1 if name.startswith("w2") else 0)[place.rank]


def _exponent(width: int) -> int:
    """Of the middle scale, so that the product with `width` uniform codes has a variance of about 1."""
    codes = sum(m * m for m in E2M1_MAGNITUDES) / len(E2M1_MAGNITUDES)
    scales = sum(4.0**power for power in range(-_SPREAD, _SPREAD + 1)) / (2 * _SPREAD + 1)
    return round(-math.log2((codes * scales * width) ** 0.5))
