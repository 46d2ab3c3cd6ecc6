"""The public functions do the same whatever `torch.set_default_dtype` and `torch.set_default_device` say."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from magicpig import attend
from magicpig.attention.step import LayerDecoder, attend_stores, decode_step
from magicpig.config import Config
from magicpig.samplers import CHOOSING, shared_sampler
from magicpig.store import KVStore

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLERS = ["full", "lsh", "sketch", *CHOOSING]
DEFAULTS = [torch.bfloat16, torch.float16, torch.float64, "meta"]


@pytest.fixture(params=DEFAULTS, ids=str)
def defaults(request: pytest.FixtureRequest) -> Iterator[None]:
    """In force for the test, which makes its own tensors with `made`."""
    shared_sampler.cache_clear()
    before = torch.get_default_dtype()
    if request.param == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(request.param)
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(before)


def made(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")


def at_home(compute):
    """What `compute` returns under the usual defaults."""
    before, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    try:
        return compute()
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(device if device.type == "meta" else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_attention_does_not_depend_on_the_defaults(sampler, dtype, defaults):
    q, (k, v) = made(1, 4, 1, 64, seed=0).to(dtype), made(2, 1, 2, 300, 64, seed=1).to(dtype)
    more = {"K": 4, "L": 30} if sampler == "lsh" else {"budget": 100}

    def step():
        return attend(q, k, v, sampler=sampler, softcap=20.0, **more)

    output, lse, info = step()
    right, right_lse, right_info = at_home(step)
    assert output.dtype == dtype
    assert lse.dtype == right_lse.dtype
    assert info.predicted_error.dtype == right_info.predicted_error.dtype
    assert torch.equal(output, right)
    assert torch.equal(lse, right_lse)
    assert torch.equal(info.rows, right_info.rows)
    assert all(torch.equal(a, b) for a, b in zip(info.ids[0], right_info.ids[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(info.log_u[0], right_info.log_u[0], strict=True))


@pytest.mark.parametrize(
    ("sampler", "kv_dtype"), [(name, "model") for name in SAMPLERS] + [("lsh", "int8"), ("sketch", "int8")]
)
def test_stores_do_not_depend_on_the_defaults(sampler, kv_dtype, defaults):
    chosen = {"K": 4, "L": 30} if sampler == "lsh" else {"budget": 50}
    config = Config(sampler=sampler, kv_dtype=kv_dtype, exact_below=0, sinks=3, recent=20, **chosen)
    keys, values, query = made(2, 700, 32, seed=2), made(2, 700, 32, seed=3), made(1, 4, 32, seed=4)

    def life():
        store = KVStore(2, 32, torch.float32, config, sampled=True)
        for begin, end in ((0, 333), (333, 695)):
            store.append(keys[:, begin:end], values[:, begin:end])
        store.settle()
        fork = store.fork()
        outputs = []
        for i in range(695, 700):
            new = keys[None, :, i], values[None, :, i]
            outputs.append(decode_step(query, *new, [store], scale=0.2).output)
        fork_step = LayerDecoder([fork], 4, scale=0.2, softcap=None)
        new = keys[None, :, 695:696].contiguous(), values[None, :, 695:696].contiguous()
        if fork_step.takes(query[:, :, None], *new):
            outputs.append(fork_step.step(query[:, :, None], *new)[0])
        store.crop(690)
        state, info = attend_stores(query, [store], scale=0.2, sink_logits=torch.zeros_like(query[0, :, 0]))
        return [*outputs, state.output, state.lse, info.rows]

    for ours, right in zip(life(), at_home(life), strict=True):
        assert ours.dtype == right.dtype
        assert torch.equal(ours, right)
