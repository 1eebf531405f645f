"""Freezes routing: an FFN whose gate nearly always decides one way becomes a plain FFN."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import WhisperForConditionalGeneration

from ..data.collator import DataCollatorSpeechSeq2SeqWithPadding
from ..evaluation.error_rates import check_scorable, error_rates
from ..evaluation.gates import gate_means
from ..evaluation.transcripts import transcribe
from ..extras import require
from ..languages.adapters import adapter_prompts
from ..languages.tags import closest_tags, prompt_code
from ..whisper import FRAMES_PER_POSITION, POSITIONS_PER_SECOND, module_side
from .adapter import check_layers, copy_with_adapter, find_adapter
from .lora import FrozenExperts, expert_projection
from .plain_ffn import Decision, exclude_modules, replace_ffn, routed_projections
from .student import always_expert

_PREPARED_COLUMNS = ("input_features", "attention_mask", "labels", "text")


@dataclass(frozen=True)
class FrozenRouting:
    """
    The result of [`freeze_routing`].

    Args:
        model (`WhisperForConditionalGeneration` or `PeftModel`):
            The frozen model, in evaluation mode: a plain Whisper, or a `PeftModel` if a module is left routed.
        shares (`dict[str, float]`):
            Module to the share of tokens that its gate sends to the expert, in [0, 1], without padding, from
            [`gate_means`].
        padding_shares (`dict[str, float]`):
            The same for the padding after the audio, for the encoder's modules. Empty if there is no padding.
        decisions (`dict[str, str]`): Module to "expert", "shared" or "routed" (left as it was).
        before (`dict`): Error rates of the routed model on the dataset, from [`error_rates`].
        after (`dict`): Error rates of the frozen model.
        experts (`FrozenExperts`): The experts that are now in the model, for [`~FrozenRouting.save_as_lora`].
    """

    model: WhisperForConditionalGeneration | PeftModel
    shares: dict[str, float]
    padding_shares: dict[str, float]
    decisions: dict[str, Decision]
    before: dict[str, Any]
    after: dict[str, Any]
    experts: FrozenExperts = field(repr=False)

    def save_as_lora(self, folder: str | Path, rank: int | None = None) -> float:
        """
        Save the difference between the base model and the frozen one as a LoRA of PEFT.

        `PeftModel.from_pretrained(whisper, folder)` loads it onto the original base model, without this library. Each
        module that became the expert is a LoRA on its projections; one that became the shared FFN is not in it. A
        low-rank expert is exact: the logits are those of `model`. A full expert is approximated by a singular value
        decomposition (PEFT's `convert_to_lora`). Its biases are exact (`lora_bias`).

        Args:
            folder (`str` or `Path`): The folder to write: `adapter_config.json` and `adapter_model.safetensors`.
            rank (`int`, *optional*): Rank of the LoRA of full experts. Low-rank experts keep their own.

        Returns:
            `float`: the Frobenius norm of the error of all weights, divided by that of the experts' differences to the
            shared FFNs. 0 for low-rank experts.

        Raises:
            ValueError: modules are left routed, or all became the shared FFN; the adapter cut the context; `rank` is
                missing or too high for full experts, or another one than that of low-rank experts.

        Example:

        ```py
        >>> frozen.save_as_lora("whisper-ca-lora")
        >>> model = PeftModel.from_pretrained(whisper, "whisper-ca-lora").merge_and_unload()
        ```
        """
        self._check_decided("a LoRA")
        return self.experts.save(self.model, folder, rank)

    def student(self, model: PeftModel) -> PeftModel:
        """
        A copy of the routed model that always takes the experts, to train what freezing costs back.

        Modules that became the expert start with it; those that became the shared FFN start with a copy of that as
        their expert. So the student starts as the frozen model. Train it with [`DistillationTrainer`] and `model` as
        its teacher, and call [`freeze_routing`] on it.

        Args:
            model (`PeftModel`): The routed model that was frozen. It is copied, not changed.

        Returns:
            `PeftModel`: with one adapter, of the same name, whose gates stay on the expert in training, too.

        Raises:
            ValueError: modules are left routed, or `model` is another one than was frozen.

        Example:

        ```py
        >>> student = frozen.student(model)
        >>> trainer = DistillationTrainer(model=student, teacher_model=model, args=args, train_dataset=windows, ...)
        >>> trainer.train()
        >>> recovered = freeze_routing(student, "ca", dataset=dataset, processor=processor)
        ```
        """
        self._check_decided("a student")
        name = self.experts.adapter_name
        if not isinstance(model, PeftModel) or name not in model.peft_config:
            raise ValueError(f"the model has no adapter {name!r}: give the routed model that was frozen")
        if routed_projections(model.get_base_model(), name).keys() != self.decisions.keys():
            raise ValueError(
                f"adapter {name!r} of the model routes other modules than were frozen: give the model that was frozen"
            )
        return always_expert(copy_with_adapter(model, name), name, self.decisions)

    def _check_decided(self, what: str) -> None:
        routed = list(self.decisions.values()).count("routed")
        if routed:
            raise ValueError(
                f"{routed} of {len(self.decisions)} modules are left routed, and {what} has no gates: freeze them "
                "all, with freeze_routing(..., undecided='loss')"
            )


def freeze_routing(
    model: PeftModel,
    language: str,
    *,
    dataset: Any,
    processor: Any,
    threshold: float = 0.95,
    undecided: Literal["routed", "majority", "loss"] = "routed",
    batch_size: int = 8,
    max_new_tokens: int | None = None,
) -> FrozenRouting:
    """
    Replace each routed FFN by the FFN that its gate nearly always chooses, and measure the cost in error rates.

    A module whose gate sends at least `threshold` of the dataset's tokens to the expert becomes the expert. One that
    sends at most `1 - threshold` becomes the shared FFN. Both consist of plain `nn.Linear`s. In the encoder this must
    hold for the tokens of the audio and, separately, for those of the padding after it: Whisper attends to both.
    If all modules are decided, the result is a plain Whisper for one language, which saves, loads and converts as any
    other. If the adapter cut the context (`max_audio_seconds`), it stays cut.

    If modules are left routed, the result is a `PeftModel` whose adapter names the frozen modules in
    `exclude_modules`. The adapter belongs to the frozen base model, not to the original one. Save both, the adapter
    first: `model.save_pretrained("adapter")`, then `model.unload().save_pretrained("base")`.

    Args:
        model (`PeftModel`): A Whisper with CLSR adapters. It is copied, not changed.
        language (`str`): The language to keep: an adapter's name, or a language as in [`language_tag`].
        dataset (`datasets.Dataset`):
            Speech in that language, from `prepare_dataset` at the model's context. Gates and error rates are measured
            on it.
        processor (`WhisperProcessor`): Decodes the transcripts.
        threshold (`float`, *optional*, defaults to 0.95): Share of tokens that decides a module, in (0.5, 1].
        undecided (`str`, *optional*, defaults to `"routed"`):
            The other modules stay "routed"; or each becomes what the "majority" of its tokens takes, without padding;
            or what gives the lower "loss" on the dataset's transcripts. The loss is tried module by module, with two
            passes of teacher forcing for each.
        batch_size (`int`, *optional*, defaults to 8): Utterances per batch.
        max_new_tokens (`int`, *optional*): Longest transcript in tokens, as in [`transcribe`].

    Returns:
        [`FrozenRouting`]: the frozen model, the decision for each module, and error rates before and after.

    Raises:
        TypeError: `model` is no `PeftModel` around a Whisper, or `dataset` no `datasets.Dataset`.
        ValueError:
            `threshold` is outside (0.5, 1], or `undecided` is unknown; the language has no adapter; the adapter is not
            CLSR; the dataset is empty, lacks columns, has no transcript that can be scored, or has another language or
            context; FFNs are quantized or not in memory.

    Example:

    ```py
    >>> frozen = freeze_routing(model, "ca", dataset=dataset, processor=processor, undecided="loss")
    >>> rate = frozen.before["rate"]  # "wer", or "cer" for languages without spaces between words
    >>> print(f"{rate}: {frozen.before[rate]:.1%} routed, {frozen.after[rate]:.1%} frozen")
    >>> frozen.model.save_pretrained("whisper-ca")
    >>> processor.save_pretrained("whisper-ca")
    ```
    """
    if not 0.5 < threshold <= 1:
        raise ValueError(
            f"threshold is {threshold}, expected in (0.5, 1]: 0.95 freezes what sends 95 % of the tokens one way; "
            "undecided='loss' freezes the others too"
        )
    if undecided not in ("routed", "majority", "loss"):
        raise ValueError(f"undecided is {undecided!r}, expected 'routed', 'majority' or 'loss'")
    name, code = find_adapter(model, language)
    prompt = adapter_prompts(model.peft_config)[name] or prompt_code(code)
    check_layers(model, name)
    _check_dataset(dataset, code, model.config.max_source_positions)

    model = copy_with_adapter(model, name)
    config = model.peft_config[name]
    is_cut = model.base_model.routing.full_positions is not None

    def measure_errors(model: nn.Module, desc: str) -> dict[str, Any]:
        transcripts = transcribe(
            model,
            processor,
            dataset,
            code if isinstance(model, PeftModel) else prompt,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            desc=f"{code}: {desc}",
        )
        return error_rates(transcripts, dataset["text"], language=code)[code]

    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, language=code)
    shares = gate_means(model, dataset, collator, batch_size=batch_size)
    padding_shares = _padding_shares(model, dataset, collator, batch_size)
    before = measure_errors(model, "routed")

    base = model.get_base_model()
    projections = routed_projections(base, name)
    if undecided == "majority":
        decisions = {key: "expert" if share >= 0.5 else "shared" for key, share in shares.items()}
    else:
        decisions = {key: _decide([share, padding_shares.get(key, share)], threshold) for key, share in shares.items()}
    for key, decision in decisions.items():
        replace_ffn(base, projections[key], name, decision)
    if undecided == "loss":
        batches = DataLoader(dataset, batch_size=batch_size, collate_fn=collator)
        undecided_keys = [key for key, decision in decisions.items() if decision == "routed"]
        for key in tqdm(undecided_keys, desc=f"{code}: undecided modules"):
            losses = {}
            for decision in ("expert", "shared"):
                replace_ffn(base, projections[key], name, decision)
                losses[decision] = _loss(model, batches)
            decisions[key] = min(losses, key=losses.get)
            replace_ffn(base, projections[key], name, decisions[key])

    decided = [(key, layer, decisions[gate]) for gate, ffn in projections.items() for key, layer in ffn.items()]
    experts = FrozenExperts(
        projections={key: expert_projection(layer, name) for key, layer, kind in decided if kind == "expert"},
        adapter_name=name,
        config=copy.copy(config),
        base_name=config.to_dict()["base_model_name_or_path"] or base.name_or_path,
        is_cut=is_cut,
    )
    frozen = [key for key, _, kind in decided if kind != "routed"]
    model = _finish(model, name, frozen, is_plain="routed" not in decisions.values())
    after = measure_errors(model, "frozen") if frozen else before
    return FrozenRouting(model, shares, padding_shares, decisions, before, after, experts)


def _decide(shares: list[float], threshold: float) -> Decision:
    """The FFN that all `shares` of tokens agree on."""
    if min(shares) >= threshold:
        return "expert"
    return "shared" if max(shares) <= 1 - threshold else "routed"


def _padding_shares(
    model: PeftModel, dataset: Any, collator: DataCollatorSpeechSeq2SeqWithPadding, batch_size: int
) -> dict[str, float]:
    """Gate means of the encoder's modules over the padding after the audio. Empty if there is no padding."""
    if all(bool(mask[::FRAMES_PER_POSITION].all()) for mask in dataset["attention_mask"]):
        return {}

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor | list[str]]:
        batch = collator(examples)
        return batch | {"attention_mask": 1 - batch["attention_mask"]}

    shares = gate_means(model, dataset, collate, batch_size=batch_size)
    return {key: share for key, share in shares.items() if module_side(key) != "decoder"}


