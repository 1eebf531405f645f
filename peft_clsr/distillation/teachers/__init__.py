"""Teachers: what `Teacher` asks of any teacher, its forward pass, and its decoder states cached on disk."""
