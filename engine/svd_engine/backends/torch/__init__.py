"""Checkpoints in torch: eager, and torch.compile."""
