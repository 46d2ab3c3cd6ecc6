"""The tree finds what looking at every filed sequence finds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magicpig.engine.radix_tree import RadixTree, common

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple)


def shared(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(TOKENS, TOKENS)
def test_common(a, b):
    assert common(a, b) == shared(a, b)


@given(st.lists(st.tuples(st.booleans(), TOKENS), max_size=40), st.lists(TOKENS, max_size=5))
def test_like_a_list(changes, queries):
    tree, filed = RadixTree(), {}
    for number, (add, tokens) in enumerate(changes):
        if add:
            tree.insert(tokens, number)
            filed[tokens] = number
        elif tokens in filed:
            tree.remove(tokens)
            del filed[tokens]
        else:
            with pytest.raises(KeyError):
                tree.remove(tokens)
        assert dict(tree) == filed
    for query in [*queries, *filed]:
        best = max((shared(tokens, query) for tokens in filed), default=0)
        found = tree.longest(query)
        if best == 0:
            assert found is None
        else:
            length, number = found
            (tokens,) = [tokens for tokens, value in filed.items() if value == number]
            assert (length, shared(tokens, query)) == (best, best)
            assert query[:best] not in filed or tokens == query[:best]
        begun = sorted((len(tokens), value) for tokens, value in filed.items() if query[: len(tokens)] == tokens)
        assert list(tree.prefixes(query)) == begun
