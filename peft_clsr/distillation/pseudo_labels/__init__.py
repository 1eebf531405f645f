"""Transcripts by a teacher, to train on."""
