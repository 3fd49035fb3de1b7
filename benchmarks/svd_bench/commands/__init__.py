"""Groups of commands of `svd-bench`: arguments in, exit codes out."""
