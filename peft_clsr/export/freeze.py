"""Freezes routing: each FFN whose gate nearly always decides one way becomes that one FFN."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import WhisperForConditionalGeneration

from ..data.collator import DataCollatorSpeechSeq2SeqWithPadding
from ..evaluation.error_rates import error_rates
from ..evaluation.gates import gate_means
from ..evaluation.transcripts import transcribe
from ..extras import require
from ..languages import adapter_of_language, language_code
from ..tuner.config import CLSRConfig
from ..tuner.layer import CLSRLayer
from ..tuner.model import CLSRModel
from ..whisper import FRAMES_PER_POSITION, POSITIONS_PER_SECOND, module_side, position_mask

_COLUMNS = ("input_features", "attention_mask", "labels", "text")


@dataclass(frozen=True)
class FrozenRouting:
    """
    The result of [`freeze_routing`].

    Args:
        model (`WhisperForConditionalGeneration` or `PeftModel`):
            The frozen model, in evaluation mode: a plain Whisper, or a `PeftModel` if a module stays routed.
        shares (`dict[str, float]`):
            Share of tokens that each module's gate sends to the expert, in [0, 1], without padding, from
            [`gate_means`].
        padding_shares (`dict[str, float]`):
            The same for the padding after the audio, for the encoder's modules. Empty if there is no padding.
        decisions (`dict[str, str]`): What each module became: "expert", "shared", or "routed" as before.
        before (`dict`): Error rates of the routed model on the dataset, as in [`error_rates`].
        after (`dict`): The same for the frozen model.
    """

    model: WhisperForConditionalGeneration | PeftModel
    shares: dict[str, float]
    padding_shares: dict[str, float]
    decisions: dict[str, Literal["expert", "shared", "routed"]]
    before: dict[str, float | int]
    after: dict[str, float | int]


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
    Replace each routed FFN by the path that its gate nearly always chooses, and measure the cost.

    A module whose gate sends at least `threshold` of the dataset's tokens to the expert becomes the expert. One that
    sends at most `1 - threshold` becomes the shared FFN. Both consist of plain `nn.Linear`s. In the encoder this must
    hold for the tokens of the audio and for those of the padding separately, as Whisper attends to both. If all
    modules are decided, the model needs this library no more: it saves, loads and converts like any Whisper, for one
    language. A context that the adapter cut (`max_audio_seconds`) stays cut.

    If modules stay routed, the model is a `PeftModel` whose adapter lists the frozen ones in `exclude_modules`. It
    belongs to the frozen base, not to the original one. Save both, the adapter first, as in
    `model.save_pretrained("adapter")` and `model.unload().save_pretrained("base")`.

    Args:
        model (`PeftModel`): A Whisper with CLSR adapters. It is not changed: the work is done on a copy.
        language (`str`): The language to keep: an adapter's name, or a code or English name of a Whisper language.
        dataset (`datasets.Dataset`):
            Speech in that language from [`prepare_dataset`], at the model's context. Modules are decided, and error
            rates measured, on it.
        processor (`WhisperProcessor`): Decodes the transcripts.
        threshold (`float`, *optional*, defaults to 0.95): The share that decides a module, in (0.5, 1].
        undecided (`str`, *optional*, defaults to `"routed"`):
            What the other modules become: they stay "routed"; or each becomes the path of the "majority" of its
            tokens, without padding; or the path with the lower "loss" on the dataset's transcripts, one module after
            the other, with two passes of teacher forcing each.
        batch_size (`int`, *optional*, defaults to 8): Utterances at a time.
        max_new_tokens (`int`, *optional*): Longest transcript in tokens, as in [`transcribe`].

    Returns:
        [`FrozenRouting`]: the frozen model, the decision for each module, and error rates before and after.

    Raises:
        TypeError: `model` is no `PeftModel` around a Whisper, or `dataset` no `datasets.Dataset`.
        ValueError:
            A threshold outside of (0.5, 1], or an unknown `undecided`; a language without an adapter; an adapter of
            another method; a dataset that is empty, lacks columns, or has another language or context; FFNs that are
            quantized or not in memory.

    Example:

    ```py
    >>> frozen = freeze_routing(model, "ca", dataset=dataset, processor=processor, undecided="loss")
    >>> print(f"WER {frozen.before['wer']:.1%} routed, {frozen.after['wer']:.1%} frozen")
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
    name, code = _adapter(model, language)
    _check_layers(model, name)
    _check_dataset(dataset, code, model.config.max_source_positions)

    model = copy.deepcopy(model)
    model.base_model.enable_adapter_layers()
    model.set_adapter(name)
    for other in set(model.peft_config) - {name}:
        model.delete_adapter(other)
    model.eval()

    def measure(model: nn.Module, desc: str) -> dict[str, float | int]:
        transcripts = transcribe(
            model,
            processor,
            dataset,
            code,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            desc=f"{code}: {desc}",
        )
        return error_rates(transcripts, dataset["text"], language=code)[code]

    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, language=code)
    shares = gate_means(model, dataset, collator, batch_size=batch_size)
    padding_shares = _padding_shares(model, dataset, collator, batch_size)
    before = measure(model, "routed")

    base, projections = model.get_base_model(), _projections(model.get_base_model(), name)
    decisions = {key: _decision([share, padding_shares.get(key, share)], threshold) for key, share in shares.items()}
    if undecided == "majority":
        decisions = {key: "expert" if share >= 0.5 else "shared" for key, share in shares.items()}
    for key, kind in decisions.items():
        _replace(base, projections[key], name, kind)
    if undecided == "loss":
        batches = DataLoader(dataset, batch_size=batch_size, collate_fn=collator)
        for key in tqdm(
            [key for key, kind in decisions.items() if kind == "routed"], desc=f"{code}: undecided modules"
        ):
            losses = {}
            for kind in ("expert", "shared"):
                _replace(base, projections[key], name, kind)
                losses[kind] = _loss(model, batches)
            decisions[key] = min(losses, key=losses.get)
            _replace(base, projections[key], name, decisions[key])

    frozen = [key for gate, kind in decisions.items() if kind != "routed" for key in projections[gate]]
    model = _finish(model, name, frozen, is_plain="routed" not in decisions.values())
    after = measure(model, "frozen") if frozen else before
    return FrozenRouting(model, shares, padding_shares, decisions, before, after)


def _decision(shares: list[float], threshold: float) -> Literal["expert", "shared", "routed"]:
    if min(shares) >= threshold:
        return "expert"
    return "shared" if max(shares) <= 1 - threshold else "routed"


def _padding_shares(
    model: PeftModel, dataset: Any, collator: DataCollatorSpeechSeq2SeqWithPadding, batch_size: int
) -> dict[str, float]:
    """The gate means of the encoder's modules over the padding after the audio."""
    if all(bool(position_mask(mask[None]).all()) for mask in dataset["attention_mask"]):
        return {}

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor | list[str]]:
        batch = collator(examples)
        return batch | {"attention_mask": 1 - batch["attention_mask"]}

    shares = gate_means(model, dataset, collate, batch_size=batch_size)
    return {key: share for key, share in shares.items() if module_side(key) != "decoder"}


