"""Static ranges calibrated over many batches: one file an observer."""
