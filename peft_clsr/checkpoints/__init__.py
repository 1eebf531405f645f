"""Adapters as files: checks, guards around loaders of PEFT and transformers, hot-swapping, conversion. Not the Hub."""