@torch.inference_mode()
def _loss(model: PeftModel, batches: DataLoader) -> float:
    """The mean cross-entropy over the tokens of the transcripts."""
    total, tokens = 0.0, 0
    for batch in batches:
        features, labels = batch["input_features"].to(model.device, model.dtype), batch["labels"].to(model.device)
        count = int((labels != -100).sum())
        total += model(input_features=features, labels=labels).loss.item() * count
        tokens += count
    return total / tokens


@torch.no_grad()
def _replace(
    base: nn.Module,
    projections: dict[str, CLSRLayer],
    adapter_name: str,
    kind: Literal["expert", "shared", "routed"],
) -> None:
    """Set the projections of one FFN, by name, in the model: the expert's, the shared FFN's, or the routed ones."""
    for key, layer in projections.items():
        parent, _, attribute = key.rpartition(".")
        projection = layer
        if kind == "expert":
            projection = _expert(layer, adapter_name)
        elif kind == "shared":
            projection = layer.get_base_layer()
        setattr(base.get_submodule(parent), attribute, projection)


def _finish(
    model: PeftModel, adapter_name: str, frozen: list[str], is_plain: bool
) -> WhisperForConditionalGeneration | PeftModel:
    """The model to return, after its projections `frozen` were replaced."""
    base, config = model.get_base_model(), model.peft_config[adapter_name]
    if frozen:  # the name is that of another model
        base.name_or_path = base.config.name_or_path = ""
        config.base_model_name_or_path = None
    if is_plain:
        model.base_model.routing.full_positions = None  # the context stays what the expert was trained at
        return model.unload().eval()
    _exclude(base, config, frozen)
    return model


