"""tokenspeed with these experts: in its own code where it is installed, and in a stand-in for its interface."""

import logging
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_ep import selector
from moe_ep.plugins import tokenspeed as plugin
from moe_ep.plugins.versions import PluginError, installed
from moe_ep.spec import SwigluArg
from tests.checkout import ROOT, importable
from tests.engines.on_cpu import STANDINS, claim_platform, forgotten, installed_at
from tests.moe_ep.experts import Experts, Tokens, by_formula, make_experts, make_tokens, relative_error
from tests.moe_ep.ways import Way, running
from tests.waiting import PATIENCE_S

EXPERTS, HIDDEN, INNER, TOP_K = 6, 128, 128, 3
TOLERANCE = 8e-3
CPU = torch.device("cpu")
ADAPTERS = tuple(f"moe_ep.plugins.tokenspeed_{name}" for name in ("backends", "kernel", "engine"))
MOE = "tokenspeed.runtime.layers.moe"


@pytest.fixture
def experts() -> Experts:
    return make_experts(EXPERTS, HIDDEN, INNER, CPU)


@pytest.fixture
def tokens() -> Tokens:
    return make_tokens(5, HIDDEN, EXPERTS, TOP_K, CPU)


def is_seed() -> bool:
    root = installed_at("tokenspeed")
    return root is not None and (root / "runtime/layers/moe/backends").is_dir()


def is_today() -> bool:
    return installed("tokenspeed-kernel") == "0.1.4"


@pytest.fixture(params=["stand-in", "installed"])
def seed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """tokenspeed of June 2026 can be imported, and nothing was selected yet."""
    if request.param == "installed" and not is_seed():
        pytest.skip("tokenspeed of June 2026 (commit 4df7c879) is not installed")
    if request.param == "stand-in":
        with standin("seed", monkeypatch):
            yield
        return
    claim_platform(9, 4)
    with forgotten(*ADAPTERS):
        import_module("tokenspeed_kernel")
        with running("gfx942"):  # tokenspeed asks Triton for a device when it is imported
            backends = import_module(f"{MOE}.backends")
            import_module(f"{MOE}.layer")
        monkeypatch.setattr(backends, "_BACKEND_SPECS", dict(backends._BACKEND_SPECS))
        monkeypatch.setattr(backends, "_REGISTERED", set())
        monkeypatch.setattr(import_module(f"{MOE}.core.registry"), "_REGISTRY", {})
        yield


