"""Training of the pocket model's last MLP on what `layout` begins, in steps that can be taken up where they stopped.

The heads say which word an answer goes on with; what is learnt is where its numbers, full stops and its end belong.
A step depends on the seed, its number and the weights before it alone, so a run that was stopped ends as one that was
not (on the same machine, with the same number of threads). Positions jump at random between pieces of a text, which
teaches long distances on short texts (after Ruoss et al., arXiv 2305.16843).
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TextIO

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from magicpig.errors import ArgumentError
from magicpig.studies.pocket import layout, lessons, model, tokenizer
from magicpig.studies.pocket.lessons import Lesson, Target

FURTHEST = 40_000  # positions that jumps may reach
_PIECE = 64  # tokens between two jumps, on average
_WARM_UP = 40
_SAVE_EVERY = 100


@dataclass(frozen=True)
class Stage:
    """`steps` steps of `rows` lessons of `length` tokens; the learning rate falls from `rate` to the next stage's."""

    length: int
    rows: int
    steps: int
    rate: float


@dataclass(frozen=True)
class Preset:
    """A size of the model and what it learns from."""

    hidden: int
    intermediate: int
    stages: tuple[Stage, ...]
    heads: int = 6
    groups: int = 3

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def at(self, step: int) -> tuple[Stage, float]:
        """The stage of a step, and its learning rate."""
        rates = [*(stage.rate for stage in self.stages), 0.0]
        begin = 0
        for stage, (rate, following) in zip(self.stages, pairwise(rates), strict=True):
            if step < begin + stage.steps:
                share = (step - begin) / stage.steps
                return stage, (rate + share * (following - rate)) * min(1.0, (step + 1) / _WARM_UP)
            begin += stage.steps
        raise IndexError(step)


PRESETS = {
    "cpu": Preset(
        hidden=288,
        intermediate=256,
        stages=(
            Stage(length=1024, rows=10, steps=160, rate=2e-3),
            Stage(length=4096, rows=5, steps=100, rate=1e-3),
        ),
    ),
    "gpu": Preset(
        hidden=288,
        intermediate=256,
        stages=(
            Stage(length=1024, rows=50, steps=400, rate=2e-3),
            Stage(length=4096, rows=20, steps=400, rate=1e-3),
            Stage(length=16384, rows=5, steps=200, rate=5e-4),
        ),
    ),
}


@dataclass(frozen=True)
class Progress:
    """After a step: `loss` and the share of right tokens per kind of lesson in it."""

    step: int
    length: int
    rate: float
    loss: dict[str, float]
    right: dict[str, float]


