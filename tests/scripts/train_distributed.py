"""
Train adapters of a tiny Whisper for two steps and save them, on one or several processes of `accelerate launch`.

    train_distributed.py OUTPUT --batch_size 4 --skip_gate_prob 0.5 --languages ca uk
    train_distributed.py OUTPUT --windows PROCESSOR --stream
    DS_ACCELERATOR=cpu accelerate launch --multi_gpu --num_processes 2 train_distributed.py OUTPUT --zero_stage 2
"""

import argparse
import json
import os
from pathlib import Path

import datasets
import numpy as np
import torch
from peft import get_peft_model
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor

from peft_clsr import (
    CLSRConfig,
    DataCollatorSpeechSeq2SeqWithPadding,
    DistillationTrainer,
    DistillationTrainingArguments,
    pack_utterances,
)

LENGTHS = (3, 9, 4, 6, 2, 8, 5, 7)


def build_whisper(seed, vocab_size=60):
    torch.manual_seed(seed)
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_source_positions": 50}
    sizes |= {"vocab_size": vocab_size, "init_std": 0.1}
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 1}
    config = WhisperConfig(**sizes, **tokens)
    return WhisperForConditionalGeneration(config)


def build_student(languages, skip_gate_prob=0.0, gate_noise=0.0, vocab_size=60):
    quiet = {"gate_dropout": 0.0, "expert_dropout": 0.0, "gate_noise": gate_noise, "gate_dim": 8}
    config = {**quiet, "skip_gate_prob": skip_gate_prob, "budget_weight": 2.0}
    whisper = build_whisper(0, vocab_size)
    model = get_peft_model(whisper, CLSRConfig.paper(gate_budget=1.0, **config), adapter_name=languages[0])
    for language in languages[1:]:
        model.add_adapter(language, CLSRConfig.paper(gate_budget=0.1, **config))
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


def build_windows(languages, processor, stream):
    """Packed windows of eight utterances of noise, of a table or of a stream."""
    generator = np.random.default_rng(0)
    rows = [
        {
            "audio": {"array": generator.normal(0, 0.1, 2000 + 200 * length).astype(np.float32)},
            "transcription": "abc"[: 1 + length % 3] * 2,
            "language": languages[index % len(languages)],
        }
        for index, length in enumerate(LENGTHS)
    ]
    for row in rows:
        row["audio"]["sampling_rate"] = 16000
    recordings = datasets.Dataset.from_list(rows)
    recordings = recordings.to_iterable_dataset() if stream else recordings
    return pack_utterances(recordings, processor, max_seconds=0.5, timestamps=0, single=0.5)


def collate(rows):
    labels = torch.nn.utils.rnn.pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=-100)
    features = torch.stack([row["input_features"] for row in rows])
    return {"input_features": features, "labels": labels, "language": [row["language"] for row in rows]}


def deepspeed_config(stage):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, on processors
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,  # torch's own
        "zero_optimization": {"stage": stage},
    }


def main(arguments=None):
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
    parser.add_argument("--windows", help="folder of a processor: train on packed windows")
    parser.add_argument("--stream", action="store_true", help="train on a stream of them")
    parser.add_argument("--zero_stage", type=int, help="train with DeepSpeed")
    options = parser.parse_args(arguments)

    if options.windows is None:
        dataset, collator, size = build_dataset(options.languages), collate, 60
    else:
        processor = WhisperProcessor.from_pretrained(options.windows)
        dataset = build_windows(options.languages, processor, options.stream)
        collator, size = DataCollatorSpeechSeq2SeqWithPadding(processor), len(processor.tokenizer)
    languages = list(dict.fromkeys(options.languages))
    model = build_student(languages, options.skip_gate_prob, options.gate_noise, size)
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
        deepspeed=None if options.zero_stage is None else deepspeed_config(options.zero_stage),
    )
    trainer = DistillationTrainer(
        model=model,
        teacher_model=build_whisper(1, size),
        args=args,
        train_dataset=dataset,
        data_collator=collator,
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
