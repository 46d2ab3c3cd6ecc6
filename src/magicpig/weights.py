"""Linear layers that read their weights at the speed of memory when a few tokens come at a time, as decoding has it.

One token needs every weight once, so reading them is what it costs. torch multiplies a few vectors far slower than
memory allows; `Kernels.linear` does not. More vectors, as of a prompt, are torch's: in float32, a piece of the weights
after the other, where it multiplies numbers of 16 bits far slower than those.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from magicpig.errors import ArgumentError
from magicpig.kernels import library
from magicpig.kernels.base import DTYPES, MAX_LINEAR, load_kernels
from magicpig.kernels.linear.reference import pack

Network = TypeVar("Network", bound=nn.Module)

FORMS = ("auto", "bf16", "int8")
_NUMBERS_AT_ONCE = 1 << 20  # of weights that become floats: they stay in a cache until they are multiplied
_VECTORS_AT_ONCE = 4096  # whose products are there as floats, so that long prompts take no more memory than with torch
_WORTH_FLOATS = 96  # vectors from which on making floats of the weights costs less than it gains (docs/log.md)


def use_weights(network: Network, form: str = "auto") -> Network:
    """Gives the linear layers of a network on the CPU, in evaluation mode, their weights in another form; in place.

    form: one of `FORMS`. "auto": as they are. "bf16": rounded to bfloat16. "int8": whole numbers with one scale per
    output channel. Layers compute in the dtype of what they are given all the same. Embeddings, and matrices that are
    no `torch.nn.Linear`, such as the experts of a mixture, stay as they are; an output layer that shares its weights
    with the embeddings gets its own. A network in other than its own weights can neither be saved nor trained.
    Returns the network. Raises ArgumentError for another form.
    """
    if form not in FORMS:
        raise ArgumentError(f"weights={form!r} is not one of {', '.join(FORMS)}")
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and type(child) in (nn.Linear, FastLinear):
                setattr(module, name, _in_form(child, form))
    return network


def _in_form(layer: nn.Linear, form: str) -> nn.Module:
    weight = layer.weight.detach()
    if weight.device.type != "cpu":
        return layer
    if form == "int8":
        return PackedLinear(*pack(weight), layer.in_features, layer.bias)
    if form == "bf16" and weight.dtype != torch.bfloat16:
        return PackedLinear(weight.to(torch.bfloat16), None, layer.in_features, layer.bias)
    if weight.dtype in DTYPES:
        layer.__class__ = FastLinear  # hooks, names and shared parameters stay
    return layer


class FastLinear(nn.Linear):
    """`torch.nn.Linear`, which asks the kernels where a few vectors come and nothing is differentiated."""

    def forward(self, input: Tensor) -> Tensor:
        own = self._parameters  # a parameter that is asked for as an attribute takes a microsecond
        if self.is_fast(input):
            return _multiplied(input, own["weight"], None, own["bias"])
        if not library.torch_multiplies(input.dtype) and self._suits(input):
            return _multiplied_as_floats(input, own["weight"], None, own["bias"])
        return super().forward(input)

    def is_fast(self, input: Tensor) -> bool:
        """Whether the kernels multiply these vectors."""
        return self._suits(input, load_kernels().few_vectors(input.dtype))

    def _suits(self, input: Tensor, most: float = math.inf) -> bool:
        """Whether these are at most so many vectors of its dtype, of which nothing but the product is asked."""
        weight = self._parameters.get("weight")  # none where something computes it from others
        return (
            weight is not None
            and weight.dtype is input.dtype
            and weight.is_cpu
            and weight.is_contiguous()
            and _suits(input, self.in_features, most)
            and not (torch.is_grad_enabled() and (weight.requires_grad or input.requires_grad))
        )


class PackedLinear(nn.Module):
    """A linear layer whose weights are kept in bfloat16, or in int8 with scales, whatever it computes in.

    numbers: (N, K) bfloat16, or (N, K padded) int8 with scales (N,) float32, as of `Kernels.linear`. bias: (N,).
    """

    numbers: Tensor
    scales: Tensor | None
    bias: Tensor | None

    def __init__(self, numbers: Tensor, scales: Tensor | None, in_features: int, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, len(numbers)
        self.register_buffer("numbers", numbers)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def is_fast(self, input: Tensor) -> bool:
        """Whether the kernels multiply these vectors."""
        return self._suits(input, MAX_LINEAR)

    def _suits(self, input: Tensor, most: float = math.inf) -> bool:
        return _suits(input, self.in_features, most) and not (torch.is_grad_enabled() and input.requires_grad)

    def forward(self, input: Tensor) -> Tensor:
        own = self._buffers
        if self.is_fast(input):
            return _multiplied(input, own["numbers"], own["scales"], own["bias"])
        if not library.torch_multiplies(input.dtype) and self._suits(input):
            return _multiplied_as_floats(input, own["numbers"], own["scales"], own["bias"])
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return functional.linear(input, self.unpacked(input.dtype), bias)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weights (N, K) as floats."""
        plain = self.numbers[:, : self.in_features]
        if self.scales is None:
            return plain.to(dtype)
        weight = torch.empty(plain.shape, dtype=dtype, device=plain.device)
        return torch.mul(plain, self.scales[:, None], out=weight)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, numbers={self.numbers.dtype}"

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        # Another dtype is for what is computed in, not for what weights are kept in.
        before = self.numbers.dtype, self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.numbers = self.numbers.to(before[0])
        if before[1] is not None:
            self.scales = before[1].to(self.numbers.device)
        return self


