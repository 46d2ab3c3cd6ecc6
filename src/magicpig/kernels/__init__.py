"""The verbs of the algorithm, hash, build, lookup, attend and merge, the slow and obvious version first."""
