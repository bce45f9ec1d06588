"""transformers with these experts: the model, the router and the caller are transformers' own."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from moe_ep.layer import RoutedExperts
from moe_ep.mxfp4 import dequantise
from moe_ep.plugins import versions
from moe_ep.plugins.versions import PluginError
from moe_ep.selector import select_backend
from moe_ep.spec import MoELayerSpec, Mxfp4Config
from tests.moe_ep.experts import Experts, Tokens, by_formula, make_experts, make_tokens, relative_error
from tests.moe_ep.ways import Way, running

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: transformers)")

from moe_ep.plugins import transformers as plugin  # noqa: E402 - after the skip

EXPERTS, HIDDEN, INNER, TOP_K = 8, 64, 32, 2
TOLERANCE = 8e-3


def tiny_config(**changes: Any) -> Any:
    """A DeepSeek-V4 of two layers: one with hash routing, one with top-k."""
    values: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 32,
        "q_lora_rank": 32,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "mlp_layer_types": ["hash_moe", "moe"],
        "partial_rotary_factor": 0.5,
        "o_groups": 2,
        "o_lora_rank": 16,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 2,
        "sliding_window": 16,
        "max_position_embeddings": 128,
    }
    return transformers.DeepseekV4Config(**(values | changes))


def tiny_model(implementation: str, experts: Experts) -> Any:
    """The tiny model, its dense experts the values of the packed ones; equal weights at every call.

    In f32, so that no route flips over a rounding of the rest to bf16.
    """
    torch.manual_seed(0)
    config = tiny_config(experts_implementation=implementation)
    model = transformers.DeepseekV4ForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].mlp.gate.tid2eid.copy_(torch.rand(96, EXPERTS).argsort(-1)[:, :TOP_K])
        for layer in model.model.layers:
            layer.mlp.experts.gate_up_proj.copy_(dequantise(experts.w13, experts.w13_scale))
            layer.mlp.experts.down_proj.copy_(dequantise(experts.w2, experts.w2_scale))
    return model


@pytest.fixture(scope="module")
def experts() -> Experts:
    return make_experts(EXPERTS, HIDDEN, INNER, torch.device("cpu"))


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    assert plugin.register() == "moe_ep"


def fp8_experts(experts: Experts) -> Any:
    """transformers' module for packed experts, made as its quantiser makes it, with these experts' bytes in it."""
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
    from transformers.utils.quantization_config import FineGrainedFP8Config

    config = tiny_config(
        n_routed_experts=len(experts.w13),
        hidden_size=experts.w2.shape[1],
        moe_intermediate_size=experts.w13.shape[1] // 2,
        experts_implementation="moe_ep",
    )
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts

    holder: Any = nn.Module()
    holder.config, holder.mlp = config, nn.Module()
    with torch.device("meta"):
        holder.mlp.experts = DeepseekV4Experts(config)
    replace_with_fp8_linear(holder, quantization_config=FineGrainedFP8Config(scale_fmt="ue8m0", expert_dtype="fp4"))
    module: Any = holder.mlp.experts
    weights = (experts.w13, experts.w13_scale, experts.w2, experts.w2_scale)
    for name, weight in zip(plugin._PACKED, weights, strict=True):
        empty = module.get_parameter(name)
        assert empty.shape == weight.shape
        setattr(module, name, nn.Parameter(weight.clone().view(empty.dtype), requires_grad=False))
    return holder


@torch.inference_mode()
def test_a_model_answers_as_with_its_own_experts(experts: Experts) -> None:
    prompt = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    eager, ours = tiny_model("eager", experts), tiny_model("moe_ep", experts)
    assert plugin.pack_experts(ours) == 2
    expected, got = eager(prompt).logits, ours(prompt).logits
    assert relative_error(got, expected) < TOLERANCE
    assert not torch.equal(got, eager(prompt.flip(0)).logits)


@pytest.mark.parametrize("way", ["reference", "gfx942"])
def test_packed_experts_are_computed_as_they_are(way: Way) -> None:
    experts = make_experts(4, 128, 128, torch.device("cpu"))
    tokens = make_tokens(5, 128, 4, 3, torch.device("cpu"))
    module = fp8_experts(experts).mlp.experts
    with running(way), torch.inference_mode():
        for _ in range(2):  # the second call finds the weights in kernel order
            got = module(tokens.x, tokens.ids.long(), tokens.weights)
            assert got.dtype == torch.bfloat16
            assert relative_error(got, by_formula(experts, tokens)) < TOLERANCE
    assert (module.gate_up_proj is None) == (way == "gfx942")


def test_weights_in_kernel_order_are_not_taken_for_others() -> None:
    experts, tokens = make_experts(4, 128, 128, torch.device("cpu")), make_tokens(2, 128, 4, 2, torch.device("cpu"))
    holder = fp8_experts(experts)
    with running("gfx942"), torch.inference_mode():
        holder.mlp.experts(tokens.x, tokens.ids.long(), tokens.weights)
        holder.config._experts_implementation = "eager"
        with pytest.raises(TypeError):
            holder.mlp.experts(tokens.x, tokens.ids.long(), tokens.weights)
    with pytest.raises(PluginError, match=r"mlp\.experts: its weights are in the order that the kernels read"):
        holder.state_dict()


@torch.inference_mode()
def test_routes_to_experts_of_other_ranks_are_skipped(experts: Experts) -> None:
    tokens = make_tokens(6, HIDDEN, EXPERTS, TOP_K, torch.device("cpu"))
    held = range(EXPERTS // 2)
    module = fp8_experts(experts.rows(held)).mlp.experts
    elsewhere = tokens.ids >= len(held)
    sentinel = torch.where(elsewhere, len(held), tokens.ids).long()  # transformers' id of "not on this rank"
    got = module(tokens.x, sentinel, tokens.weights)
    assert relative_error(got, by_formula(experts, tokens, only=held)) < TOLERANCE


def _expert_parallel(rank: int, world: int, store: str, experts: Experts, tokens: Tokens, expected: Tensor) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    plugin.register()
    mesh, errors = init_device_mesh("cpu", (world,)), {}
    for implementation in ("moe_ep", "auto", "all_to_all"):
        holder = fp8_experts(experts)
        plan = dict.fromkeys((f"mlp.experts.{name}" for name in plugin._PACKED), "grouped_gemm")
        apply_expert_parallelism(holder, mesh, mesh, plan | {"mlp.experts": "ep_dispatch_experts"}, implementation)
        assert holder.mlp.experts.num_experts == EXPERTS // world
        with torch.inference_mode():
            got = holder.mlp.experts(tokens.x, tokens.ids.long(), tokens.weights)
        errors[implementation] = relative_error(got, expected)
    if not max(errors.values()) < TOLERANCE:
        raise AssertionError(f"rank {rank}: relative errors {errors}")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # on a busy machine gloo's threads for the mesh may outlive it, and abort the interpreter's end


@pytest.mark.skipif(not plugin.has_ep_implementations(), reason="this transformers has no EP implementations to choose")
def test_transformers_own_expert_parallelism_takes_them(experts: Experts, tmp_path: Path) -> None:
    tokens = make_tokens(5, HIDDEN, EXPERTS, TOP_K, torch.device("cpu"))
    spawn(_expert_parallel, (2, str(tmp_path / "store"), experts, tokens, by_formula(experts, tokens)), nprocs=2)


def test_attached_experts_are_computed_with_global_ids_and_combined(experts: Experts) -> None:
    tokens = make_tokens(6, HIDDEN, EXPERTS, TOP_K, torch.device("cpu"))
    spec = MoELayerSpec(TOP_K, EXPERTS, EXPERTS // 2, HIDDEN, INNER, "swiglu", 0, 1, 1, 2)
    routed = RoutedExperts(select_backend(spec, Mxfp4Config(), arch="cpu", impl="reference"), 10.0)
    held = range(EXPERTS // 2, EXPERTS)
    for name in ("w13", "w2"):
        routed.get_parameter(f"{name}_weight").copy_(getattr(experts.rows(held), name))
        routed.get_parameter(f"{name}_weight_scale").copy_(getattr(experts.rows(held), f"{name}_scale"))
    module = fp8_experts(experts).mlp.experts
    plugin.attach_experts(module, routed, combine=lambda partial: partial * 2)
    with torch.inference_mode():
        got = module(tokens.x, tokens.ids.long(), tokens.weights)
    assert relative_error(got, 2 * by_formula(experts, tokens, only=held)) < TOLERANCE
    assert module.gate_up_proj is None


def test_a_rank_packs_its_share(experts: Experts) -> None:
    model = tiny_model("moe_ep", experts)
    plugin.pack_experts(model, ep_rank=1, ep_size=3)
    (_, first), (_, second) = plugin.experts_modules(model)
    for module in (first, second):
        held: Any = module.moe_ep_experts
        assert torch.equal(held.w13_weight, experts.w13[3:6])  # 8 experts over 3 ranks: 3, 3, 2
        assert torch.equal(held.w2_weight_scale, experts.w2_scale[3:6])


def test_dense_experts_are_refused_with_the_way_out(experts: Experts) -> None:
    model = tiny_model("moe_ep", experts)
    with torch.inference_mode(), pytest.raises(PluginError, match=r"no packed experts.*pack_experts\(model\)"):
        model(torch.tensor([[1, 2, 3]]))


def test_values_that_mxfp4_does_not_hold_are_rounded_only_when_asked(experts: Experts) -> None:
    model = tiny_model("moe_ep", experts)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[5, 0, 0] += 1e-3
    with pytest.raises(PluginError, match=r"layers\.1\.mlp\.experts: expert 5 has values that mxfp4 does not"):
        plugin.pack_experts(model)
    assert plugin.pack_experts(model, rounding=True) == 1  # the first layer was packed already


def test_other_activations_and_training_are_refused(experts: Experts) -> None:
    tokens = make_tokens(2, HIDDEN, EXPERTS, TOP_K, torch.device("cpu"))
    module = fp8_experts(experts).mlp.experts
    with pytest.raises(PluginError, match=r"no gradients.*torch\.inference_mode"):
        module(tokens.x.requires_grad_(), tokens.ids.long(), tokens.weights)
    module.swiglu_alpha = 1.702
    with torch.inference_mode(), pytest.raises(PluginError, match="swiglu_alpha; these experts compute silu"):
        module(tokens.x, tokens.ids.long(), tokens.weights)


def test_experts_that_would_not_be_called_are_not_attached(experts: Experts) -> None:
    model = tiny_model("eager", experts)
    with pytest.raises(PluginError, match="experts_implementation='eager', which would not see attached experts"):
        plugin.pack_experts(model)


@pytest.mark.parametrize(
    ("version", "says"),
    [
        (None, "transformers is not installed; this plug-in needs transformers >=5.8,<6"),
        ("5.7.0", "transformers 5.7.0 is installed; this plug-in needs transformers >=5.8,<6"),
        ("6.0.0.dev0", "transformers 6.0.0.dev0 is installed; this plug-in needs transformers >=5.8,<6"),
    ],
)
def test_versions_that_do_not_match_are_refused(
    version: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "installed", lambda package: version)
    with pytest.raises(PluginError) as refused:
        plugin.register()
    assert str(refused.value) == says


def test_a_plug_in_point_that_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.integrations.moe as moe

    monkeypatch.delattr(moe, "ALL_EXPERTS_FUNCTIONS")
    with pytest.raises(PluginError, match=r"transformers \S+: transformers.integrations.moe has no ALL_EXPERTS_FUNC"):
        plugin.register()
