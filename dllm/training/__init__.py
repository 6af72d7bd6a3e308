"""Training: one loop for every algorithm, resumable at any moment, the same on any number of devices."""
