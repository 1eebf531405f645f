"""`python -m peft_clsr` is the command `peft-clsr`, also for `accelerate launch -m peft_clsr train ...`."""

import sys

from .cli import main

sys.exit(main())
