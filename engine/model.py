"""transformers' DeepSeek-V4 on one rank: built empty, filled by this project's loader, run over packed sequences."""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DynamicCache
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Attention, DeepseekV4RotaryEmbedding

from engine.names import module_name
from engine.packed import Packed, PackedAttention, sliding_mask
from moe_ep.attention import AttentionShape
from moe_ep.backends.base import MoEBackend
from moe_ep.checkpoint import DTYPES, Checkpoint
from moe_ep.comm import Combine
from moe_ep.fp8 import dequantise_blocks
from moe_ep.headers import CheckpointError
from moe_ep.layer import MoELayer
from moe_ep.loading import USUAL, Reading, load_layers
from moe_ep.placement import WHOLE, Slice
from moe_ep.plugins import transformers as plugin
from moe_ep.ranges import plan_reads
from moe_ep.reading import Progress, fetch
from moe_ep.targets import allocator, into
from moe_ep.tensors import HEADS, TensorSpec, block_prefix, dense_specs


@dataclass(frozen=True)
class Ranks:
    """How the ranks share the model.

    experts: the combine of the ranks that hold a layer's experts together. dense, heads: of those that share out the
    attention's heads, and which of them this one is.
    """

    experts: Combine
    dense: Combine
    heads: Slice = WHOLE


class ServedModel:
    """The model, and the caches of the sequences that it works on, by number."""

    def __init__(self, model: DeepseekV4ForCausalLM, device: torch.device) -> None:
        self._model, self._device = model, device
        self._caches: dict[int, Any] = {}
        self._dtype = model.model.embed_tokens.weight.dtype

    @torch.inference_mode()
    def forward(self, pieces: Mapping[int, Sequence[int]]) -> Tensor:
        """One step: the next tokens of each sequence, by its number. Logits f32 [sequences, V] after the last of each.

        A number that is new begins a sequence.
        """
        for number in pieces:
            if number not in self._caches:
                self._caches[number] = DynamicCache(config=self._model.config)
        caches = [self._caches[number] for number in pieces]
        seen = [int(cache.get_seq_length()) for cache in caches]
        lengths = [len(tokens) for tokens in pieces.values()]
        positions = [range(start, start + length) for start, length in zip(seen, lengths, strict=True)]
        hidden = self._model.model(
            input_ids=self._row([token for tokens in pieces.values() for token in tokens]),
            position_ids=self._row([position for part in positions for position in part]),
            attention_mask={"sliding_attention": None},  # each sequence has its own, in `Packed`
            past_key_values=Packed(lengths, caches, [self._mask(s, n) for s, n in zip(seen, lengths, strict=True)]),
        ).last_hidden_state
        last = torch.tensor(lengths, device=self._device).cumsum(0) - 1
        logits: Tensor = self._model.lm_head(hidden[0, last].float())
        return logits

    def forget(self, number: int) -> None:
        """Drop a sequence's cache, if there is one."""
        self._caches.pop(number, None)

    def _row(self, values: Sequence[int]) -> Tensor:
        return torch.tensor([values], dtype=torch.int64, device=self._device)

    def _mask(self, seen: int, new: int) -> Tensor:
        return sliding_mask(seen, new, self._model.config.sliding_window, self._dtype, self._device)


class _Told:
    """Progress over the experts, which are read together, and then the rest, a layer at a time."""

    def __init__(self, on_progress: Callable[[Progress], None], dense: int) -> None:
        self._on_progress, self._dense = on_progress, dense
        self._started = time.monotonic()
        self._done = self._experts = 0

    def of_experts(self, progress: Progress) -> None:
        self._done, self._experts = progress.done, progress.total
        self._tell()

    def of_dense(self, nbytes: int) -> None:
        self._done += nbytes
        self._tell()

    def _tell(self) -> None:
        self._on_progress(Progress(self._done, self._experts + self._dense, time.monotonic() - self._started))


def load(
    checkpoint: Checkpoint,
    backends: Mapping[int, MoEBackend],
    ranks: Ranks,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    reading: Reading = USUAL,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> ServedModel:
    """The model of a checkpoint, with this rank's experts by `backends` (one a layer of the model).

    What is not experts is computed in `dtype` (bf16, or f32 to look at the experts alone), but for what transformers
    keeps in f32 (norms, hyper-connections, sinks) and the logits.

    Raises
    ------
    CheckpointError
        As `load_layers`, and if config.json does not give the attention's sizes.
    """
    attention = checkpoint.headers.attention
    if attention is None:
        raise CheckpointError(f"{checkpoint.path}: config.json has no sizes of attention: it holds experts alone")
    config = _config(checkpoint.path)
    model = _empty(config, ranks, device)
    told = _Told(on_progress, _dense_bytes(checkpoint, attention))
    layers = load_layers(*(checkpoint, backends, ranks.experts, device), reading=reading, on_progress=told.of_experts)
    for number, layer in layers.items():
        _put_moe(model, number, layer, ranks.experts, dtype)
    _fill_dense(model, checkpoint, attention, ranks.heads, device, dtype, reading, told.of_dense)
    missing = [name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta]
    if missing:
        raise CheckpointError(f"{checkpoint.path}: nothing came for {', '.join(missing[:3])} ({len(missing)} tensors)")
    return ServedModel(model.eval(), device)


def _config(path: Path) -> DeepseekV4Config:
    config = DeepseekV4Config.from_pretrained(path)
    config.quantization_config = None  # what is loaded here is bf16, but for the experts
    config._attn_implementation = "eager"
    config._experts_implementation = plugin.NAME
    return config


def _empty(config: DeepseekV4Config, ranks: Ranks, device: torch.device) -> DeepseekV4ForCausalLM:
    """The model without memory, but for its rotary tables."""
    plugin.register()
    with torch.device("meta"):
        model = DeepseekV4ForCausalLM(config)
        own = _own_heads(config, ranks.heads)
        for number, layer in enumerate(model.model.layers):
            layer.self_attn = PackedAttention(DeepseekV4Attention(own, number), ranks.dense)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, DeepseekV4RotaryEmbedding):
                setattr(parent, name, DeepseekV4RotaryEmbedding(config, device))
    return model


