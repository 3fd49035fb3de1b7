"""`svd-bench compiled` and `forms`: what TensorRT's compiler makes of a bundle's graphs."""
