"""A Whisper without routing: each FFN whose gate nearly always decides one way becomes that one FFN."""

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
from ..languages import adapter_of_language, language_code
from ..tuner.config import CLSRConfig
from ..tuner.layer import CLSRLayer
from ..tuner.model import CLSRModel

_COLUMNS = ("input_features", "attention_mask", "labels", "text")


@dataclass(frozen=True)
class FrozenRouting:
    """
    What [`freeze_routing`] gives.

    Args:
        model (`WhisperForConditionalGeneration` or `PeftModel`):
            The frozen model, in evaluation mode: a plain Whisper, or a `PeftModel` where a module is left routed.
        shares (`dict[str, float]`):
            Share of tokens that each module's gate sends to the expert, in [0, 1], without padding: what
            [`~evaluation.gate_means`] gives.
        padding_shares (`dict[str, float]`):
            The same of the padding after the audio, for the encoder's modules; empty where there is none.
        became (`dict[str, str]`): What each of these modules became: "expert", "shared", or "routed" as before.
        before (`dict`): Error rates of the routed model on the dataset, as [`~evaluation.error_rates`] gives them.
        after (`dict`): The same of the frozen model.
    """

    model: WhisperForConditionalGeneration | PeftModel
    shares: dict[str, float]
    padding_shares: dict[str, float]
    became: dict[str, Literal["expert", "shared", "routed"]]
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
    Replace routed FFNs by the one that their gates nearly always choose, and measure what that costs.

    A module whose gate sends at least `threshold` of the dataset's tokens to the expert becomes the expert, one that
    sends at most `1 - threshold` becomes the shared FFN, each of plain `nn.Linear`s. In the encoder this must be true
    of the tokens of the audio and of those of the padding after it, each for themselves: Whisper attends to both.
    Where all modules are decided, nothing of this library is left: the model saves, loads and converts as any Whisper.
    It is for one language then. A context that the adapter cut (`max_audio_seconds`) stays cut in it.

    Where modules are left routed, the model is a `PeftModel` whose adapter names the frozen ones in `exclude_modules`.
    It belongs to the frozen base, not to the original one: save both, the adapter first, as in
    `model.save_pretrained("adapter")` and `model.unload().save_pretrained("base")`.

    Args:
        model (`PeftModel`): A Whisper with CLSR adapters, which stays as it is: all is done on a copy.
        language (`str`): The language to keep: an adapter's name, or a code or English name of a Whisper language.
        dataset (`datasets.Dataset`):
            Speech in that language that `prepare_dataset` prepared at the model's context. It decides what is frozen,
            and it is what error rates are measured on.
        processor (`WhisperProcessor`): Decodes the transcripts.
        threshold (`float`, *optional*, defaults to 0.95): When a module is decided, in (0.5, 1].
        undecided (`str`, *optional*, defaults to `"routed"`):
            What becomes of the other modules: they stay "routed"; or each becomes what the "majority" of its tokens
            takes, those of padding left out; or the one with the lower "loss" on the dataset's transcripts, tried one
            after the other, which takes two passes of teacher forcing for each.
        batch_size (`int`, *optional*, defaults to 8): Utterances at a time.
        max_new_tokens (`int`, *optional*): Longest transcript in tokens, as in [`~evaluation.transcribe`].

    Returns:
        [`FrozenRouting`]: the frozen model, what became of each module, and error rates before and after.

    Raises:
        TypeError: `model` is no `PeftModel` around a Whisper, or `dataset` no `datasets.Dataset`.
        ValueError:
            A threshold outside of (0.5, 1], or another word for `undecided`; a language without an adapter; an adapter
            that is not CLSR; a dataset that is empty, lacks columns, or has another language or context; FFNs that are
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
    became = {key: _decision([share, padding_shares.get(key, share)], threshold) for key, share in shares.items()}
    if undecided == "majority":
        became = {key: "expert" if share >= 0.5 else "shared" for key, share in shares.items()}
    for key, kind in became.items():
        _replace(base, projections[key], name, kind)
    if undecided == "loss":
        batches = DataLoader(dataset, batch_size=batch_size, collate_fn=collator)
        for key in tqdm([key for key, kind in became.items() if kind == "routed"], desc=f"{code}: undecided modules"):
            losses = {}
            for kind in ("expert", "shared"):
                _replace(base, projections[key], name, kind)
                losses[kind] = _loss(model, batches)
            became[key] = min(losses, key=losses.get)
            _replace(base, projections[key], name, became[key])

    frozen = [key for gate, kind in became.items() if kind != "routed" for key in projections[gate]]
    model = _finish(model, name, frozen, is_plain="routed" not in became.values())
    after = measure(model, "frozen") if frozen else before
    return FrozenRouting(model, shares, padding_shares, became, before, after)