def _expert(layer: CLSRLayer, adapter_name: str) -> nn.Linear:
    """The expert's projection in `layer`, as a plain linear layer in the precision of the shared one."""
    shared = layer.get_base_layer()
    if adapter_name in layer.clsr_expert:
        expert = layer.clsr_expert[adapter_name]
        weight, bias = expert.weight, expert.bias
    else:
        A, B = layer.clsr_expert_A[adapter_name].weight, layer.clsr_expert_B[adapter_name].weight
        weight, bias = B.float() @ A.float() + shared.weight, shared.bias
    linear = copy.deepcopy(shared)  # its device, precision and mode
    linear.weight.copy_(weight)
    if bias is not None:
        linear.bias.copy_(bias)
    return linear


def _exclude(base: nn.Module, config: CLSRConfig, keys: list[str]) -> None:
    """Add modules to the `exclude_modules` of an adapter's config."""
    excluded = config.exclude_modules or ()
    if isinstance(excluded, str):  # names replace the expression: with names in it, it could not be loaded
        all_targets = copy.copy(config)
        all_targets.exclude_modules = None
        excluded = [
            key
            for key, _ in base.named_modules()
            if re.fullmatch(excluded, key) and CLSRModel._check_target_module_exists(all_targets, key)
        ]
    config.exclude_modules = {*excluded, *keys}


def _projections(base: nn.Module, adapter_name: str) -> dict[str, dict[str, CLSRLayer]]:
    """The routed projections of an adapter, by the name of the gate's owner, and by their own name."""
    projections: dict[str, dict[str, CLSRLayer]] = {}
    for key, module in base.named_modules():
        if isinstance(module, CLSRLayer) and adapter_name in module.clsr_config:
            projections.setdefault(module.route.name, {})[key] = module
    return projections


def _adapter(model: Any, language: str) -> tuple[str, str]:
    """The name of the adapter of a language, and the language's code."""
    if not isinstance(model, PeftModel) or not isinstance(model.get_base_model(), WhisperForConditionalGeneration):
        inside = f" around a {type(model.get_base_model()).__name__}" if isinstance(model, PeftModel) else ""
        raise TypeError(
            f"the model is a {type(model).__name__}{inside}, expected a PeftModel around a "
            "WhisperForConditionalGeneration: load the adapter with PeftModel.from_pretrained(whisper, ...)"
        )
    if not isinstance(model.base_model, CLSRModel):
        kinds = ", ".join(f"{name} ({config.peft_type.value})" for name, config in model.peft_config.items())
        raise ValueError(
            f"the model has no CLSR layers to freeze, its adapters are: {kinds}. Merge those of other methods with "
            "model.merge_and_unload()"
        )
    name = adapter_of_language(model.peft_config, language)
    return name, model.peft_config[name].language or language_code(language)


def _check_layers(model: PeftModel, adapter_name: str) -> None:
    for projections in _projections(model.get_base_model(), adapter_name).values():
        for key, layer in projections.items():
            base_layer = layer.get_base_layer()
            weight = base_layer.weight.detach()
            if type(base_layer) is not nn.Linear or type(weight) is not torch.Tensor or weight.is_meta:
                kind = "on the meta device" if weight.is_meta else f"a {type(base_layer).__name__} of {weight.dtype}"
                raise ValueError(
                    f"the shared projection {key!r} is {kind}, expected an nn.Linear with its weight in memory: load "
                    "the base model without quantization and offloading, and the adapter onto it"
                )


def _check_dataset(dataset: Any, code: str, max_source_positions: int) -> None:
    datasets = require("datasets")
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(f"the dataset is a {type(dataset).__name__}, expected a datasets.Dataset from prepare_dataset")
    missing = [column for column in _COLUMNS if column not in dataset.column_names]
    if missing:
        raise ValueError(f"the dataset has no {', '.join(missing)}: prepare it with prepare_dataset")
    if not len(dataset):
        raise ValueError("the dataset is empty: measuring gates and error rates needs speech")
    if "language" in dataset.column_names:
        others = sorted({str(language) for language in dataset.unique("language")} - {code})
        if others:
            raise ValueError(
                f"the dataset has utterances of the languages {others} beside or instead of {code!r}, whose gates are "
                f"measured: give it only those of {code!r}"
            )
    frames, context = len(dataset[0]["input_features"][0]), FRAMES_PER_POSITION * max_source_positions
    if frames != context:
        raise ValueError(
            f"the dataset's features have {frames} frames and the model takes {context}: prepare it at the model's "
            f"context, set_audio_context(None, processor, {max_source_positions / POSITIONS_PER_SECOND:g})"
        )
