import pytest
import torch

from magicpig.attention.prefill import causal_attention
from magicpig.kernels import algorithm
from magicpig.studies.capture import AttentionSet


def attention_set(**changes) -> AttentionSet:
    """Three steps over 17 tokens in all: 6 query heads, 2 key/value heads of dimension 8."""
    keys, values = torch.randn(2, 2, 17, 8)
    settings = {"queries": torch.randn(3, 6, 8), "scale": 0.3}
    return AttentionSet(keys, values, **settings | changes)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [None, torch.tensor([-1.0, 0, 1, 2, 0, -2])], ids=["", "sinks"])
def test_every_query_sees_the_tokens_before_it_and_itself(softcap, sinks):
    made = attention_set(softcap=softcap, sink_logits=sinks)
    causal = causal_attention(
        made.queries.transpose(0, 1), made.keys, made.values, scale=0.3, softcap=softcap, sink_logits=sinks
    )
    for step in range(3):
        exact = made.exact(step)
        assert exact.output.dtype == torch.float64
        torch.testing.assert_close(exact.output.float(), causal.output[:, step])
        torch.testing.assert_close(exact.lse.float(), causal.lse[:, step])


def test_weights_are_what_the_output_weighs_values_with():
    made = attention_set()
    weights = made.weights(1)
    assert weights.shape == (6, 16)
    torch.testing.assert_close(weights.sum(-1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(weights[4] @ made.values[1, :16].double(), made.exact(1).output[4])


def test_some_heads_alone():
    made = attention_set(sink_logits=torch.arange(6.0))
    alone = made.only([1])
    assert (made.heads, made.kv_heads, alone.heads, alone.kv_heads) == (6, 2, 3, 1)
    torch.testing.assert_close(alone.exact(2).output, made.exact(2).output[3:], rtol=0, atol=0)
    everything = algorithm.attend_full(made.queries[2].double(), made.keys, made.values, scale=0.3)
    torch.testing.assert_close(attention_set().exact(2).output.shape, everything.output.shape)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": torch.zeros(3, 5, 8)}, r"queries have shape \(3, 5, 8\)"),
        ({"queries": torch.zeros(3, 6, 9)}, r"expected \(T, H, 8\)"),
        ({"queries": torch.zeros(18, 6, 8)}, "T at most 17"),
        ({"queries": torch.zeros(0, 6, 8)}, "queries have shape"),
        ({"sink_logits": torch.zeros(2)}, r"sink_logits have shape \(2,\); expected \(6,\)"),
    ],
)
def test_shapes_must_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        attention_set(**changes)


def test_keys_and_values_must_fit():
    with pytest.raises(ValueError, match=r"keys have shape \(2, 17, 8\) and values \(2, 16, 8\)"):
        AttentionSet(torch.zeros(2, 17, 8), torch.zeros(2, 16, 8), torch.zeros(1, 2, 8), scale=1.0)
