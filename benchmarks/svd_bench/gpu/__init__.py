"""`svd-bench gpu-check`: every CUDA path checked and measured within minutes."""
