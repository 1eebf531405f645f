"""Adapters as files: checks, guards around the loaders of PEFT and transformers, hot-swapping, conversion. Not the Hub."""
