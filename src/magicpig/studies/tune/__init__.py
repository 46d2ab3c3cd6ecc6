"""Which settings a model needs, layer by layer, to stay within an error on a text at the least cost on this machine.

`measure.py` tries settings on the captured attention of a layer, `choose.py` decides, `plot.py` shows. The paper
(MagicPIG, arXiv 2410.16179) fixes one setting for all layers and names the layers that stay exact; here both follow
from what is measured.
"""

from magicpig.studies.tune.choose import Goal, LayerChoice, Tuning
from magicpig.studies.tune.measure import Measured, Trials, candidates

__all__ = ["Goal", "LayerChoice", "Measured", "Trials", "Tuning", "candidates"]
