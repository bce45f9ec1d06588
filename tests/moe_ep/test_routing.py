"""V4's router, against its formula in plain Python."""

import math

import pytest
import torch

from moe_ep.routing import route

GATE = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.5, 0.5]])


def scores(x: list[float]) -> list[float]:
    logits = [sum(w * v for w, v in zip(row, x, strict=True)) for row in GATE.tolist()]
    return [math.sqrt(math.log1p(math.exp(logit))) for logit in logits]


def test_weights_are_normalised_scores_times_the_factor_once() -> None:
    x = [2.0, -1.0]
    topk = route(torch.tensor([x]), GATE, 2, 2.5)
    s = scores(x)
    assert topk.topk_ids.tolist() == [[0, 3]]
    assert topk.topk_weights[0].tolist() == pytest.approx([2.5 * s[0] / (s[0] + s[3]), 2.5 * s[3] / (s[0] + s[3])])
    assert topk.topk_weights.sum().item() == pytest.approx(2.5)


def test_the_bias_selects_but_does_not_weigh() -> None:
    x = [2.0, -1.0]
    topk = route(torch.tensor([x]), GATE, 2, 1.0, bias=torch.tensor([0.0, 0.0, 100.0, 0.0]))
    s = scores(x)
    assert topk.topk_ids.tolist() == [[2, 0]]
    assert topk.topk_weights[0].tolist() == pytest.approx([s[2] / (s[2] + s[0]), s[0] / (s[2] + s[0])])


def test_a_hash_layer_takes_experts_by_token_and_weights_from_the_gate() -> None:
    table = torch.tensor([[0, 1], [3, 2], [1, 0]])
    x = [[2.0, -1.0], [0.0, 1.0]]
    topk = route(torch.tensor(x), GATE, 2, 1.5, tid2eid=table, token_ids=torch.tensor([1, 2]))
    assert topk.topk_ids.tolist() == [[3, 2], [1, 0]]
    for row, chosen, weights in zip(x, topk.topk_ids.tolist(), topk.topk_weights.tolist(), strict=True):
        s = scores(row)
        total = sum(s[e] for e in chosen)
        assert weights == pytest.approx([1.5 * s[e] / total for e in chosen])


def test_scores_are_computed_in_float32_from_bf16_inputs() -> None:
    x = torch.randn(4, 2).bfloat16()
    topk = route(x, GATE.bfloat16(), 2, 1.0)
    assert topk.router_logits.dtype == torch.float32
    assert torch.equal(topk.router_logits, x.float() @ GATE.T)


def test_a_hash_layer_without_token_ids_says_so() -> None:
    with pytest.raises(ValueError, match="token_ids: missing"):
        route(torch.zeros(1, 2), GATE, 2, 1.0, tid2eid=torch.zeros(3, 2, dtype=torch.int64))


def test_a_padding_token_of_a_hash_layer_goes_nowhere() -> None:
    table = torch.tensor([[0, 1], [3, 2]])
    topk = route(torch.randn(2, 2), GATE, 2, 1.0, tid2eid=table, token_ids=torch.tensor([-1, 1]))
    assert topk.topk_ids.tolist() == [[-1, -1], [3, 2]]


def test_scores_that_are_all_zero_in_float32_weigh_nothing() -> None:
    topk = route(torch.tensor([[-400.0, -400.0]]), torch.ones(4, 2), 2, 2.5)
    assert topk.topk_weights.tolist() == [[0.0, 0.0]]


def test_no_tokens_route_nowhere() -> None:
    assert route(torch.zeros(0, 2), GATE, 2, 1.0).topk_ids.shape == (0, 2)
