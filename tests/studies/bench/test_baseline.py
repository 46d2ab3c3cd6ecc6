import pytest
from rich.console import Console

from magicpig.cli.studies.bench_options import say_if_slow_baseline
from magicpig.studies.bench.baseline import flattery


@pytest.mark.parametrize(
    ("baselines", "said"),
    [
        ([], ""),
        ([(0.7, 1.0), (1.0, 0.9)], ""),
        ([(0.69, 1.0)], "at 0.69 of the speed of a plain read"),
        ([(4.2, 4.7), (16.1, 39.4)], "at 0.41 of the speed"),  # the worst of all is what counts
    ],
)
def test_a_slow_baseline_is_said(baselines, said):
    note = flattery(baselines)
    assert said in note
    assert bool(note) == bool(said)


def test_those_without_one_have_nothing_to_say(capsys):
    say_if_slow_baseline(Console(), [(None, 3.0), (1.0, None), (1.0, 1.0)])
    assert capsys.readouterr().out == ""
    say_if_slow_baseline(Console(width=200), [(None, 3.0), (1.0, 2.0)])
    assert "ratios to it flatter" in capsys.readouterr().out
