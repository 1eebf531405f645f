"""Languages on the Hub: push, pull, the record beside an adapter, the model card."""
