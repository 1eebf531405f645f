"""Recordings and transcripts in, batches out. Nothing about models."""
