"""Pixels in, videos out.  Knows no networks."""
