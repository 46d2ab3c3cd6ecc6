"""The figures: measured on any model directory, plotted in one style, each with the numbers behind it.

`accuracy.py` asks the evaluation runner, `texts.py` captures attention for `anatomy.py` and `study.py`, `plot.py` turns
rows of numbers into pictures, in the looks of `style.py`.
"""
