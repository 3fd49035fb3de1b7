"""Peak memory of one case, and what fits under a cap on device memory, each in its own process."""
