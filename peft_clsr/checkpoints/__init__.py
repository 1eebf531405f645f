"""Adapters as files: checks before loading, guards around the loaders, hot-swapping, conversion. Not the Hub."""
