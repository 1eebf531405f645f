"""Languages: their tags, and the adapters that are for them."""