@torch.inference_mode()
def _loss(model: PeftModel, batches: DataLoader) -> float:
    """Mean cross-entropy per token of the transcripts, in nats."""
    total, tokens = 0.0, 0
    for batch in batches:
        features, labels = batch["input_features"].to(model.device, model.dtype), batch["labels"].to(model.device)
        count = int((labels != -100).sum())
        total += model(input_features=features, labels=labels).loss.item() * count
        tokens += count
    return total / tokens


def _finish(
    model: PeftModel, adapter_name: str, frozen: list[str], is_plain: bool
) -> WhisperForConditionalGeneration | PeftModel:
    """The model to return, whose projections `frozen` were replaced: a plain Whisper, or with the rest routed."""
    base, config = model.get_base_model(), model.peft_config[adapter_name]
    if frozen:  # it no longer is the model of that name
        base.name_or_path = base.config.name_or_path = ""
        config.base_model_name_or_path = None
    if is_plain:
        model.base_model.routing.full_positions = None  # unload() keeps the context cut then
        return model.unload().eval()
    exclude_modules(base, config, frozen)
    return model


def _check_dataset(dataset: Any, code: str, max_source_positions: int) -> None:
    """Raise an error for a dataset that is not prepared, is empty, or has another language or context."""
    if not isinstance(dataset, require("datasets").Dataset):
        raise TypeError(
            f"the dataset is a {type(dataset).__name__}, expected a datasets.Dataset as prepare_dataset gives"
        )
    missing = [column for column in _PREPARED_COLUMNS if column not in dataset.column_names]
    if missing:
        raise ValueError(f"the dataset has no {', '.join(missing)}: prepare it with prepare_dataset")
    if not len(dataset):
        raise ValueError("the dataset is empty: gates and error rates are measured on it, so give it some speech")
    if "language" in dataset.column_names:
        others = sorted(tag for tag in map(str, dataset.unique("language")) if not closest_tags(tag, [code]))
        if others:
            raise ValueError(
                f"the dataset has utterances of the languages {others} beside or instead of {code!r}: keep those of "
                f"{code!r} alone"
            )
    check_scorable(dataset["text"], code)
    frames, context = len(dataset[0]["input_features"][0]), FRAMES_PER_POSITION * max_source_positions
    if frames != context:
        raise ValueError(
            f"the dataset's features have {frames} frames and the model takes {context}: prepare it at the model's "
            f"context, set_audio_context(None, processor, {max_source_positions / POSITIONS_PER_SECOND:g})"
        )
