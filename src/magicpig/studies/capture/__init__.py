"""Attention as it happens in a model, kept in a file: for tuning and testing samplers on real geometry.

`AttentionSet` is one layer of one request, captured (`record.py`) or made up (`bench/synthetic.py`).
"""

from magicpig.studies.capture.attention_set import AttentionSet
from magicpig.studies.capture.file import Capture, CaptureError, load_capture

__all__ = ["AttentionSet", "Capture", "CaptureError", "load_capture"]
