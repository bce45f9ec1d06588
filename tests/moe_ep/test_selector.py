"""Selection: the report that began this project, and what its answer changed."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from moe_ep import explain_selection, select_backend
from moe_ep.backends.base import Mxfp4Backend
from moe_ep.registry import Registry
from moe_ep.selector import NoBackendError, arch_family
from moe_ep.shape import ModelShape
from moe_ep.spec import BackendKey, MoELayerSpec, Mxfp4Config, SwigluArg, TopKOutputFormat

PRO = ModelShape(hidden=7168, intermediate=3072, layers=61, experts=384, top_k=6, vocab=129280)
KNOWN_LINE = "No MoE backend available for gfx94/mxfp4. Tried: gluon_kernel:unsupported, triton_kernel:unsupported"


class OldGate(Mxfp4Backend):
    """A backend with the gate that tokenspeed's AMD mxfp4 backends had."""

    impl = "reference"

    @classmethod
    def refusal(cls, spec: MoELayerSpec, quant_config: object, arch: str) -> str | None:
        return None if cls.supports(spec, quant_config) else "ep_size > 1"

    @classmethod
    def supports(cls, spec: MoELayerSpec, quant_config: object) -> bool:
        return spec.ep_size <= 1 and spec.activation in {"silu", "swiglu"}


@pytest.fixture
def old_registry() -> Registry:
    registry = Registry()
    for impl in ("gluon_kernel", "triton_kernel"):
        registry.register(BackendKey("gfx94", "mxfp4", impl), OldGate)
    return registry


def test_with_the_old_gate_expert_parallelism_fails_with_the_reported_message(old_registry: Registry) -> None:
    spec = MoELayerSpec.of_rank(PRO, 3, ep_rank=0, ep_size=4)
    with pytest.raises(RuntimeError) as failure:
        select_backend(spec, Mxfp4Config(), arch="gfx942", registry=old_registry)
    assert str(failure.value).splitlines()[0] == KNOWN_LINE


def test_with_the_old_gate_one_rank_selects_and_the_memory_is_what_fails(old_registry: Registry) -> None:
    spec = MoELayerSpec.of_rank(PRO, 3, ep_rank=0, ep_size=1)
    assert isinstance(select_backend(spec, Mxfp4Config(), arch="gfx942", registry=old_registry), OldGate)
    assert PRO.held_bytes(range(61), 384)["routed experts"] > 800e9


@pytest.mark.parametrize("ep_size", [2, 4, 8, 16])
def test_ours_selects_at_every_ep_size(ep_size: int) -> None:
    for ep_rank in range(ep_size):
        spec = MoELayerSpec.of_rank(PRO, 3, ep_rank, ep_size)
        backend = select_backend(spec, Mxfp4Config(), arch="gfx942")
        assert backend.key == BackendKey("gfx94", "mxfp4", "gluon_kernel")
        assert backend.topk_output_format is TopKOutputFormat.STANDARD
        assert not backend.apply_routed_scaling_factor_on_output


SPEC = MoELayerSpec.of_rank(PRO, 3, ep_rank=1, ep_size=4)


@pytest.mark.parametrize(
    ("spec", "quant", "reason"),
    [
        (replace(SPEC, activation="gelu"), Mxfp4Config(), "activation 'gelu' is not silu or swiglu"),
        (replace(SPEC, tp_size=2), Mxfp4Config(), "tp_size=2 and ep_size=4 cannot be both > 1"),
        (replace(SPEC, a2a_backend="deepep"), Mxfp4Config(), "a2a_backend 'deepep'"),
        (replace(SPEC, hidden_size=7160), Mxfp4Config(), "hidden_size=7160 is not a multiple of 32"),
        (replace(SPEC, intermediate_size=48), Mxfp4Config(), "intermediate_size=48 over tp_size=1"),
        (replace(SPEC, num_local_experts=95), Mxfp4Config(), "num_local_experts=95, but rank 1 of 4 holds 96"),
        (replace(SPEC, ep_rank=4), Mxfp4Config(), r"ep_rank = 4 must lie in 0\.\.3"),
        (
            replace(SPEC, ep_rank=0, ep_size=1, num_local_experts=384, tp_size=16),
            Mxfp4Config(is_w4a8_fp8=True),
            "fp8 activations: intermediate_size=3072 over tp_size=16 gives 192, not a multiple of 128",
        ),
    ],
    ids=lambda value: "" if not isinstance(value, str) else value[:20],
)
def test_every_refusal_has_a_reason_behind_the_known_line(spec: MoELayerSpec, quant: Mxfp4Config, reason: str) -> None:
    with pytest.raises(NoBackendError, match=reason) as failure:
        select_backend(spec, quant, arch="gfx942")
    assert str(failure.value).startswith(KNOWN_LINE)
    assert failure.value.record == explain_selection(spec, quant, arch="gfx942")
    assert all(c.reason for c in failure.value.record.candidates)


def test_the_record_lists_candidates_in_order_with_verdicts() -> None:
    record = explain_selection(SPEC, Mxfp4Config(), arch="gfx942")
    assert [(c.impl, c.verdict) for c in record.candidates] == [
        ("gluon_kernel", "selected"),
        ("triton_kernel", "not tried"),
    ]
    assert record.selected == record.as_dict()["selected"] == "gluon_kernel"
    assert record.launch is not None
    assert "gfx942-gluon.yaml" in record.launch["table"]
    assert record.launch["tokens"]["1"].startswith("route, 16 routes")
    assert record.launch["tokens"]["64"].startswith("cdna3, 16 routes")
    for impl, one in (("gluon_kernel", "route"), ("triton_kernel", "stream")):
        launch = explain_selection(SPEC, Mxfp4Config(is_w4a8_fp8=True), arch="gfx942", impl=impl).as_dict()["launch"]
        assert [launch["tokens"][n].split(",")[0] for n in ("1", "64")] == [one, "stream"]


