"""pytest on another build of the compiled module: `python .ci/with_native.py PATH/_native.abi3.so tests/kernels`."""

import importlib.util
import sys

import pytest

NAME = "magicpig.kernels._native"

path, *arguments = sys.argv[1:]
spec = importlib.util.spec_from_file_location(NAME, path)
assert spec is not None
assert spec.loader is not None
# Already there when the package looks for it.
sys.modules[NAME] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[NAME])
sys.exit(pytest.main(arguments))
