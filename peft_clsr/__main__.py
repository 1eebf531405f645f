"""`python -m peft_clsr` is the command `peft-clsr`."""

from .cli import run_and_exit

if __name__ == "__main__":
    run_and_exit()
