"""
Train adapters of a tiny Whisper for two steps and save them, on one or several processes of `accelerate launch`.

    train_distributed.py OUTPUT --batch_size 4 --skip_gate_prob 0.5 --languages ca uk
"""

import argparse
import json
import os
from pathlib import Path

import torch
from peft import get_peft_model
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


def build_student(languages, skip_gate_prob=0.0, gate_noise=0.0):
    quiet = {"gate_dropout": 0.0, "expert_dropout": 0.0, "gate_noise": gate_noise, "gate_dim": 8}
    config = {**quiet, "skip_gate_prob": skip_gate_prob, "budget_weight": 2.0}
    model = get_peft_model(build_whisper(0), CLSRConfig(gate_budget=1.0, **config), adapter_name=languages[0])
    for language in languages[1:]:
        model.add_adapter(language, CLSRConfig(gate_budget=0.1, **config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "clsr_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def build_dataset(languages):
    """Example i has the language `languages[i % len(languages)]`."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_features": torch.randn(80, 100, generator=generator),
            "labels": torch.randint(2, 60, (length,), generator=generator),
            "language": languages[index % len(languages)],
        }
        for index, length in enumerate(LENGTHS)
    ]


def collate(rows):
    labels = torch.nn.utils.rnn.pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=-100)
    features = torch.stack([row["input_features"] for row in rows])
    return {"input_features": features, "labels": labels, "language": [row["language"] for row in rows]}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--skip_gate_prob", type=float, default=0.0)
    parser.add_argument("--optim", default="sgd")
    parser.add_argument("--max_steps", type=int, default=2)
    parser.add_argument("--languages", nargs="+", default=["ca"])
    parser.add_argument("--gate_noise", type=float, default=0.0)
    parser.add_argument("--resume_from_checkpoint")
    options = parser.parse_args()

    model = build_student(list(dict.fromkeys(options.languages)), options.skip_gate_prob, options.gate_noise)
    args = DistillationTrainingArguments(
        output_dir=str(options.output / "trainer"),
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        max_steps=options.max_steps,
        learning_rate=0.1,
        weight_decay=0.1,
        optim=options.optim,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="random" if options.gate_noise else "sequential",
        ddp_find_unused_parameters=False,
        logging_steps=1,
        save_strategy="steps",
        save_steps=1,
        report_to="none",
        disable_tqdm=True,
        label_names=["labels"],
        use_cpu=True,
    )
    trainer = DistillationTrainer(
        model=model,
        teacher_model=build_whisper(1),
        args=args,
        train_dataset=build_dataset(options.languages),
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=options.resume_from_checkpoint)
    trainer.save_model(str(options.output))
    if args.process_index == 0:
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        (options.output / "run.json").write_text(json.dumps({"processes": args.world_size, "logs": logs}))
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
    # Skip the interpreter's shutdown: it holds the GIL while torch 2.13 joins gloo's threads, which may wait for it.
    os._exit(0)
