"""Data, arguments and models for tests of training, so small that a step takes milliseconds."""

import torch

from peft_clsr import DistillationTrainer, DistillationTrainingArguments

PARTS = ("ce_loss", "kd_loss", "budget_loss", "gate_mean")


def make_dataset(size=8, lengths=(5,), vocabulary=24, seed=0, languages=None):
    """Utterance i has `lengths[i % len(lengths)]` label tokens and the language `languages[i % len(languages)]`."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_features": torch.randn(80, 100, generator=generator),
            "labels": torch.randint(0, vocabulary, (lengths[i % len(lengths)],), generator=generator),
            **({} if languages is None else {"language": languages[i % len(languages)]}),
        }
        for i in range(size)
    ]


def collate(rows):
    labels = torch.nn.utils.rnn.pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=-100)
    batch = {"input_features": torch.stack([row["input_features"] for row in rows]), "labels": labels}
    if "attention_mask" in rows[0]:
        batch["attention_mask"] = torch.stack([row["attention_mask"] for row in rows])
    return {**batch, "language": [row["language"] for row in rows]} if "language" in rows[0] else batch


def make_uneven_dataset():
    """Four utterances of unequal audio and labels."""
    dataset = make_dataset(size=4, lengths=(2, 9, 4, 5))
    for row, length in zip(dataset, (100, 20, 60, 30), strict=True):
        row["attention_mask"] = (torch.arange(100) < length).long()
    return dataset


def make_args(cls, folder, **kwargs):
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "use_cpu": True,
        "seed": 0,
    }
    return cls(**{**defaults, **kwargs})


def distiller(model, teacher, folder, dataset=None, eval_dataset=None, callbacks=None, **kwargs):
    return DistillationTrainer(
        model=model,
        teacher_model=teacher,
        args=make_args(DistillationTrainingArguments, folder, **kwargs),
        train_dataset=make_dataset() if dataset is None else dataset,
        eval_dataset=eval_dataset,
        data_collator=collate,
        callbacks=callbacks,
    )


def adapter_weights(model, language=None):
    """Copies of the weights of all adapters, or of one language's."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if "clsr_" in name}
    return {name: p for name, p in weights.items() if language is None or f".{language}." in name}


def base_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "clsr_" not in name}
