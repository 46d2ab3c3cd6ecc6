"""The heads that are laid out do what they are for, before any training."""

import random

import pytest
import torch

from magicpig.studies.evaluation import tasks
from magicpig.studies.pocket import layout, lessons, model, tokenizer


@pytest.fixture(scope="module")
def words():
    return tokenizer.build()


def _net(words, **shape):
    net = model.make(len(words), **{"hidden": 288, "intermediate": 32, "heads": 6, "groups": 3, **shape})
    layout.initialise(net, words, seed=0)
    return net.eval()


@pytest.fixture(scope="module")
def net(words):
    net = _net(words)
    net.set_attn_implementation("eager")
    return net


def _read(net, ids, **what):
    with torch.no_grad():
        return net(torch.tensor([ids]), **what)


def test_layer_0_looks_back_a_fixed_distance_even_far_into_a_text(net, words):
    ids = torch.randint(3, len(words), (3000,), generator=torch.Generator().manual_seed(1)).tolist()
    attention = _read(net, ids, output_attentions=True).attentions[0][0]
    at = torch.arange(20, 3000)
    for head, back in enumerate((1, 2, 3, 4)):
        assert attention[head, at, at - back].min() > 0.9


def test_layer_1_counts_how_often_a_word_has_stood_there(net, words):
    rng = random.Random(2)
    common, *others = words.encode(" ".join(rng.sample(tasks.lexicon.english(), 400)), add_special_tokens=False)
    text = [common] * 30 + others[:370]
    rng.shuffle(text)
    state = _read(net, [words.bos_token_id, *text], output_hidden_states=True).hidden_states[2][0]
    count = (state[1:, layout._Stream.count] / layout._SMALL).tolist()
    seen = [count[at] for at, token in enumerate(text) if token == common]
    for n, found in enumerate(seen, 1):
        # Random sketches of 16 dimensions are alike by 1/4: words that are not the same add up to one that is.
        assert found == pytest.approx(n / (n + 10), abs=0.08)


@pytest.mark.parametrize("task", ["niah_single_3", "niah_multikey_2", "vt", "cwe", "fwe"])
def test_the_heads_know_which_word_comes_next_before_training(words, task):
    net = _net(words)
    form = layout.form_tokens(words)
    writer = lessons.Writer(words)
    right = total = 0
    for index in range(2):
        sample = tasks.generate(task, words, 4096, index=index, seed=11)
        writer.begin(4096)
        writer.sample(sample)
        lesson = writer.finished()
        targets = [target for target in lesson.targets if target.right[0] not in form]
        scores = _read(net, lesson.ids, logits_to_keep=torch.tensor([target.at for target in targets])).logits[0]
        scores[:, form] = -torch.inf
        right += sum(best in target.right for best, target in zip(scores.argmax(1).tolist(), targets, strict=True))
        total += len(targets)
    assert right >= 0.9 * total


def test_what_training_may_change_writes_nothing_but_the_form(words):
    net = _net(words)
    layout.restrict(net)
    before = {name: weight.clone() for name, weight in net.state_dict().items()}
    optimizer = torch.optim.SGD([weight for weight in net.parameters() if weight.requires_grad], lr=1.0)
    for _ in range(2):  # the first step reaches the last matrix only, which is zero
        net(torch.randint(3, len(words), (1, 50))).logits.square().mean().backward()
        optimizer.step()
    changed = {name for name, weight in net.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {f"model.layers.2.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    written = net.model.layers[2].mlp.down_proj.weight.abs().sum(1) > 0
    assert written.nonzero()[:, 0].tolist() == list(range(278, 288))


def test_weights_are_the_same_for_the_same_seed(words):
    first, second = _net(words).state_dict(), _net(words).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("shape", [{"heads": 4, "groups": 2}, {"hidden": 252}])
def test_another_shape_is_refused(words, shape):
    with pytest.raises(ValueError, match=r"\(3, 6, 3\) and at least 288"):
        _net(words, **shape)
