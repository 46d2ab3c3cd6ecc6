"""Sampled attention for long contexts: keys are drawn by locality-sensitive hashing and weighted without bias.

The method is MagicPIG (arXiv 2410.16179). `attend` works on tensors, `attach` on transformers models.
"""

from magicpig.config import Config
from magicpig.functional import attend

__version__ = "0.1.0"
__all__ = ["Config", "attend"]
