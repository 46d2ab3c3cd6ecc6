"""Attention of one layer over stores: what a step does, and exact attention of many tokens."""
