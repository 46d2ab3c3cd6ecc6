"""What is kept of each sequence: rows and indexes, how much memory they will take, and how they outlive a process."""

from magicpig.store.store import KVStore

__all__ = ["KVStore"]
