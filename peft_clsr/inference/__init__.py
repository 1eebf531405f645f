"""Using a model: `generate` by language."""
