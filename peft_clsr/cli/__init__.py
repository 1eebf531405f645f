"""The command `peft-clsr`: one module per command, and `main`, which calls them. The work itself is done elsewhere."""

from .main import main as main
from .main import run_and_exit as run_and_exit