def test_gluon_leaves_sizes_that_its_lanes_do_not_divide_to_triton() -> None:
    for spec, size in (
        (replace(SPEC, hidden_size=7200), "hidden_size is 7200"),
        (replace(SPEC, intermediate_size=3040), "intermediate_size over tp_size is 3040"),
    ):
        record = explain_selection(spec, Mxfp4Config(), arch="gfx942")
        assert record.selected == "triton_kernel"
        assert record.candidates[0].reason == f"{size}, not a multiple of 128, the group in which lanes hold weights"


@pytest.mark.parametrize("arch", ["sm90", "gfx950", "gfx1250", "cpu"])
def test_gluon_is_refused_with_a_reason_on_any_other_arch(arch: str) -> None:
    with pytest.raises(NoBackendError, match=rf"gluon_kernel: its kernels are CDNA3's.*this is {arch[:5]}"):
        select_backend(SPEC, Mxfp4Config(), arch=arch, impl="gluon_kernel")


def test_a_named_implementation_is_the_only_candidate() -> None:
    record = explain_selection(SPEC, Mxfp4Config(), arch="gfx942", impl="reference")
    assert [(c.impl, c.verdict) for c in record.candidates] == [("reference", "selected")]
    with pytest.raises(NoBackendError, match="nonesuch: not registered for gfx94/mxfp4; there are: gluon_kernel, ref"):
        select_backend(SPEC, Mxfp4Config(), arch="gfx942", impl="nonesuch")


def test_a_gpu_never_falls_back_to_the_reference_on_its_own() -> None:
    for arch in ("gfx942", "sm90"):
        assert "reference" not in [c.impl for c in explain_selection(SPEC, Mxfp4Config(), arch=arch).candidates]


def test_a_cpu_without_the_interpreter_takes_the_reference_and_says_why() -> None:
    code = (
        "from tests.moe_ep.test_selector import *\n"
        "for c in explain_selection(SPEC, Mxfp4Config(), arch='cpu').candidates: print(c.impl, c.verdict, c.reason)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # conftest is not imported here, so nothing turns the interpreter on.
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    triton, reference = done.stdout.splitlines()
    assert triton.startswith("triton_kernel unsupported no GPU")
    assert "TRITON_INTERPRET=1" in triton
    assert reference.startswith("reference selected")


def test_arch_names_lose_their_stepping_as_in_tokenspeed() -> None:
    assert [arch_family(a) for a in ("gfx942:sramecc+:xnack-", "gfx90a", "gfx94", "gfx1250", "sm90", "cpu")] == [
        "gfx94",
        "gfx90",
        "gfx94",
        "gfx125",
        "sm90",
        "cpu",
    ]


def test_another_quantisation_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(TypeError, match="expected an Mxfp4Config"):
        select_backend(SPEC, None, arch="gfx942")
    ignored = Mxfp4Config(ignored_layers=("model.layers.3.mlp",))
    with pytest.raises(RuntimeError, match=r"model\.layers\.3\.mlp\.experts is among ignored_layers"):
        select_backend(SPEC, ignored, arch="gfx942")


TINY = ModelShape(hidden=64, intermediate=32, layers=1, experts=10, top_k=3, vocab=8)


@pytest.mark.parametrize("ep_rank", [0, 3])
def test_the_weights_have_the_engines_layout(ep_rank: int) -> None:
    backend = select_backend(MoELayerSpec.of_rank(TINY, 0, ep_rank, 4), Mxfp4Config(), arch="sm90")
    layer = nn.Module()
    backend.create_layer_weights(layer, with_bias=True)
    local = 3 if ep_rank == 0 else 2  # 10 experts over 4 ranks
    shapes = {name: (p.dtype, tuple(p.shape)) for name, p in layer.named_parameters()}
    assert shapes == {
        "w13_weight": (torch.uint8, (local, 64, 32)),
        "w13_weight_scale": (torch.uint8, (local, 64, 2)),
        "w2_weight": (torch.uint8, (local, 64, 16)),
        "w2_weight_scale": (torch.uint8, (local, 64, 1)),
        "w13_weight_bias": (torch.float32, (local, 64)),
        "w2_weight_bias": (torch.float32, (local, 64)),
    }
    assert layer.get_buffer("expert_map").shape == (10,)


def gpt_oss_activation(layer: Any) -> None:
    layer.swiglu_arg = SwigluArg(alpha=1.702, limit=7.0)


def gpt_oss_offset(layer: Any) -> None:
    layer.swiglu_beta = 1.0


def gpt_oss_rows(layer: Any) -> None:
    layer.w13_input_layout = "interleaved"


@pytest.mark.parametrize("ask", [gpt_oss_activation, gpt_oss_offset, gpt_oss_rows])
def test_gpt_oss_conventions_are_refused_not_computed_wrongly(ask: Callable[[Any], None]) -> None:
    backend = select_backend(MoELayerSpec.of_rank(TINY, 0, 0, 1), Mxfp4Config(), arch="sm90")
    layer = nn.Module()
    ask(layer)
    with pytest.raises(ValueError, match=r"gpt-oss|concatenated"):
        backend.create_layer_weights(layer)