def _own_heads(config: DeepseekV4Config, heads: Slice) -> DeepseekV4Config:
    """The sizes of an attention with one rank's share of the query heads and output groups.

    Raises
    ------
    ValueError
        If the groups cannot be shared out evenly.
    """
    if config.o_groups % heads.size:
        raise ValueError(f"{config.o_groups} output groups cannot be shared out over {heads.size} ranks")
    own = copy.deepcopy(config)
    own.num_attention_heads //= heads.size
    own.o_groups //= heads.size
    return own


def _put_moe(model: DeepseekV4ForCausalLM, number: int, layer: MoELayer, combine: Combine, dtype: torch.dtype) -> None:
    block = model.model.layers[number].mlp
    plugin.attach_experts(block.experts, layer.experts, combine)
    router, shared = layer.router, layer.shared_expert
    block.gate.weight = _parameter(router.gate_weight.to(dtype))
    if router.tid2eid is not None:
        block.gate.tid2eid = router.tid2eid
    else:
        block.gate.e_score_correction_bias = router.bias
    if shared is not None:
        gate, up = shared.w13.chunk(2)
        for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", shared.w2)):
            getattr(block.shared_experts, name).weight = _parameter(weight.to(dtype))


def _dense_parts(
    checkpoint: Checkpoint, attention: AttentionShape
) -> Iterator[tuple[int | None, str, dict[str, TensorSpec]]]:
    """Layer, prefix and tensors of what is not MoE; the MTP layers are not served."""
    for layer in (None, *range(checkpoint.shape.layers)):
        prefix = "" if layer is None else f"{block_prefix(checkpoint.shape, layer)}."
        yield layer, prefix, dense_specs(checkpoint.shape, attention, layer)


def _dense_bytes(checkpoint: Checkpoint, attention: AttentionShape) -> int:
    return sum(spec.nbytes for _, _, specs in _dense_parts(checkpoint, attention) for spec in specs.values())


def _fill_dense(
    model: DeepseekV4ForCausalLM,
    checkpoint: Checkpoint,
    attention: AttentionShape,
    heads: Slice,
    device: torch.device,
    dtype: torch.dtype,
    reading: Reading,
    told: Callable[[int], None],
) -> None:
    """A layer at a time, so that no more than one is held as it lies on disk; each tensor is read whole."""
    in_f32 = {*model._keep_in_fp32_modules_strict, "lm_head"}
    for layer, prefix, specs in _dense_parts(checkpoint, attention):
        read = {n: torch.empty(s.shape, dtype=DTYPES[s.dtype], device=device) for n, s in specs.items()}
        pieces = [into(checkpoint.info(f"{prefix}{name}", spec), read[name]) for name, spec in specs.items()]
        checkpoint.bytes_read += fetch(
            plan_reads(pieces),
            checkpoint.stamps,
            threads=reading.threads,
            direct=reading.direct,
            stall_s=reading.stall_s,
            allocate=allocator(device),
        )
        told(sum(spec.nbytes for spec in specs.values()))
        for name in specs:
            if name.endswith(".scale"):
                continue
            tensor = read[name]
            if tensor.dtype == torch.float8_e4m3fn:
                tensor = dequantise_blocks(tensor, read[f"{name.removesuffix('weight')}scale"])
            target = module_name(name, layer).replace("self_attn.", "self_attn.attention.")
            wide = bool(in_f32 & {*target.split(".")})
            _put(model, target, _share(name, tensor, heads).to(torch.float32 if wide else dtype))


def _share(name: str, tensor: Tensor, heads: Slice) -> Tensor:
    """A rank's part of a tensor of the attention's heads; of any other, all of it."""
    dimension = HEADS.get(name)
    if heads.size == 1 or dimension is None:
        return tensor
    return tensor.chunk(heads.size, dimension)[heads.rank].clone()  # a view would keep all of it


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    expected = getattr(module, leaf).shape
    if tensor.shape != expected:
        raise CheckpointError(f"{name}: has shape {list(tensor.shape)}, transformers expects {list(expected)}")
    setattr(module, leaf, _parameter(tensor))


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
