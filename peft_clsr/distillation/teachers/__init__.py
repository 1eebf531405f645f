"""The teacher: its forward pass, and its decoder states cached on disk."""
