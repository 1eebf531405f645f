"""A page that shows what an expert changes."""
