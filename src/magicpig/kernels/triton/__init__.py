"""Verbs of a step for accelerators, in Triton: each is the twin of one beside, on tensors that lie on a device.

hash.py, sketch.py, draw.py and attend.py, in the order in which a step calls them. The same whole numbers give the same
integer weights and the same sample as on the processor, bit for bit. Needs the extra `gpu`; import this package where a
device is asked for, not before. Triton's interpreter, TRITON_INTERPRET=1 before anything imports Triton, runs all of it
on a processor, for tests.

Axes beside the usual ones: U units, each the group of one key/value head of one sequence; S rows of a sample, at most.
"""

from magicpig.kernels.triton.attend import attend, merge
from magicpig.kernels.triton.draw import Drawn, draw, weigh_rows
from magicpig.kernels.triton.hash import hash_vectors
from magicpig.kernels.triton.sketch import Weighed, sketch_keys, weigh

__all__ = [
    "Drawn",
    "Weighed",
    "attend",
    "draw",
    "hash_vectors",
    "merge",
    "sketch_keys",
    "weigh",
    "weigh_rows",
]
