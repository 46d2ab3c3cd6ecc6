import os
import signal
from functools import partial

import pytest

from magicpig.studies.evaluation.workers import in_order


def divide(by):
    """What a process prepares: something that needs no model."""
    return partial(_divide, by)


def _divide(by, number):
    if number == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return number // by


def test_results_come_in_order():
    assert list(in_order(partial(divide, 2), range(12), 2)) == [number // 2 for number in range(12)]


def test_what_the_work_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        list(in_order(partial(divide, 0), range(3), 2))


def test_a_process_that_dies_is_noticed():
    with pytest.raises(MemoryError, match="one of 2 processes died"):
        list(in_order(partial(divide, 2), [13], 2))
