"""Captured attention as a safetensors file: `<layer>.keys`, `.values`, `.queries`, and what they are as metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from magicpig import strict_json
from magicpig.errors import ArgumentError, NotFiniteError
from magicpig.kernels import base
from magicpig.studies.capture.attention_set import AttentionSet
from magicpig.wording import shown

FORMAT = "magicpig.capture"
VERSION = 1


class CaptureError(ArgumentError):
    """What cannot be captured, or is no capture, or a damaged one. One line, naming the cause."""

    code = "invalid_capture"


@dataclass(frozen=True)
class Capture:
    """The attention of one request in some layers of a model.

    layers: by the layer's index, ascending. about: where it comes from (model, text, tokens, versions), as JSON has it.
    """

    layers: dict[int, AttentionSet]
    about: dict[str, Any]

    def to_bytes(self) -> bytes:
        """The file's content; `load_capture` reads it back bit for bit."""
        tensors: dict[str, torch.Tensor] = {}
        rules = {}
        for layer, each in self.layers.items():
            parts = {"keys": each.keys, "values": each.values, "queries": each.queries, "sink_logits": each.sink_logits}
            tensors |= {f"{layer}.{name}": part.contiguous() for name, part in parts.items() if part is not None}
            rules[layer] = {"scale": each.scale, "softcap": each.softcap}
        # One entry: safetensors writes several in any order.
        header = {FORMAT: json.dumps({"version": VERSION, "layers": rules, "about": self.about}, sort_keys=True)}
        content: bytes = save(tensors, header)
        return content


def load_capture(path: Path | str) -> Capture:
    """Read a capture. Raises CaptureError if it cannot be read or is not what it should be."""
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
    except OSError as error:
        raise CaptureError(f"cannot read {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise CaptureError(f"{path}: not a safetensors file: {error}") from None
    if FORMAT not in header:
        raise CaptureError(f"{path}: a safetensors file, but not a capture of attention")
    try:
        described = strict_json.parse(header[FORMAT])
        _check_described(described)
        rules = {_layer(name): rule for name, rule in described["layers"].items()}
        layers = {layer: _attention_set(tensors, layer, rules[layer]) for layer in sorted(rules)}
        return Capture(layers, described["about"])
    except KeyError as error:
        raise CaptureError(f"{path}: {error} is missing") from None
    except ValueError as error:
        raise CaptureError(f"{path}: {error}") from None


def _check_described(described: Any) -> None:
    if not isinstance(described, dict):
        raise ArgumentError(f"{FORMAT}={shown(described)} must be an object")
    if described["version"] != VERSION:
        raise ArgumentError(f"version {shown(described['version'])} of the format; this package reads {VERSION}")
    for name in ("layers", "about"):
        if not isinstance(described[name], dict):
            raise ArgumentError(f"{name}={shown(described[name])} must be an object")
    if not described["layers"]:
        raise ArgumentError("there is no layer in it")
    for name, rule in described["layers"].items():
        if not isinstance(rule, dict):
            raise ArgumentError(f"layers.{name}={shown(rule)} must be an object")


def _layer(name: str) -> int:
    """The index that a layer is called by. Of several ways to write it, one is right, so that no two are the same."""
    if not (name.isascii() and name.isdigit() and len(name) < 10 and name == str(int(name))):
        raise ArgumentError(f"layers.{shown(name)} is not the index of a layer")
    return int(name)


def _attention_set(tensors: dict[str, torch.Tensor], layer: int, rule: dict[str, Any]) -> AttentionSet:
    parts = {name: tensors[f"{layer}.{name}"] for name in ("keys", "values", "queries")}
    for name, part in parts.items():
        if part.dtype not in base.DTYPES:
            allowed = ", ".join(map(str, base.DTYPES))
            raise ArgumentError(f"{layer}.{name} is {part.dtype}; allowed: {allowed}")
        if part.dtype != parts["keys"].dtype:
            raise ArgumentError(f"{layer}.{name} is {part.dtype}, {layer}.keys {parts['keys'].dtype}")
        if not bool(torch.isfinite(part).all()):
            raise NotFiniteError(f"{layer}.{name} has entries that are not finite")
    sink_logits = tensors.get(f"{layer}.sink_logits")
    if sink_logits is not None and not (sink_logits.is_floating_point() and bool(torch.isfinite(sink_logits).all())):
        raise NotFiniteError(f"{layer}.sink_logits has entries that are not finite numbers")
    made = AttentionSet(**parts, scale=rule["scale"], softcap=rule["softcap"], sink_logits=sink_logits)
    base.padded(made.keys.shape[2])  # a length of heads that the kernels know?
    return made
