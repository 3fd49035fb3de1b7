"""Command `svd-engine`: arguments in, progress and exit codes out; what the other commands share."""
