"""TensorRT plans of both flavours."""
