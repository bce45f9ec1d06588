"""The tensors that the sizes say are those that checkpoints have."""

from collections import Counter

import pytest

from moe_ep.attention import AttentionShape
from moe_ep.tensors import model_specs
from tests.holes import model_of


@pytest.mark.parametrize(
    ("name", "count", "nbytes"),
    [("v4pro-2node", 145_116, 864_704_792_696), ("v4flash-1node", 69_187, 159_609_485_896)],
)
def test_every_tensor_and_byte_of_the_published_checkpoints_is_known(name: str, count: int, nbytes: int) -> None:
    model = model_of(name)
    assert model.attention_sizes is not None
    specs = list(model_specs(model.sizes, model.attention_sizes))
    assert len(specs) == len(dict(specs)) == count
    assert sum(spec.nbytes for _, spec in specs) == nbytes


def test_sizes_come_from_the_published_config() -> None:
    keys = {
        "num_attention_heads": 64,
        "head_dim": 512,
        "q_lora_rank": 1024,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "hc_mult": 4,
        "sliding_window": 128,
        "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0, 0, 0],
    }
    found = AttentionShape.from_config(keys)
    assert found is not None
    mine = model_of("v4flash-1node").attention_sizes
    assert mine is not None
    assert found.ratios[:44] == mine.ratios
    assert Counter(found.ratios[:43]) == {4: 21, 128: 20, 0: 2}
    assert AttentionShape.from_config({k: v for k, v in keys.items() if k != "head_dim"}) is None
    with pytest.raises(ValueError, match="heads = '64' must be made of whole numbers"):
        AttentionShape.from_config(keys | {"num_attention_heads": "64"})
    with pytest.raises(ValueError, match="ratios"):
        AttentionShape.from_config(keys | {"compress_ratios": [4, -1]})
