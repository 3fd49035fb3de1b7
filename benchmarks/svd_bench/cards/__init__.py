"""GPUs by memory tier, the work of a video, and its latency predicted on cards that are not here."""
