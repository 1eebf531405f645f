"""No way of saving writes an adapter that no loader accepts: one with NaN, or a pickle."""

import pytest
from helpers import SMALL, random_clsr
from peft import LoraConfig, get_peft_model
from training import collate, make_args, make_dataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from peft_clsr import CLSRConfig, save_language


def peft_model(base, **config):
    return get_peft_model(base, CLSRConfig.paper(**SMALL, **config), adapter_name="ca")


def transformers_model(base, **config):
    base.add_adapter(CLSRConfig.paper(**SMALL, **config), "ca")
    return base


def by_save_pretrained(model, folder):
    model.save_pretrained(folder)


def by_state_dict(model, folder):
    """As Trainer does under FSDP."""
    model.save_pretrained(folder, state_dict=model.state_dict())


def by_save_language(model, folder):
    save_language(model, folder, "ca")


def by_checkpoint_of_trainer(model, folder):
    args = make_args(Seq2SeqTrainingArguments, folder, max_steps=1, save_strategy="steps", save_steps=1)
    Seq2SeqTrainer(model, args, train_dataset=make_dataset(), data_collator=collate).train()


@pytest.mark.parametrize(
    ("make", "save"),
    [
        (peft_model, by_save_pretrained),
        (peft_model, by_state_dict),
        (peft_model, by_save_language),
        (peft_model, by_checkpoint_of_trainer),
        (transformers_model, by_save_pretrained),
        (transformers_model, by_state_dict),
        (transformers_model, by_checkpoint_of_trainer),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_never_saved(tiny_whisper, tmp_path, make, save, value):
    model = make(tiny_whisper())
    name, weight = next((name, p) for name, p in model.named_parameters() if "decoder.layers.1.fc2.clsr_exp" in name)
    weight.data.flatten()[3] = value
    with pytest.raises(ValueError, match="NaN or infinite") as raised:
        save(model, tmp_path / "out")
    # A step of training spreads it: then the first tensor is named.
    assert (".ca." if save is by_checkpoint_of_trainer else f"tensor {name!r}") in str(raised.value)
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(("adapter", "checkpoint", "README"))]


def test_modules_to_save_are_checked_too(tiny_whisper, tmp_path):
    model = peft_model(tiny_whisper(), modules_to_save=["conv1"])
    model.get_base_model().model.encoder.conv1.modules_to_save["ca"].bias.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"conv1\.modules_to_save\.ca\.bias"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_adapters_that_are_saved_are_checked_and_no_others(tiny_whisper, tmp_path):
    model = random_clsr(tiny_whisper(), "ca", "uk")
    next(p for name, p in model.named_parameters() if ".uk." in name).data.fill_(float("nan"))
    model.save_pretrained(tmp_path, selected_adapters=["ca"])
    assert (tmp_path / "ca" / "adapter_model.safetensors").is_file() and not (tmp_path / "uk").exists()


@pytest.mark.parametrize("make", [peft_model, transformers_model])
def test_a_pickle_is_refused_with_the_remedy(tiny_whisper, tmp_path, make):
    model = make(tiny_whisper())
    with pytest.raises(ValueError, match="safe_serialization=False.*leave it out"):
        model.save_pretrained(tmp_path / "out", safe_serialization=False)
    assert not (tmp_path / "out").exists()


def test_other_models_are_saved_as_ever(tiny_whisper, tmp_path):
    lora = get_peft_model(tiny_whisper(), LoraConfig(r=2, target_modules=["fc1"]))
    next(p for name, p in lora.named_parameters() if "lora_A" in name).data.fill_(float("nan"))
    lora.save_pretrained(tmp_path / "lora", safe_serialization=False)
    assert (tmp_path / "lora" / "adapter_model.bin").is_file()
    base = tiny_whisper()
    base.proj_out.weight.data.fill_(float("nan"))
    base.save_pretrained(tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors").is_file()
