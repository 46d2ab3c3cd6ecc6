"""Training: stops and goes on to the same weights, refuses another run's checkpoint, and learns."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from magicpig.studies.pocket import lessons, train

TINY = train.Preset(288, 16, (train.Stage(96, 3, 5, 1e-3), train.Stage(160, 2, 3, 1e-3)))


@pytest.fixture(autouse=True)
def _save_often(monkeypatch):
    monkeypatch.setattr(train, "_SAVE_EVERY", 2)


class _StopError(Exception):
    pass


def test_a_stopped_run_ends_as_one_that_was_not(tmp_path):
    whole = train.train(tmp_path / "whole", TINY)

    def stop(progress):
        if progress.step == 4:
            raise _StopError

    with pytest.raises(_StopError):
        train.train(tmp_path / "stopped", TINY, report=stop)
    resumed = train.train(tmp_path / "stopped", TINY)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    logs = [(tmp_path / folder / "train.jsonl").read_text() for folder in ("whole", "stopped")]
    assert logs[0] == logs[1]


def test_another_seed_or_shape_is_refused(tmp_path):
    train.train(tmp_path, replace(TINY, stages=TINY.stages[:1]))
    with pytest.raises(ValueError, match="seed=0"):
        train.train(tmp_path, TINY, seed=1)
    with pytest.raises(ValueError, match="shape="):
        train.train(tmp_path, replace(TINY, intermediate=32))


def test_the_log_has_a_line_per_step(tmp_path):
    train.train(tmp_path, TINY)
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(8))
    assert [line["length"] for line in lines] == [96] * 5 + [160] * 3


def test_the_rate_warms_up_and_falls_from_stage_to_stage():
    preset = train.Preset(288, 16, (train.Stage(96, 3, 100, 1e-3), train.Stage(160, 2, 100, 4e-4)))
    rates = [preset.at(step)[1] for step in range(preset.steps)]
    assert rates[0] < rates[20] < rates[45]
    assert rates[99] == pytest.approx(4e-4, rel=0.05)
    assert rates[199] < 1e-5
    with pytest.raises(IndexError):
        preset.at(200)


def test_positions_rise_stay_in_reach_and_jump_between_sentences_of_the_text():
    stop = 7
    text = [1 if at % 10 else stop for at in range(200)]
    batch = [train.Lesson([*text, *[2] * 56], [], asked=200)] * 50
    positions = train._positions(batch, 256, stop, train.random.Random(0))
    steps = positions.diff(dim=1)
    assert (steps >= 1).all()
    assert positions.max() < train.FURTHEST + 256
    assert positions[:, -1].max() > 5000
    assert (positions[:, -1] == 255).float().mean() > 0.2
    assert {at % 10 for _, at in (steps > 1).nonzero().tolist()} == {0}
    assert (steps[:, 199:] == 1).all()


def test_any_word_is_right_in_place_of_a_word_and_one_token_of_the_form_in_its_place():
    form, scores = torch.tensor([1, 2]), torch.tensor([[0.0, 1.0, 2.0, 3.0, 1.5]])
    net = SimpleNamespace(lm_head=lambda hidden: hidden)
    p = scores[0].softmax(0)
    for right, expected, hit in (((0,), p[0] + p[3] + p[4], 0.0), ((0, 3), p[0] + p[3] + p[4], 1.0), ((2,), p[2], 0.0)):
        loss, hits = train._loss(net, scores[None], [(0, lessons.Target(0, right))], form)
        assert loss.item() == pytest.approx(-expected.log().item(), rel=1e-5)
        assert hits == hit


def test_a_saved_model_is_read_by_transformers(tmp_path):
    net = train.train(tmp_path / "run", replace(TINY, stages=TINY.stages[:1]))
    train.save(net, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    words = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.float32
    ids = words("What is the special magic number", return_tensors="pt").input_ids
    rounded = {name: w.half().float() for name, w in net.state_dict().items()}
    net.load_state_dict(rounded)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, net(ids).logits)
