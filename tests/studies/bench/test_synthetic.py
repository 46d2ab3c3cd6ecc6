import pytest
import torch

from magicpig.kernels import algorithm
from magicpig.studies.bench.synthetic import CHUNK, synthetic_context

D = 64


def context(tokens: int = 3000, **settings):
    return synthetic_context(tokens, **{"heads": 6, "kv_heads": 2, "head_dim": D, "steps": 3} | settings)


@pytest.mark.parametrize("tokens", [2, 63, CHUNK - 2, CHUNK + 65], ids="{} tokens".format)
def test_shapes(tokens):
    made = context(tokens, dtype=torch.bfloat16)
    assert made.keys.shape == made.values.shape == (2, tokens + 3, D)
    assert made.keys.dtype == made.values.dtype == torch.bfloat16
    assert made.queries.shape == (3, 6, D)
    assert bool(torch.isfinite(made.keys).all() and torch.isfinite(made.values).all())


def test_same_seed_same_context():
    once, again, other = context(seed=1), context(seed=1), context(seed=2)
    for name in ("keys", "values", "queries"):
        assert torch.equal(getattr(once, name), getattr(again, name))
        assert not torch.equal(getattr(once, name), getattr(other, name))


def test_needles_in_one_place_are_no_race():
    once = context(tokens=20)  # 48 needles in 19 places
    for _ in range(100):
        assert torch.equal(context(tokens=20).keys, once.keys)


def test_a_head_does_not_depend_on_how_many_there_are():
    assert torch.equal(context(heads=3, kv_heads=1).keys[0], context().keys[0])


def test_the_sink_holds_about_half_of_the_mass():
    made = context()
    weights = torch.softmax(made.queries[0, :3].double() @ made.keys[0, :3000].double().T / D**0.5, -1)
    assert float(weights[0, 0]) == pytest.approx(0.5, abs=0.01)  # of the first query, by construction
    assert bool((weights[:, 0] > 0.2).all() and (weights[:, 0] < 0.8).all())


def test_keys_and_queries_lie_in_opposite_cones():
    made = context()
    mean = made.keys[:, 1:].mean(1)
    to_keys = torch.cosine_similarity(made.keys[:, 1:], mean[:, None], dim=-1)
    to_queries = torch.cosine_similarity(made.queries[0].view(2, 3, D), mean[:, None], dim=-1)
    assert float(to_keys.mean()) == pytest.approx(0.86, abs=0.03)
    assert float(to_queries.max()) < -0.7


def test_centring_is_what_makes_hashing_find_keys():
    made = context()
    keys, query = made.keys[0], made.queries[0, :3]
    settings = {"K": 10, "L": 150, "min_hits": 2, "sinks": 4, "recent": 64, "scale": D**-0.5}
    _, samples = algorithm.attend_lsh(query, keys[None], made.values[:1], **settings)
    share = sum(len(sample.ids) for sample in samples) / (3 * (len(keys) - 68))
    assert 0.002 < share < 0.05


def test_heads_must_divide():
    with pytest.raises(ValueError, match="heads=6 is not a multiple of kv_heads=4"):
        context(kv_heads=4)


def test_too_short():
    with pytest.raises(ValueError, match="tokens=1"):
        context(1)


def test_no_steps():
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        context(steps=0)
