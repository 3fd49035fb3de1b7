"""Makes artefacts from checkpoints: ONNX bundles, and the proof that they equal torch."""
