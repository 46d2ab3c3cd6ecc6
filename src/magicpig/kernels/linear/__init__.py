"""The verb linear: a few vectors times a matrix of weights."""
