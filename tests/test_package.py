import subprocess
import sys

import pytest

import magicpig


@pytest.mark.parametrize("name", magicpig.__all__)
def test_public_names_are_there(name):
    assert name in dir(magicpig)
    assert getattr(magicpig, name).__name__ == name


def test_no_other_names():
    with pytest.raises(AttributeError, match="module 'magicpig' has no attribute 'nonsense'"):
        _ = magicpig.nonsense


def test_the_command_starts_without_torch():
    program = "import sys, magicpig.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
