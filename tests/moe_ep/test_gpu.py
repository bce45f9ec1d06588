"""What only a GPU shows."""

import pytest
import torch

from tests.moe_ep.experts import Tokens, by_formula, make_experts, make_tokens, partial, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_the_kernels_can_be_captured_and_replayed_on_other_tokens(device: torch.device) -> None:
    experts = make_experts(10, 256, 128, device)
    expert_map = torch.tensor([0, 1, 2, 3] + [-1] * 6, dtype=torch.int32, device=device)
    first, second = (make_tokens(33, 256, 10, 6, device, seed) for seed in range(2))
    held = experts.rows(range(4))
    fixed = Tokens(*(t.clone() for t in vars(first).values()))
    partial(held, fixed, "cuda", expert_map=expert_map)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = partial(held, fixed, "cuda", expert_map=expert_map)
    for batch in (first, second):
        for name, tensor in vars(batch).items():
            getattr(fixed, name).copy_(tensor)
        graph.replay()
        assert relative_error(out, by_formula(experts, batch, only=range(4))) < 4e-3


@pytest.mark.parametrize("tokens", [1, 64, 700])
def test_v4_sized_experts_agree_with_the_reference(tokens: int, device: torch.device) -> None:
    experts = make_experts(6, 4096, 2048, device, bias=True)
    batch = make_tokens(tokens, 4096, 8, 6, device)
    expert_map = torch.tensor([0, 1, 2, 3, 4, 5, -1, -1], dtype=torch.int32, device=device)
    got = partial(experts, batch, "cuda", expert_map=expert_map)
    assert relative_error(got, partial(experts, batch, "reference", expert_map=expert_map)) < 4e-3
