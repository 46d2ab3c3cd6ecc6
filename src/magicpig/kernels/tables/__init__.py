"""tables: codes -> buckets -> sampled ids."""
