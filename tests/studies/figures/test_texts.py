import pytest
import torch

from magicpig.studies.capture import AttentionSet
from magicpig.studies.figures.texts import _compare_sinks, _few_heads


@pytest.mark.parametrize(("kv_heads", "kept"), [(1, [0]), (4, [0, 1, 2, 3]), (8, [0, 2, 5, 7]), (5, [0, 1, 3, 4])])
def test_few_heads_are_spread_evenly(kv_heads, kept):
    keys = torch.arange(kv_heads).float().view(-1, 1, 1).expand(-1, 5, 4)
    attention = AttentionSet(keys, keys, torch.zeros(1, 2 * kv_heads, 4), scale=1.0)
    few = _few_heads(attention)
    assert few.keys[:, 0, 0].tolist() == kept
    assert few.heads == 2 * len(kept)


def test_sinks_are_compared_between_texts_of_one_head():
    texts = [
        {"layer": layer, "kv_head": 0, "sink_key": [1.0, float(layer * text)]} for text in (0, 1) for layer in (0, 1)
    ]
    rows = _compare_sinks(texts)
    assert all("sink_key" not in row for row in rows)
    moved = {row["layer"]: row["sink_moves"] for row in rows if "sink_moves" in row}
    assert moved == pytest.approx({0: 1.0, 1: 0.5**0.5})
    assert "sink_moves" not in _compare_sinks([{"layer": 0, "kv_head": 0, "sink_key": [1.0, 0.0]}])[0]
