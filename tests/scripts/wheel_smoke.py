"""Trains two steps, saves, loads and generates with runtime dependencies alone, on a tiny random Whisper."""

import tempfile

import torch
from peft import PeftModel, get_peft_model
from transformers import WhisperConfig, WhisperForConditionalGeneration

from peft_clsr import CLSRConfig, DistillationTrainer, DistillationTrainingArguments

SIZES = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
SIZES |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_source_positions": 50}


def build():
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig(**SIZES))
    model.generation_config.lang_to_id = {"<|ca|>": 50270}
    model.generation_config.task_to_id = {"transcribe": 50359}
    model.generation_config.is_multilingual = True
    model.generation_config.no_timestamps_token_id = 50363
    return model


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


features = torch.randn(4, 80, 100)
rows = [{"input_features": one, "labels": torch.randint(0, 50000, (6,))} for one in features]
model = get_peft_model(build(), CLSRConfig.paper(language="ca", gate_dim=8), adapter_name="ca")
with tempfile.TemporaryDirectory() as folder:
    args = DistillationTrainingArguments(folder, max_steps=2, per_device_train_batch_size=2, report_to="none")
    args.save_strategy = "no"
    trainer = DistillationTrainer(model=model, args=args, train_dataset=rows, data_collator=collate)
    assert trainer.train().training_loss > 0
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(build(), folder, subfolder="ca", adapter_name="ca").eval()
tokens = [
    one.eval().generate(input_features=features, language="ca", max_new_tokens=5, do_sample=False)
    for one in (model, loaded)
]
assert torch.equal(*tokens) and tokens[0].shape[0] == 4, tokens
print("trained, saved, loaded and generated")
