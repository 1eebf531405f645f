"""Train a tiny Whisper for two steps, save its adapter: `train_distributed.py OUTPUT BATCH_SIZE SKIP_GATE_PROB`."""

import sys
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import WhisperConfig, WhisperForConditionalGeneration

from peft_clsr import CLSRConfig, DistillationTrainer, DistillationTrainingArguments

LENGTHS = (3, 9, 4, 6, 2, 8, 5, 7)


def build_whisper(seed):
    torch.manual_seed(seed)
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_source_positions": 50}
    config = WhisperConfig(
        vocab_size=60, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=1, init_std=0.1, **sizes
    )
    return WhisperForConditionalGeneration(config)


def collate(rows):
    labels = torch.nn.utils.rnn.pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=-100)
    return {"input_features": torch.stack([row["input_features"] for row in rows]), "labels": labels}


def main(output, batch_size, skip_gate_prob):
    generator = torch.Generator().manual_seed(0)
    dataset = [
        {
            "input_features": torch.randn(80, 100, generator=generator),
            "labels": torch.randint(2, 60, (length,), generator=generator),
        }
        for length in LENGTHS
    ]
    quiet = {"gate_dropout": 0.0, "expert_dropout": 0.0, "gate_noise": 0.0, "gate_dim": 8}
    config = CLSRConfig(**quiet, skip_gate_prob=skip_gate_prob, gate_budget=1.0, budget_weight=2.0)
    model = get_peft_model(build_whisper(0), config, adapter_name="ca")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "clsr_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    args = DistillationTrainingArguments(
        output_dir=str(Path(output).parent / "trainer"),
        per_device_train_batch_size=batch_size,
        max_steps=2,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        ddp_find_unused_parameters=False,
        save_strategy="no",
        report_to="none",
        label_names=["labels"],
        use_cpu=True,
    )
    trainer = DistillationTrainer(
        model=model, teacher_model=build_whisper(1), args=args, train_dataset=dataset, data_collator=collate
    )
    trainer.train()
    if args.process_index == 0:
        weights = {name: p.detach().contiguous() for name, p in model.named_parameters() if "clsr_" in name}
        save_file(weights, output, metadata={"processes": str(args.world_size)})


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
