"""The record `language.json` in an adapter's folder: its results, training and base model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import TrainingArguments
from transformers.utils import logging

from ..checkpoints.base_model import RECORD_NAME as RECORD_NAME
from ..checkpoints.configs import is_clsr, read_config
from ..evaluation.normalization import leading_rate
from ..files import read_json, sha256_of, to_json, write_text
from ..languages.tags import language_name, language_tag, prompt_code, whisper_code
from ..tuner.adapter_names import check_adapter_name

PLOT_NAME = "gate_means.png"
# No other file of a language's folder is pushed.
LANGUAGE_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, RECORD_NAME, PLOT_NAME)
# Trainer pushes these to resume from.
_CHECKPOINT = re.compile(r"last-checkpoint|checkpoint-\d+")

RATES = ("wer", "cer", "base_wer", "base_cer")
_RESULT_KEYS = (*RATES, "utterances", "skipped", "config", "split")

# An explicit list: other arguments hold paths, hosts, run names and tokens.
_TRAINING_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "weight_decay",
    "max_grad_norm",
    "label_smoothing_factor",
    "bf16",
    "fp16",
    "seed",
    "kd_loss",
    "kd_weight",
    "ce_weight",
    "temperature",
    "language_temperature",
)

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class HubLanguage:
    """
    A language in a repository or folder of adapters.

    Args:
        code (`str`): Its tag, "ca" or "ca-valencia".
        name (`str`): Its English name, "Catalan".
        subfolder (`str`): The adapter's folder, "" for the repository itself.
        base_model (`str`, *optional*): The base model that it was trained on.
        rank (`int`, *optional*): `expert_rank`; `None` for a full expert.
        size (`int`, *optional*): Size of the weights in bytes.
        max_audio_seconds (`float`, *optional*): The audio context of its training, in seconds.
        results (`dict`): Test set to `{"wer", "cer", "base_wer", "base_cer", ...}`, rates as fractions. `rate`
            says which of them to read.
        training (`dict`): The training arguments.
        gate_means (`dict`): Name of a routed module to its mean gate in [0, 1]; empty if not known.
        has_plot (`bool`): True if the folder has a picture of its results and gate means.
        prompt_language (`str`): Whisper's code of the language in the prompt, "sw" for "rw".
        started_from (`str`, *optional*): The expert that this one started as a copy of, see [`warm_start`].
    """

    code: str
    name: str
    subfolder: str
    base_model: str | None = None
    rank: int | None = None
    size: int | None = None
    max_audio_seconds: float | None = None
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    gate_means: dict[str, float] = field(default_factory=dict)
    has_plot: bool = False
    prompt_language: str = ""
    started_from: str | None = None

    @property
    def rate(self) -> Literal["wer", "cer"]:
        """The error rate to read: "cer" if the language puts no spaces between words, else "wer"."""
        return leading_rate(self.code)

    @property
    def error_rate(self) -> float | None:
        """The rate to read, as a fraction, on the first test set that has it."""
        return next((rates[self.rate] for rates in self.results.values() if self.rate in rates), None)

    @property
    def wer(self) -> float | None:
        """WER, as a fraction, on the first test set that has one."""
        return next((rates["wer"] for rates in self.results.values() if "wer" in rates), None)


def check_results(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """
    Check the results that [`push_language`] takes.

    Returns:
        `dict`: test set to its rates, without values that are `None`.

    Raises:
        ValueError: a key is unknown, or a rate is not a finite number of at least 0.
    """
    results = {}
    for test_set, rates in metrics.items():
        if not isinstance(test_set, str) or not isinstance(rates, Mapping):
            raise ValueError(
                f"metrics has {test_set!r}: {rates!r}, expected the name of a test set and its rates, such as "
                "{'google/fleurs': {'wer': 0.12, 'base_wer': 0.31}}"
            )
        # A row of error_rates() has "rate", too, which follows from the language.
        unknown = sorted(set(rates) - {*_RESULT_KEYS, "rate"})
        if unknown:
            raise ValueError(f"the results on {test_set!r} have {unknown}, expected some of {', '.join(_RESULT_KEYS)}")
        for name in RATES:
            value = rates.get(name, 0.0)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(
                    f"{name} on {test_set!r} is {value!r}, expected a fraction of at least 0, such as 0.25 for 25 %"
                )
        results[test_set] = {key: rates[key] for key in _RESULT_KEYS if rates.get(key) is not None}
    return results


def training_summary(args: TrainingArguments) -> dict[str, Any]:
    """The training arguments that affect the result, without paths and names."""
    values = args.to_dict() | {"world_size": args.world_size}
    if args.max_steps < 1:  # num_train_epochs counts
        values["max_steps"] = None
    return {name: values[name] for name in _TRAINING_ARGUMENTS if values.get(name) is not None}


def write_record(folder: Path, base_ffn: Mapping[str, Any], **known: Any) -> None:
    """Write `language.json` into the folder of a saved adapter. The weights' hash in it ties it to these weights."""
    record = {"weights_sha256": sha256_of(folder / SAFETENSORS_WEIGHTS_NAME), "base_ffn": dict(base_ffn), **known}
    write_text(folder / RECORD_NAME, to_json(record))


