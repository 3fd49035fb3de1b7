"""`svd-bench run` and `svd-bench ladder`: subjects timed in turns, stage by stage, rung by rung."""
