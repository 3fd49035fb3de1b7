"""`svd-bench quality`: metrics of videos of photographs that the checkpoint never saw."""
