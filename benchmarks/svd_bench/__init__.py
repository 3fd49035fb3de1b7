"""Measures, compares, reports: latency and memory of every stage, against peers and against the hardware."""
