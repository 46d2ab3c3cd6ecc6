"""hash: vectors -> SimHash codes."""