def rows_alike(layer: nn.Module, input: Tensor) -> int:
    """How many of the vectors (..., n, K) a linear layer may be given at a time, to be computed as each of them alone.

    To the bit: `Kernels.linear` sums each vector by itself, in one order. torch promises nothing of that: 1.
    """
    if not isinstance(layer, (FastLinear, PackedLinear)) or not layer.is_fast(input[..., :1, :]):
        return 1
    return load_kernels().few_vectors(input.dtype) if isinstance(layer, FastLinear) else MAX_LINEAR


def _suits(input: Tensor, columns: int, most: float) -> bool:
    """Whether these are at most so many vectors on the CPU, of which nothing but the product is asked."""
    return (
        input.is_cpu
        and input.dtype in DTYPES
        and input.shape[-1] == columns
        and 0 < input.numel() <= most * columns
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


def _multiplied(input: Tensor, weight: Tensor | None, scales: Tensor | None, bias: Tensor | None) -> Tensor:
    assert weight is not None
    if bias is not None and bias.dtype is not input.dtype:
        bias = bias.to(input.dtype)
    return load_kernels().linear(input if input.is_contiguous() else input.contiguous(), weight, scales, bias)


def _multiplied_as_floats(input: Tensor, weight: Tensor | None, scales: Tensor | None, bias: Tensor | None) -> Tensor:
    """Any number of vectors, by products of floats."""
    assert weight is not None
    (N, _), K = weight.shape, input.shape[-1]
    x = input.reshape(-1, K)
    if len(x) < _WORTH_FLOATS:
        some = [_multiplied(own, weight, scales, bias) for own in x.split(MAX_LINEAR)]
        return torch.cat(some).view(*input.shape[:-1], N)
    out = torch.empty(len(x), N, dtype=input.dtype, device="cpu")
    step = max(1, _NUMBERS_AT_ONCE // K)
    piece = torch.empty(min(step, N), K, dtype=torch.float32, device="cpu")
    for own, to in zip(x.split(_VECTORS_AT_ONCE), out.split(_VECTORS_AT_ONCE), strict=True):
        vectors, y = own.float(), torch.empty(to.shape, dtype=torch.float32, device="cpu")
        for first in range(0, N, step):
            at = slice(first, min(first + step, N))
            floats = piece[: at.stop - first]
            if scales is None:
                floats.copy_(weight[at])
            else:
                torch.mul(weight[at, :K], scales[at, None], out=floats)
            torch.mm(vectors, floats.T, out=y[:, at])
        to.copy_(y if bias is None else y.add_(bias.float()))
    return out.view(*input.shape[:-1], N)
