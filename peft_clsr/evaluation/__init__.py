"""Measuring: transcripts, error rates, gate means, plots. Not training."""
