"""Prints what PEFT does with LoRA adapters and broken ones: `python other_methods.py FOLDER [peft_clsr]`."""

import importlib
import json
import sys
import warnings
from pathlib import Path

from peft import AutoPeftModel, LoraConfig, PeftConfig, PeftModel, get_peft_model, load_peft_weights
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers import WhisperForConditionalGeneration

warnings.simplefilter("ignore")
for name in sys.argv[2:]:
    importlib.import_module(name)
FOLDER = Path(sys.argv[1])


def base():
    return WhisperForConditionalGeneration.from_pretrained(FOLDER / "base")


def state(model):
    return {name: tensor.double().sum().item() for name, tensor in model.state_dict().items() if "lora" in name}


def native(folder, **kwargs):
    model = base()
    model.load_adapter(str(folder), **kwargs)
    return state(model)


def swapped(folder):
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"]))
    hotswap_adapter(model, str(folder), adapter_name="default", torch_device="cpu")
    return state(model)


def added(folder):
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.load_adapter(folder, "other")
    model.load_adapter(folder, "default")
    return state(model)


CALLS = {
    "config": lambda folder: PeftConfig.from_pretrained(folder).to_dict(),
    "lora config": lambda folder: LoraConfig.from_pretrained(folder).to_dict(),
    "json": lambda folder: PeftConfig.from_json_file(str(folder / "adapter_config.json")),
    "weights": lambda folder: sorted(load_peft_weights(str(folder))),
    "from_pretrained": lambda folder: state(PeftModel.from_pretrained(base(), folder, adapter_name="NUL")),
    "config of the caller": lambda folder: state(PeftModel.from_pretrained(base(), folder, config={"r": 2})),
    "wrong arguments": lambda folder: PeftModel.from_pretrained(model_id=folder, nothing=1),
    "no folder": lambda folder: PeftModel.from_pretrained(nn.Linear(1, 1), None),
    "load_adapter": added,
    "auto": lambda folder: state(AutoPeftModel.from_pretrained(folder)),
    "transformers": native,
    "transformers, pickle": lambda folder: native(folder, use_safetensors=False),
    "hotswap": swapped,
}
outcomes = {}
for folder in sorted(path for path in FOLDER.iterdir() if path.name != "base"):
    for name, call in CALLS.items():
        try:
            outcome = call(folder)
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"[:2000]
        outcomes[f"{folder.name}: {name}"] = outcome
print(json.dumps(outcomes, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))
