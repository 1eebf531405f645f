"""A Hugging Face Space: the page of `peft-clsr app`. Push this folder to a Space, with your own two names."""

import os
import sys
from pathlib import Path

MODEL = "openai/whisper-base"
ADAPTERS = ["me/whisper-base-experts"]
EXAMPLES = Path("examples/metadata.csv")  # recordings with their text, if you have some

if __name__ == "__main__":
    command = ["app", "--model", MODEL, "--adapters", *ADAPTERS, "--max_seconds", "300"]
    command += ["--host", "0.0.0.0", "--port", "7860"]  # where a Space expects it
    if EXAMPLES.exists():
        command += ["--examples", str(EXAMPLES)]
    os.execv(sys.executable, [sys.executable, "-m", "peft_clsr", *command])
