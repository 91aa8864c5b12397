"""Text in, token ids out: corpora, samplers, calibration sets."""
