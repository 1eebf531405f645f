"""A plain Whisper of a routed one."""