def _decision(shares: list[float], threshold: float) -> Literal["expert", "shared", "routed"]:
    if min(shares) >= threshold:
        return "expert"
    return "shared" if max(shares) <= 1 - threshold else "routed"


def _padding_shares(
    model: PeftModel, dataset: Any, collator: DataCollatorSpeechSeq2SeqWithPadding, batch_size: int
) -> dict[str, float]:
    """Gate means of the encoder's modules over the padding after the audio."""
    if all(bool(mask[::2].all()) for mask in dataset["attention_mask"]):  # a token of the encoder is two frames
        return {}

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor | list[str]]:
        batch = collator(examples)
        return batch | {"attention_mask": 1 - batch["attention_mask"]}

    shares = gate_means(model, dataset, collate, batch_size=batch_size)
    return {key: share for key, share in shares.items() if "decoder" not in key.split(".")}


@torch.inference_mode()
def _loss(model: PeftModel, batches: DataLoader) -> float:
    """The mean cross-entropy of the transcripts' tokens."""
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
    """Put the projections of one FFN, by name, into the model: the expert's, the shared FFN's, or as they were."""
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
    """What is returned of a model whose projections `frozen` were replaced."""
    base, config = model.get_base_model(), model.peft_config[adapter_name]
    if frozen:  # it is not the model of that name any more
        base.name_or_path = base.config.name_or_path = ""
        config.base_model_name_or_path = None
    if is_plain:
        model.base_model.routing.full_positions = None  # the context stays what the expert was trained at
        return model.unload().eval()
    _exclude(base, config, frozen)
    return model


def _expert(layer: CLSRLayer, adapter_name: str) -> nn.Linear:
    """The expert's projection in `layer`, in the precision of the shared one."""
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
    if isinstance(excluded, str):  # names in its place: the expression with names in it would not be loaded
        all_targets = copy.copy(config)
        all_targets.exclude_modules = None
        excluded = [
            key
            for key, _ in base.named_modules()
            if re.fullmatch(excluded, key) and CLSRModel._check_target_module_exists(all_targets, key)
        ]
    config.exclude_modules = {*excluded, *keys}


def _projections(base: nn.Module, adapter_name: str) -> dict[str, dict[str, CLSRLayer]]:
    """The projections that an adapter routes, by the name of the one that owns their gate, and by their own."""
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
            f"the model has no CLSR layers to freeze, its adapters are: {kinds}. Those of other methods are merged by "
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
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"the dataset is a {type(dataset).__name__}, expected a datasets.Dataset as prepare_dataset gives"
        )
    missing = [column for column in _COLUMNS if column not in dataset.column_names]
    if missing:
        raise ValueError(f"the dataset has no {', '.join(missing)}: prepare it with prepare_dataset")
    if not len(dataset):
        raise ValueError("the dataset is empty: gates can be measured and transcripts scored on speech alone")
    if "language" in dataset.column_names:
        others = sorted({str(language) for language in dataset.unique("language")} - {code})
        if others:
            raise ValueError(
                f"the dataset has utterances of the languages {others} beside or instead of {code!r}, whose gates are "
                f"to be measured: give it those of {code!r} alone"
            )
    frames, context = len(dataset[0]["input_features"][0]), 2 * max_source_positions
    if frames != context:
        raise ValueError(
            f"the dataset's features have {frames} frames and the model takes {context}: prepare it at the model's "
            f"context, set_audio_context(None, processor, {context / 100:g})"
        )
