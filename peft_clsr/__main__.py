"""`python -m peft_clsr` is the command `peft-clsr`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