def read_record(folder: Path, weights_sha256: str | None) -> dict[str, Any]:
    """
    Read `language.json` in an adapter's folder.

    Args:
        folder (`Path`): The adapter's folder.
        weights_sha256 (`str`, *optional*): The hash of the adapter's weights, if known.

    Returns:
        `dict`: the record; empty if there is none, or if it is of other weights.

    Raises:
        ValueError: the file cannot be read or is no record.
    """
    path = folder / RECORD_NAME
    if not path.exists():
        return {}
    record = read_json(path)
    if not _is_record(record):
        raise ValueError(
            f"{path} is no record of a language, expected base_ffn, results, training and gate_means as objects"
        )
    if weights_sha256 is not None and record.get("weights_sha256") != weights_sha256:
        logger.warning(f"{path} belongs to other weights than those beside it: its results are left out")
        return {}
    try:
        return {**record, "results": check_results(record.get("results", {}))}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _is_record(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    base_ffn = value.get("base_ffn", {})
    return (
        isinstance(base_ffn, dict)
        and isinstance(base_ffn.get("module", ""), str)
        and isinstance(base_ffn.get("sha256", {}), dict)
        and all(isinstance(value.get(name, {}), dict) for name in ("results", "training", "gate_means"))
        and all(isinstance(mean, int | float) and 0 <= mean <= 1 for mean in value.get("gate_means", {}).values())
    )


def read_languages(
    folder: Path, sizes: Mapping[str, int] | None = None, sha256s: Mapping[str, str] | None = None
) -> list[HubLanguage]:
    """
    List the languages in a folder of adapters, from their small files alone.

    Args:
        folder (`Path`): A folder with one subfolder per language, or the folder of one adapter.
        sizes (`Mapping[str, int]`, *optional*): Relative path to size in bytes, for files that were not downloaded.
        sha256s (`Mapping[str, str]`, *optional*): Relative path to hash, for such files.

    Returns:
        `list[HubLanguage]`: sorted by code and folder. Adapters that cannot be read are left out, with a warning.
    """
    languages = []
    for path in sorted([*folder.glob(CONFIG_NAME), *folder.glob(f"*/{CONFIG_NAME}")]):
        subfolder = path.parent.relative_to(folder).as_posix().removeprefix(".")
        weights = f"{subfolder}/{SAFETENSORS_WEIGHTS_NAME}".lstrip("/")
        is_local = (folder / weights).is_file()
        size = (folder / weights).stat().st_size if is_local else (sizes or {}).get(weights)
        digest = sha256_of(folder / weights) if is_local else (sha256s or {}).get(weights)
        try:
            language = _read_language(path.parent, subfolder, size, digest)
        except ValueError as error:
            logger.warning(f"{subfolder or '.'} is left out: {error}")
            continue
        if language is not None:
            languages.append(language)
    return sorted(languages, key=lambda language: (language.code, language.subfolder))


def languages_of_snapshot(folder: Path, siblings: Sequence[Any]) -> list[HubLanguage]:
    """
    List the languages of a downloaded commit.

    `siblings`, from `HfApi.model_info(files_metadata=True)`, give sizes and hashes of files that were not downloaded.
    """
    sizes = {sibling.rfilename: sibling.size for sibling in siblings if sibling.size is not None}
    sha256s = {sibling.rfilename: sibling.lfs.sha256 for sibling in siblings if sibling.lfs is not None}
    return read_languages(folder, sizes, sha256s)


def _read_language(folder: Path, subfolder: str, size: int | None, digest: str | None) -> HubLanguage | None:
    """The language of one adapter's folder; `None` for other adapters. Raises a `ValueError` for broken files."""
    config = read_config(folder / CONFIG_NAME)
    if not is_clsr(config) or _CHECKPOINT.fullmatch(subfolder):
        return None
    if subfolder:
        check_adapter_name(subfolder)
    language = config.get("language")
    if language is None and whisper_code(subfolder) is None:
        return None  # it is for no particular language
    tag = language_tag(language or subfolder)
    record = read_record(folder, digest)
    return HubLanguage(
        code=tag,
        name=language_name(tag),
        subfolder=subfolder,
        base_model=config.get("base_model_name_or_path"),
        rank=config.get("expert_rank"),
        size=size,
        max_audio_seconds=config.get("max_audio_seconds"),
        results=record.get("results", {}),
        training=record.get("training", {}),
        gate_means=record.get("gate_means", {}),
        has_plot=record.get("has_plot") is True,
        prompt_language=prompt_code(tag, config.get("prompt_language")),
        started_from=config.get("started_from"),
    )
