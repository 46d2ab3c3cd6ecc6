import pytest
import torch

from magicpig.studies.capture import AttentionSet
from magicpig.studies.figures.anatomy import SHARES, attention_mass, geometry, long_tailed, sink_moves

N, D = 1000, 8


def attention_set(keys=None, queries=None, scale=1.0) -> AttentionSet:
    keys = torch.zeros(1, N, D) if keys is None else keys
    queries = torch.zeros(2, 3, D) if queries is None else queries
    return AttentionSet(keys, torch.randn_like(keys), queries, scale=scale)


def test_even_attention_is_a_long_tail():
    (row, *_) = attention_mass(attention_set())
    # Two steps see 999 and 1000 keys; each share of the keys holds that share of the attention, up to one key.
    assert row["mass"] == pytest.approx(SHARES, abs=1 / 999)
    assert row["mass_without_sink"] == pytest.approx(SHARES, abs=1 / 998)
    assert row["sink"] == pytest.approx((1 / 999 + 1 / 1000) / 2, abs=1e-6)
    assert row["long_tailed"] is True


def test_one_key_that_gets_everything_is_none():
    keys = torch.zeros(1, N, D)
    keys[0, 500, 0] = 100
    queries = torch.zeros(2, 3, D)
    queries[:, :, 0] = 1
    for row in attention_mass(attention_set(keys, queries)):
        assert row["mass"] == pytest.approx([1.0] * len(SHARES))
        assert (row["sink"], row["sink_at"]) == (pytest.approx(1), 500)  # a sink need not be the first key
        assert row["mass_without_sink"] == pytest.approx(SHARES, abs=1 / 998)
        assert row["long_tailed"] is False
    (geometric,) = geometry(attention_set(keys, queries))
    assert geometric["sink_at"] == 500
    assert geometric["sink_key"] == keys[0, 500].tolist()


def test_what_a_sink_hides():
    keys = torch.zeros(1, N, D)
    keys[0, 0, 0] = 10
    queries = torch.zeros(2, 3, D)
    queries[:, :, 0] = 1
    (row, *_) = attention_mass(attention_set(keys, queries))
    sink = torch.e**10 / (torch.e**10 + N)  # of about 22026 to 1000
    assert row["sink"] == pytest.approx(sink, rel=1e-3)
    assert row["mass"][0] == pytest.approx(sink, rel=1e-3)
    assert row["mass_without_sink"] == pytest.approx(SHARES, abs=1 / 998)
    assert row["long_tailed"] is False


def test_the_line_between_long_tailed_and_not():
    at = SHARES.index(0.2)
    assert long_tailed([0.0] * at + [0.899] + [1.0] * (len(SHARES) - at - 1))
    assert not long_tailed([0.0] * at + [0.901] + [1.0] * (len(SHARES) - at - 1))


def test_cones():
    keys = torch.randn(2, N, D) * 0.1
    keys[:, 1:, 0] += 1  # a cone around the first axis,
    keys[:, 0, 1] = 5  # and a sink at right angles to it
    queries = torch.zeros(4, 6, D)
    queries[:, :3, 0] = -1  # the first head looks away from its keys, so most at the sink,
    queries[:, 3:, 2] = 1  # the second across
    first, second = geometry(attention_set(keys, queries))
    assert first["mean_to_keys"] > 0.9
    assert first["mean_to_queries"] == pytest.approx(-1, abs=0.01)
    assert second["mean_to_queries"] == pytest.approx(0, abs=0.02)
    assert first["sink_to_keys"] == pytest.approx(0, abs=0.05)
    assert first["sink_key"] == pytest.approx(keys[0, 0].tolist(), abs=1e-6)


def test_how_far_sinks_move():
    assert sink_moves([[1, 0], [2, 0]]) == pytest.approx(1)
    assert sink_moves([[1, 0], [0, 3], [0, 1]]) == pytest.approx(1 / 3)  # of three pairs one agrees
