"""A Hugging Face Space: the page of `peft-clsr app`. Push this folder to a Space, with your own two names."""

from pathlib import Path

from peft_clsr.app.page import find_examples, launch_page
from peft_clsr.app.recognizer import Recognizer

MODEL = "openai/whisper-base"
ADAPTERS = ["me/whisper-base-experts"]
EXAMPLES = Path("examples/metadata.csv")  # recordings with their text, if you have some

if __name__ == "__main__":
    examples = find_examples([str(EXAMPLES)]) if EXAMPLES.exists() else []
    launch_page(Recognizer(MODEL, ADAPTERS, [], max_seconds=300), examples)
