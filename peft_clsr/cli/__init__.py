"""The command `peft-clsr`."""
