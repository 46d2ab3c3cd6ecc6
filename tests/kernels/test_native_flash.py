"""Exact attention of many queries against float64, in every form: those of the levels, and tiles on and off."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from magicpig.errors import ArgumentError
from magicpig.kernels import _native, cpu, library, reference
from magicpig.kernels.attend.reference import merge

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # H, G, T, n, D
    (1, 1, 1, 1, 1),
    (2, 1, 3, 127, 33),
    (3, 3, 17, 128, 64),
    (4, 2, 50, 129, 80),
    (8, 2, 97, 400, 128),
    (5, 1, 131, 300, 40),
]

# Of all outputs together, and absolute in the lse. Terms of the softmax that are rounded to bfloat16 err by 2^-9 of
# themselves at most, which an average of values keeps where one of them rules.
ERROR = {torch.float32: 3e-6, torch.float16: 3e-6, torch.bfloat16: 4e-3}


def forms() -> list[tuple[str, bool]]:
    """Levels, and whether tiles may be used where a processor has them."""
    before, found = library.isa(), []
    for level in library.levels_to_test():
        library.use_isa(level)
        found += [(level, True), (level, False)] if _native.flash_form() == "amx" else [(level, True)]
    library.use_isa(before)
    return found


@pytest.fixture(params=forms(), ids=lambda form: f"{form[0]}{'' if form[1] else ' without tiles'}")
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each form this machine can run, in use for the test."""
    before = library.isa()
    level, tiles = request.param
    library.use_isa(level)
    _native.use_tiles(tiles)
    yield _native.flash_form()
    library.use_isa(before)
    _native.use_tiles(True)


def draw(H: int, G: int, T: int, n: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    # As a store keeps them: keys and values side by side, and heads far apart.
    rows = torch.randn(G, n, 2 * D + 6).to(dtype)
    return torch.randn(T, H, D).to(dtype).transpose(0, 1), rows[:, :, :D], rows[:, :, D + 2 : 2 * D + 2]


def assert_close(query: Tensor, keys: Tensor, values: Tensor, **rule: object) -> None:
    # A logit is rounded by its size times 2^-24, several times; a term of the softmax errs by as much, relatively.
    logits = float((query.double().abs().amax() * keys.double().abs().sum(-1).amax()) * rule["scale"])
    rounding = 4 * logits * 2.0**-24
    state, right = (each.attend_many(query, keys, values, **rule) for each in (cpu, reference))
    assert state.output.dtype == state.lse.dtype == torch.float32
    assert float((state.output - right.output).norm() / right.output.norm()) <= ERROR[query.dtype] + rounding
    assert float((state.lse - right.lse).abs().max()) <= 2e-6 + rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("H", "G", "T", "n", "D"), SHAPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_shapes_of_every_kind(softcap, causal, H, G, T, n, D, dtype, form):
    assert_close(*draw(H, G, T, n, D, dtype), scale=0.3, softcap=softcap, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_far_from_zero_and_far_apart(dtype, form):
    query, keys, values = draw(2, 1, 20, 300, 64, dtype)
    assert_close(query, keys, values, scale=30.0)
    keys = keys + 8
    query = query.abs()
    state = cpu.attend_many(query, keys, values, scale=-1.0)
    assert state.output.isfinite().all()
    assert state.lse.isfinite().all()


def test_a_later_maximum_takes_over(form):
    # Every block has a larger one.
    query, values = torch.ones(1, 5, 8), torch.randn(1, 700, 8)
    keys = torch.arange(700.0)[None, :, None].expand(1, 700, 8).contiguous() / 100
    assert_close(query, keys, values, scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_hidden_is_not_seen(dtype, form):
    query, keys, values = draw(4, 2, 40, 40, 64, dtype)
    keys[:, 30:], values[:, 30:] = 100.0, 1e4
    first = cpu.attend_many(query[:, :30], keys[:, :30], values[:, :30], scale=0.1, causal=True)
    whole = cpu.attend_many(query, keys, values, scale=0.1, causal=True)
    assert torch.equal(whole.output[:, :30], first.output)
    assert torch.equal(whole.lse[:, :30], first.lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_gets_the_same_however_many_come_along(dtype, form):
    query, keys, values = draw(4, 2, 150, 333, 64, dtype)
    whole = cpu.attend_many(query, keys, values, scale=0.1)
    for first, last in ((0, 1), (1, 50), (50, 150)):
        part = cpu.attend_many(query[:, first:last], keys, values, scale=0.1)
        assert torch.equal(part.output, whole.output[:, first:last])
        assert torch.equal(part.lse, whole.lse[:, first:last])


def test_states_of_blocks_merge(form):
    query, keys, values = draw(4, 2, 30, 500, 64, torch.float32)
    parts = [
        cpu.attend_many(query, keys[:, a:b], values[:, a:b], scale=0.2) for a, b in ((0, 100), (100, 333), (333, 500))
    ]
    merged, whole = merge(parts), cpu.attend_many(query, keys, values, scale=0.2)
    torch.testing.assert_close(merged.output, whole.output, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(merged.lse, whole.lse)


def test_more_rows_than_a_task_has_on_any_pool(pool):
    assert_close(*draw(8, 2, 400, 450, 32, torch.float32), scale=0.2, causal=True)


def test_what_is_not_a_number_stays_so(form):
    query, keys, values = draw(2, 1, 5, 140, 32, torch.float32)
    query[1, 2] = math.nan
    output = cpu.attend_many(query, keys, values, scale=0.2).output
    assert output[1, 2].isnan().all()
    output[1, 2] = 0
    assert output.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q, k[:, :, :31], v), "do not fit"),
        (lambda q, k, v: (q[:3], k, v), "do not fit"),
        (lambda q, k, v: (q.half(), k, v), "are of different dtypes"),
        (lambda q, k, v: (q.transpose(1, 2)[:, :, :5].mT[:, :, :32], k.double(), v), "are of different dtypes"),
        (lambda q, k, v: (q.double(), k.double(), v.double()), "dtype=torch.float64 is not supported"),
        (lambda q, k, v: (q, k.mT.contiguous().mT, v), "must be contiguous in the last dimension"),
    ],
)
def test_what_is_refused(change, message):
    query, keys, values = change(torch.ones(4, 5, 32), torch.ones(2, 9, 32), torch.ones(2, 9, 32))
    with pytest.raises(ArgumentError, match=message):
        cpu.attend_many(query, keys, values, scale=1.0)