@pytest.fixture(params=["stand-in", "installed"])
def today(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """tokenspeed_kernel 0.1.4 can be imported."""
    if request.param == "installed" and not is_today():
        pytest.skip("tokenspeed-kernel 0.1.4 is not installed")
    if request.param == "stand-in":
        with standin("today", monkeypatch):
            yield
        return
    claim_platform(9, 5)
    yield


@contextmanager
def standin(which: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in of that time can be imported, and nothing that is installed."""
    if is_seed() or is_today():
        pytest.skip("the installed package is tested instead: both cannot be imported in one process")
    with forgotten("tokenspeed", *ADAPTERS):
        monkeypatch.syspath_prepend(STANDINS / which)
        yield


def layer_of(**more: Any) -> Any:
    """What tokenspeed's MoELayer is to a backend."""
    layer: Any = nn.Module()
    layer.activation, layer.swiglu_arg, layer.swiglu_beta = "swiglu", SwigluArg(None, 10.0), None
    layer.w13_input_layout = "concatenated"
    for name, value in more.items():
        setattr(layer, name, value)
    return layer


def rank_spec(ep_rank: int, ep_size: int, tp_rank: int = 0, tp_size: int = 1, **changes: Any) -> Any:
    spec = import_module(f"{MOE}.core.types").MoELayerSpec
    local = EXPERTS // ep_size
    values = dict(zip(("tp_rank", "tp_size", "ep_rank", "ep_size"), (tp_rank, tp_size, ep_rank, ep_size), strict=True))
    return spec(
        **{"top_k": TOP_K, "num_experts": EXPERTS, "num_local_experts": local, "hidden_size": HIDDEN}
        | {"intermediate_size": INNER, "activation": "swiglu", "prefix": "model.layers.3.ffn"}
        | values
        | changes
    )


def quantisation(**changes: Any) -> Any:
    return import_module("tokenspeed.runtime.layers.quantization").Mxfp4Config(
        is_checkpoint_mxfp4_serialized=True, **changes
    )


def select(spec: Any, **changes: Any) -> Any:
    return import_module(f"{MOE}.core.selector").select_backend(spec, quantisation(**changes))


def load(layer: Any, experts: Experts, first: int, count: int) -> None:
    """As tokenspeed's checkpoint reader does: expert by expert, w1 and w3 apart, scales as e8m0."""
    for row in range(count):
        for shard, name, half in (("w1", "w13", 0), ("w3", "w13", 1), ("w2", "w2", None)):
            for suffix, dtype in (("weight", torch.uint8), ("weight_scale", torch.float8_e8m0fnu)):
                tensor: Tensor = getattr(experts, name if suffix == "weight" else f"{name}_scale")[first + row]
                part = tensor if half is None else tensor.chunk(2)[half]
                param = layer.get_parameter(f"{name}_{suffix}")
                param.weight_loader(param, part.clone().view(dtype), shard_id=shard, local_expert_id=row)


def partial_of(backend: Any, experts: Experts, tokens: Tokens, first: int) -> Tensor:
    layer = layer_of()
    backend.create_layer_weights(layer, with_bias=True)
    load(layer, experts, first, backend.spec.num_local_experts)
    backend.process_weights_after_loading(layer)
    topk = import_module(f"{MOE}.topk").StandardTopKOutput(tokens.weights, tokens.ids, torch.empty(0))
    with torch.inference_mode():
        out: Tensor = backend.forward(layer, tokens.x, topk, len(tokens.x), len(tokens.x))
    return out


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize(("way", "ep_size", "tp_size"), [("gfx942", 2, 1), ("reference", 3, 1), ("reference", 1, 2)])
def test_the_ranks_partials_add_up(
    way: Way, ep_size: int, tp_size: int, experts: Experts, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "gfx942":
        monkeypatch.setattr(selector, "detect_arch", lambda: "gfx94")
        assert plugin.register() == "backends"
    else:
        plugin.register_backends("test", dict.fromkeys(plugin.IMPLS, "reference"))
    total = torch.zeros(tokens.x.shape)
    for rank in range(ep_size * tp_size):
        backend = select(rank_spec(rank // tp_size, ep_size, rank % tp_size, tp_size))
        assert backend.topk_output_format.name == "STANDARD"
        with running(way):
            total += partial_of(backend, experts, tokens, rank // tp_size * (EXPERTS // ep_size)).float()
    assert relative_error(total, by_formula(experts, tokens)) < TOLERANCE


@pytest.mark.usefixtures("seed")
def test_what_is_refused_keeps_tokenspeeds_message_and_logs_the_reason(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selector, "detect_arch", lambda: "gfx94")
    plugin.register()
    with caplog.at_level(logging.WARNING, "moe_ep"), pytest.raises(RuntimeError) as refused:
        select(rank_spec(0, 2, activation="gelu"))
    said = "No MoE backend available for gfx94/mxfp4. Tried: gluon_kernel:unsupported, triton_kernel:unsupported"
    assert str(refused.value) == said
    assert "triton_kernel: activation 'gelu' is not silu or swiglu" in caplog.text


@pytest.mark.usefixtures("seed")
def test_experts_that_tokenspeed_would_drop_are_refused_on_every_rank(caplog: pytest.LogCaptureFixture) -> None:
    plugin.register_backends("test", dict.fromkeys(plugin.IMPLS, "reference"))
    for rank in range(4):
        with caplog.at_level(logging.WARNING, "moe_ep"), pytest.raises(RuntimeError, match="Tried: gluon_kernel:unsup"):
            select(rank_spec(rank, 4))
    assert "tokenspeed drops 2 of 6 experts at ep_size=4; use a divisor" in caplog.text


@pytest.mark.usefixtures("seed")
def test_gpt_oss_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.register_backends("test", dict.fromkeys(plugin.IMPLS, "reference"))
    with pytest.raises(ValueError, match="w13_input_layout is 'interleaved'"):
        select(rank_spec(0, 2)).create_layer_weights(layer_of(w13_input_layout="interleaved"))


def test_a_backend_that_was_selected_already_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with standin("seed", monkeypatch):
        select(rank_spec(0, 1))
        with pytest.raises(PluginError, match=r"gluon_kernel was selected before moe_ep was registered"):
            plugin.register()


@pytest.mark.skipif(is_seed() or is_today(), reason="the stand-in's place is taken by the installed package")
def test_the_schedulers_that_an_engine_spawns_have_registered() -> None:
    command = [sys.executable, "-m", "moe_ep.plugins.tokenspeed_engine", "--port", "1"]
    env = os.environ | importable(STANDINS / "seed")
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout.split() == ["moe_ep.plugins.tokenspeed_backends", "--port", "1"], done.stderr


def plan_traits(**changes: Any) -> dict[str, Any]:
    """What `moe_plan` asks for a DeepSeek-V4 layer."""
    return {
        "weight_dtype": "mxfp4",
        "activation": "swiglu",
        "swiglu_form": "standard",
        "activation_clamped": True,
        "routing_mode": "precomputed_topk",
        "a2a_backend": "none",
        "supports_ep": True,
        "supports_all_to_all_ep": False,
        "ep_size": 2,
        "ispp": INNER,
        "hidden": HIDDEN,
        "internal_activation_dtype": "input",
        "combine_order": "rank",
        "persistent_workspace": False,
    } | changes


def selected(traits: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> str:
    signatures = import_module("tokenspeed_kernel.signature")
    (signature,) = signatures.format_signatures("x", "dense", {dtype})
    name: str = (
        import_module("tokenspeed_kernel.selection").select_kernel("moe", "apply", signature, traits=traits).name
    )
    return name


@pytest.mark.usefixtures("today")
def test_todays_selection_takes_our_kernel_for_v4_with_ep() -> None:
    assert plugin.register() == "kernel"
    assert selected(plan_traits()) == "moe_ep_mxfp4_precomputed_moe_apply"


@pytest.mark.usefixtures("today")
@pytest.mark.parametrize(
    "other",
    [
        {"activation": "situ"},
        {"swiglu_form": "generalized"},
        {"weight_dtype": "nvfp4"},
        {"internal_activation_dtype": "mxfp4"},
        {"combine_order": "slot"},
        {"supports_all_to_all_ep": True},
        {"hidden": 100},
    ],
)
def test_todays_selection_does_not_take_it_for_what_it_does_not_compute(other: dict[str, Any]) -> None:
    plugin.register()
    try:
        name = selected(plan_traits(**other))
    except RuntimeError:
        return  # nobody has such a kernel
    assert not name.startswith("moe_ep")


@pytest.mark.usefixtures("today")
def test_todays_kernel_gives_the_ranks_partial(experts: Experts, tokens: Tokens) -> None:
    plugin.register()
    registry = import_module("tokenspeed_kernel.registry").KernelRegistry.get()
    spec = registry.get_by_name("moe_ep_mxfp4_precomputed_moe_apply")
    apply = registry.get_impl(spec.name)
    total = torch.zeros(tokens.x.shape)
    with running("gfx942"), torch.inference_mode():
        for rank in range(2):
            held = experts.rows(range(rank * 3, rank * 3 + 3))
            layer = layer_of(num_experts=EXPERTS, num_local_experts=3, ep_rank=rank, ep_size=2, tp_rank=0)
            for name in ("w13", "w2"):
                for suffix, tensor in (("", getattr(held, name)), ("_scale", getattr(held, f"{name}_scale"))):
                    layer.register_parameter(
                        f"{name}_weight{suffix}", nn.Parameter(tensor.clone(), requires_grad=False)
                    )
            spec.weight_preprocessor(plan={}, w=layer)
            total += apply(
                plan={},
                x=tokens.x,
                w=layer,
                router_logits=None,
                topk_weights=tokens.weights,
                topk_ids=tokens.ids,
                num_tokens_global=5,
                max_num_tokens_per_gpu=5,
                do_finalize=True,
                enable_pdl=False,
            ).float()
    assert relative_error(total, by_formula(experts, tokens)) < TOLERANCE


@pytest.mark.skipif(not is_today(), reason="tokenspeed-kernel 0.1.4 is not installed")
def test_todays_plan_and_apply_use_it(experts: Experts, tokens: Tokens) -> None:
    claim_platform(9, 5)
    moe = import_module("tokenspeed_kernel.ops.moe")
    plugin.register()
    plan = moe.moe_plan(
        "mxfp4",
        activation="swiglu",
        routing_mode="precomputed_topk",
        a2a_backend="none",
        ep_size=2,
        ispp=INNER,
        hidden=HIDDEN,
        swiglu_form="standard",
        activation_clamped=True,
        expert_id_repeats=False,
        fast_math=False,
        combine_order="rank",
    )
    assert plan["apply_kernel_name"] == "moe_ep_mxfp4_precomputed_moe_apply"
    assert not plan["support_routing"]
    layer = layer_of(num_experts=EXPERTS, num_local_experts=3, ep_rank=1, ep_size=2, tp_rank=0)
    held = experts.rows(range(3, 6))
    for name in ("w13", "w2"):
        for suffix, tensor in (("", getattr(held, name)), ("_scale", getattr(held, f"{name}_scale"))):
            layer.register_parameter(f"{name}_weight{suffix}", nn.Parameter(tensor.clone(), requires_grad=False))
    moe.moe_process_weights(plan, layer)
    got = moe.moe_apply(plan, tokens.x, layer, None, topk_weights=tokens.weights, topk_ids=tokens.ids)
    assert relative_error(got, by_formula(experts, tokens, only=range(3, 6))) < TOLERANCE


def test_the_entry_point_is_declared_and_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    value = declared["tokenspeed_kernel.plugins"]["moe_ep"]
    point = metadata.EntryPoint("moe_ep", value, "tokenspeed_kernel.plugins")
    monkeypatch.setattr(metadata, "entry_points", lambda **only: [point])
    with standin("today", monkeypatch):
        assert import_module("tokenspeed_kernel.plugins").discover_plugins() == ["moe_ep"]
        assert selected(plan_traits()).startswith("moe_ep")


def test_neither_interface_is_an_error_that_says_what_was_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plugin, "_exists", lambda module: False)
    with pytest.raises(PluginError, match=r"no tokenspeed\.runtime\.layers\.moe\.backends .*knows no other interface"):
        plugin.register()


def test_a_registry_of_another_shape_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with forgotten(*ADAPTERS):
        monkeypatch.setattr(plugin, "_exists", lambda module: module.startswith("tokenspeed_kernel"))
        monkeypatch.setitem(sys.modules, "tokenspeed_kernel", SimpleNamespace(__path__=[]))
        monkeypatch.setitem(sys.modules, "tokenspeed_kernel.registry", SimpleNamespace(register_kernel=None))
        with pytest.raises(PluginError, match=r"tokenspeed_kernel\.registry has no Priority"):
            plugin.register()
