"""Captured attention as a safetensors file: `<layer>.keys`, `.values`, `.queries`, and what they are as metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from magicpig.capture.attention_set import AttentionSet
from magicpig.kernels import native

FORMAT = "magicpig.capture"
VERSION = 1


class CaptureError(ValueError):
    """What cannot be captured, or is no capture, or a damaged one. One line, naming the cause."""


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
        described = json.loads(header[FORMAT])
        if described["version"] != VERSION:
            raise ValueError(f"version {described['version']} of the format; this package reads {VERSION}")
        rules = {int(layer): rule for layer, rule in described["layers"].items()}
        layers = {layer: _attention_set(tensors, layer, rules[layer]) for layer in sorted(rules)}
        return Capture(layers, described["about"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise CaptureError(f"{path}: {reason}") from None


def _attention_set(tensors: dict[str, torch.Tensor], layer: int, rule: dict[str, Any]) -> AttentionSet:
    parts = {name: tensors[f"{layer}.{name}"] for name in ("keys", "values", "queries")}
    for name, part in parts.items():
        if part.dtype not in native.DTYPES or part.dtype != parts["keys"].dtype:
            raise ValueError(f"{layer}.{name} is {part.dtype}, {layer}.keys {parts['keys'].dtype}")
        if not bool(torch.isfinite(part).all()):
            raise ValueError(f"{layer}.{name} has entries that are not finite")
    return AttentionSet(
        **parts, scale=rule["scale"], softcap=rule["softcap"], sink_logits=tensors.get(f"{layer}.sink_logits")
    )
