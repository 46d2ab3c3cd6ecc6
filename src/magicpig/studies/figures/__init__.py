"""The figures: measured on any model directory, drawn in one style, each with the numbers behind it.

`accuracy.py` asks the evaluation runner, `texts.py` captures attention for `anatomy.py` and `study.py`, `draw.py` turns
rows of numbers into pictures, in the looks of `style.py`.
"""
