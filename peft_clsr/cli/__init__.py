"""The command `peft-clsr`: one module per command, and `main`, which calls them. The work itself is done elsewhere."""

from .main import main as main
