"""Many requests on one model at once: continuous batching over one packed forward pass.

`engine.py` is the story: its `step` schedules, runs, samples and finishes. Knows nothing of networks and servers.
"""
