"""rows: keys and values as a store keeps them, in floats or in bytes."""