def train(
    out: Path,
    preset: Preset,
    *,
    seed: int = 0,
    device: str = "cpu",
    report: Callable[[Progress], None] = lambda _: None,
) -> LlamaForCausalLM:
    """Trains to the end of the preset, from the checkpoint in `out` if there is one.

    Writes checkpoint.safetensors (every 100 steps) and train.jsonl (a line per step) there; `save` writes the model.
    Raises ValueError when the checkpoint is of a model of another shape or of another seed.
    """
    out.mkdir(parents=True, exist_ok=True)
    words = tokenizer.build()
    net = model.make(
        len(words), hidden=preset.hidden, intermediate=preset.intermediate, heads=preset.heads, groups=preset.groups
    )
    layout.initialise(net, words, seed)
    layout.restrict(net)
    torch.nn.Module.to(net, device)
    optimizer = torch.optim.AdamW(_learning(net), lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
    step = _restore(out, preset, seed, net, optimizer)
    writer = lessons.Writer(words)
    with _log(out, step) as log:
        while step < preset.steps:
            progress = _step(net, optimizer, writer, preset, seed, step, device)
            log.write(json.dumps(asdict(progress)) + "\n")
            log.flush()
            report(progress)
            step += 1
            if step % _SAVE_EVERY == 0 or step == preset.steps:
                _save(out, preset, seed, step, net, optimizer)
    return net


def save(net: LlamaForCausalLM, folder: Path) -> None:
    """Writes the model (weights in float16, to be used in float32) and its tokenizer as transformers reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.build().save_pretrained(folder)
    weights = {
        name: w.to(torch.float16).contiguous() for name, w in net.state_dict().items() if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    net.config.dtype = torch.float32
    net.config.architectures = ["LlamaForCausalLM"]
    net.config.save_pretrained(folder)
    net.generation_config.do_sample = False
    net.generation_config.save_pretrained(folder)


def _step(
    net: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    writer: lessons.Writer,
    preset: Preset,
    seed: int,
    step: int,
    device: str,
) -> Progress:
    stage, rate = preset.at(step)
    rng = random.Random(f"{seed} {step}")
    for group in optimizer.param_groups:
        group["lr"] = rate
    words = writer.tokenizer
    kinds = [_kind(row + step * stage.rows) for row in range(stage.rows)]
    batch = [lessons.lesson(kind, writer, stage.length, rng) for kind in kinds]
    ids = torch.full((stage.rows, stage.length), words.eos_token_id, dtype=torch.int64, device="cpu")
    for row, each in enumerate(batch):
        ids[row, : len(each.ids)] = torch.tensor(each.ids, dtype=torch.int64, device="cpu")
    positions = _positions(batch, stage.length, words.encode(".", add_special_tokens=False)[0], rng)
    # With no mask at all transformers takes every jump for the beginning of another text, which must not see this one.
    everything = torch.ones_like(ids)
    hidden = net.model(
        ids.to(device), attention_mask=everything.to(device), position_ids=positions.to(device), use_cache=False
    ).last_hidden_state
    form = torch.tensor(layout.form_tokens(words), device=device, dtype=torch.int64)
    losses, right = {}, {}
    for kind in dict.fromkeys(kinds):
        targets = [(row, target) for row, k in enumerate(kinds) if k == kind for target in batch[row].targets]
        if targets:
            losses[kind], right[kind] = _loss(net, hidden, targets, form)
    optimizer.zero_grad()
    torch.stack(list(losses.values())).mean().backward()
    torch.nn.utils.clip_grad_norm_(_learning(net), 1.0)
    optimizer.step()
    return Progress(
        step,
        stage.length,
        rate,
        {kind: round(loss.item(), 4) for kind, loss in losses.items()},
        {kind: round(hits, 4) for kind, hits in right.items()},
    )


def _learning(net: LlamaForCausalLM) -> list[torch.nn.Parameter]:
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def _kind(row: int) -> str:
    """Two of five lessons are niah, the others one each."""
    return ("niah", "vt", "niah", "cwe", "fwe")[row % 5]


def _loss(
    net: LlamaForCausalLM, hidden: Tensor, targets: list[tuple[int, Target]], form: Tensor
) -> tuple[Tensor, float]:
    """Minus the log of the probability that the answer goes on in its form, averaged; how often the likeliest is right.

    In its form: with the token of the form that is right or, where a word is right, with any token that is not of it.
    Which word that is has been laid out.
    """
    most = max(len(target.right) for _, target in targets)
    rows, at = [row for row, _ in targets], [target.at for _, target in targets]
    right = torch.tensor(
        [[*target.right, *[target.right[0]] * (most - len(target.right))] for _, target in targets],
        device=form.device,
        dtype=torch.int64,
    )
    scores = net.lm_head(hidden[rows, at]).float()
    logs = scores.log_softmax(-1)
    word = logs.index_fill(1, form, -torch.inf).logsumexp(1)
    losses = -torch.where(torch.isin(right[:, 0], form), logs.gather(1, right[:, :1])[:, 0], word)
    hits = (scores.argmax(1, keepdim=True) == right).any(1).float().mean().item()
    return losses.mean(), hits


def _positions(batch: list[Lesson], length: int, full_stop: int, rng: random.Random) -> Tensor:
    """(rows, length) rising positions: three texts in ten without jumps, the others spread over up to `FURTHEST`.

    They jump between sentences, and anywhere in a text that has none, but not in questions and answers.
    """
    rows = []
    for lesson in batch:
        jumps = torch.zeros(length, dtype=torch.float64, device="cpu")
        text = lesson.ids[: lesson.asked]
        places = [at for at in range(1, len(text)) if text[at - 1] == full_stop]
        if len(places) < len(text) // _PIECE:
            places = list(range(1, len(text)))
        if places and rng.random() > 0.3:
            extra = FURTHEST ** rng.random()
            chosen = rng.choices(places, k=max(1, len(text) // _PIECE))
            shares = [rng.random() for _ in chosen]
            for place, share in zip(chosen, shares, strict=True):
                jumps[place] += extra * share / sum(shares)
        rows.append(torch.arange(length, dtype=torch.int64, device="cpu") + jumps.cumsum(0).long())
    return torch.stack(rows)


def _log(out: Path, step: int) -> TextIO:
    """The log, without the steps that are taken again."""
    file = out / "train.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    aside = out / "train.jsonl.new"
    aside.write_text("".join(lines[:step]), encoding="utf-8")
    os.replace(aside, file)
    return file.open("a", encoding="utf-8")


def _state(net: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that training changes, under its name in a checkpoint."""
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        yield name, parameter.data
        state = optimizer.state[parameter]
        for part in ("exp_avg", "exp_avg_sq"):
            yield f"{part}/{name}", state.setdefault(part, torch.zeros_like(parameter))
        yield f"step/{name}", state.setdefault("step", torch.tensor(0.0, dtype=torch.float32, device="cpu"))


def _settings(preset: Preset, seed: int, step: int) -> dict[str, str]:
    """What a checkpoint says of itself; another seed or shape is refused. Stages may change after its step."""
    shape = {
        "hidden": preset.hidden,
        "intermediate": preset.intermediate,
        "heads": preset.heads,
        "groups": preset.groups,
    }
    return {"seed": str(seed), "shape": json.dumps(shape), "step": str(step)}


def _save(
    out: Path, preset: Preset, seed: int, step: int, net: LlamaForCausalLM, optimizer: torch.optim.Optimizer
) -> None:
    aside = out / "checkpoint.safetensors.new"
    tensors = {name: tensor.cpu().contiguous() for name, tensor in _state(net, optimizer)}
    save_file(tensors, aside, metadata=_settings(preset, seed, step))
    os.replace(aside, out / "checkpoint.safetensors")


def _restore(out: Path, preset: Preset, seed: int, net: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> int:
    file = out / "checkpoint.safetensors"
    if not file.is_file():
        return 0
    with safe_open(file, "pt") as saved:
        found = saved.metadata()
        step = int(found["step"])
        wanted = _settings(preset, seed, step)
        for name in ("seed", "shape"):
            if found[name] != wanted[name]:
                raise ArgumentError(
                    f"{file} was made with {name}={found[name]}, not {wanted[name]}; use another folder"
                )
        for name, tensor in _state(net, optimizer):
            tensor.copy_(saved.get_tensor(name))
    return step
