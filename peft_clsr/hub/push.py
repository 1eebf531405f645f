"""Saves languages, and pushes them to the Hub: one repository, one folder per language, one commit per push."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import TrainingArguments
from transformers.utils import logging

from ..checkpoints.base_model import ffn_identity, is_hub_id
from ..checkpoints.checks import check_adapter_folder
from ..evaluation.normalization import leading_rate
from ..evaluation.plots import try_plot_language
from ..files import MAX_JSON_BYTES, copy_file, to_json, write_text
from ..languages.adapters import adapter_languages, adapter_of_language, adapter_prompts
from ..languages.tags import language_name, language_tag, prompt_code
from ..tuner.adapter_names import adapter_folder
from .card import README, language_card, read_card, write_folder_card
from .record import (
    LANGUAGE_FILES,
    PLOT_NAME,
    RECORD_NAME,
    HubLanguage,
    check_results,
    languages_of_snapshot,
    read_languages,
    training_summary,
    write_record,
)

# Another commit came first: 412 on the Hub, 409 on some servers.
_CONFLICTS = (409, 412)
_RETRIED = (*_CONFLICTS, 429, 500, 502, 503, 504)
_ATTEMPTS = 8

logger = logging.get_logger(__name__)


def push_language(
    model: PeftModel,
    repo_id: str,
    language: str,
    *,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    training_args: TrainingArguments | None = None,
    gate_means: Mapping[str, float] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """
    Push the adapter of one language into its folder of a repository, and update the model card, in one commit.

    Files of other languages are not changed. If somebody else commits at the same time, the push is repeated on top of
    their commit. The repository is created if there is none. With several processes, call it on one of them.

    Args:
        model (`PeftModel`): A model with the adapter.
        repo_id (`str`): The repository, "me/whisper-small-experts".
        language (`str`):
            The adapter's name, or its language as in [`language_tag`]. The folder is named by the tag of the language.
        metrics (`Mapping`, *optional*):
            Test set (best its name on the Hub) to rates, as fractions: "wer" and "cer", those of the base model as
            "base_wer" and "base_cer", and, if known, "utterances", "skipped", "config" and "split" of the test set.
            They replace those of an earlier push, which were of other weights.
        training_args (`TrainingArguments`, *optional*):
            The training arguments. The card shows those that affect the result, and no path, name or token.
        gate_means (`Mapping[str, float]`, *optional*):
            The result of `gate_means`, for the card's table and its picture, which shows the error rates, too. Without
            matplotlib there is a warning and no picture.
        private (`bool`, *optional*): Make a repository that is created private.
        revision (`str`, *optional*): The branch to push to, created if there is none. "main" by default.
        create_pr (`bool`, *optional*, defaults to `False`): Open a pull request, which needs no write access.
        commit_message (`str`, *optional*): By default "Add Catalan (ca)".
        token (`str` or `bool`, *optional*): The token, as for `huggingface_hub`. By default that of the login.

    Returns:
        `CommitInfo`: the commit, with `pr_url` if a pull request was opened.

    Raises:
        ValueError: there is no adapter of that language, weights or results are not finite, or the repository's card
            cannot be read.
        HfHubHTTPError: the Hub refuses, or keeps failing.
        ConnectionError: hf-xet cannot upload the weights.

    Example:

    ```py
    >>> push_language(
    ...     model,
    ...     "me/whisper-small-experts",
    ...     "ca",
    ...     metrics={"google/fleurs": {"wer": 0.104, "base_wer": 0.159, "config": "ca_es", "split": "test"}},
    ... )
    ```
    """
    with tempfile.TemporaryDirectory() as directory:
        folder = save_language(
            model, directory, language, metrics=metrics, training_args=training_args, gate_means=gate_means
        )
        return push_folder(
            directory,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or f"Add {_title(folder.name)}",
            token=token,
        )


def save_language(
    model: PeftModel,
    directory: str | Path,
    language: str,
    *,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    training_args: TrainingArguments | None = None,
    gate_means: Mapping[str, float] | None = None,
) -> Path:
    """
    Save the adapter of one language to `directory/<language>`, with its record and a model card.

    Arguments and errors are those of [`push_language`].

    Returns:
        `Path`: the folder of the language.
    """
    results = check_results(metrics or {})
    adapter_name, folder = save_weights(model, directory, language)
    describe_adapter(model, adapter_name, folder, results=results, training_args=training_args, gate_means=gate_means)
    write_folder_card(folder)
    return folder


def save_weights(model: PeftModel, directory: str | Path, language: str) -> tuple[str, Path]:
    """
    Save weights and config of the adapter of a language to `directory/<language>`, and nothing else.

    Returns:
        `tuple[str, Path]`: the adapter's name, and the folder.
    """
    adapter_name = adapter_of_language(model.peft_config, language)
    tag = model.peft_config[adapter_name].language or language_tag(language)
    names = {"language": tag, "prompt_language": adapter_prompts(model.peft_config)[adapter_name] or prompt_code(tag)}
    folder = Path(directory) / tag
    with tempfile.TemporaryDirectory() as temporary:
        # PEFT names the folder by the adapter, not by the language code.
        model.save_pretrained(temporary, selected_adapters=[adapter_name])
        saved = adapter_folder(Path(temporary), adapter_name)
        folder.mkdir(parents=True, exist_ok=True)
        copy_file(saved / SAFETENSORS_WEIGHTS_NAME, folder / SAFETENSORS_WEIGHTS_NAME)
        config = json.loads((saved / CONFIG_NAME).read_text(encoding="utf-8"))
    # In ASCII, as PEFT reads it in the system's encoding.
    write_text(folder / CONFIG_NAME, to_json({**config, **names}, sort_keys=True, ensure_ascii=True))
    return adapter_name, folder


def describe_adapter(
    model: PeftModel,
    adapter_name: str,
    folder: Path,
    *,
    results: Mapping[str, Mapping[str, Any]],
    training_args: TrainingArguments | None,
    gate_means: Mapping[str, float] | None,
) -> None:
    """Check the folder of a saved adapter, and write its record and its picture."""
    check_adapter_folder(folder)
    results = check_results(results)
    tag = adapter_languages(model.peft_config)[adapter_name]
    title, rate = (adapter_name, "wer") if tag is None else (_title(tag), leading_rate(tag))
    has_plot = bool(gate_means) and try_plot_language(folder / PLOT_NAME, title, rate, results, gate_means)
    write_record(
        folder,
        ffn_identity(model, adapter_name),
        results=results,
        training={} if training_args is None else training_summary(training_args),
        gate_means={name: round(float(mean), 4) for name, mean in (gate_means or {}).items()},
        has_plot=has_plot,
        started_from=model.peft_config[adapter_name].started_from,
    )


def push_folder(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Add languages",
    token: str | bool | None = None,
) -> CommitInfo:
    """
    Push all languages that [`save_language`] or `save_pretrained` saved in a folder, and the card, in one commit.

    Arguments and errors are those of [`push_language`]. Other files in the folder are not pushed.
    """
    directory = Path(directory)
    pushed = read_languages(directory)
    if not pushed:
        raise ValueError(f"{directory} holds no adapter of a language: save one there with save_language()")
    _warn_of_local_bases(pushed)
    # PEFT saves the adapter "default" in the folder itself. On the Hub, every language has its own folder.
    files = {
        f"{language.subfolder or language.code}/{name}": directory / language.subfolder / name
        for language in pushed
        for name in LANGUAGE_FILES
        if (directory / language.subfolder / name).is_file()
    }
    pushed = [
        replace(
            language,
            subfolder=language.subfolder or language.code,
            base_model=language.base_model if is_hub_id(language.base_model) else None,
        )
        for language in pushed
    ]
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # with the user's name in it
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return _commit(api, repo_id, pushed, files, revision, create_pr, commit_message)


def update_model_card(
    repo_id: str, *, revision: str | None = None, create_pr: bool = False, token: str | bool | None = None
) -> CommitInfo:
    """
    Update the model card from the folders of the repository, such as after PEFT's `model.push_to_hub` or deletions.

    Arguments and errors are those of [`push_language`].
    """
    return _commit(HfApi(token=token), repo_id, [], {}, revision, create_pr, "Update the model card")


def _commit(
    api: HfApi,
    repo_id: str,
    pushed: Sequence[HubLanguage],
    files: Mapping[str, Path],
    revision: str | None,
    create_pr: bool,
    message: str,
) -> CommitInfo:
    """
    Commit files, and the card of all languages in the repository.

    If another commit came first, or the Hub fails, the commit is repeated on top of the newest one. That is harmless
    even if the first commit succeeded and only its answer was lost: equal files make no new commit. A pull request
    would be opened twice, so it is not repeated.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            parent, languages, card = _read_repository(api, repo_id, revision)
            by_folder = {language.subfolder: language for language in (*languages, *pushed)}
            languages = sorted(by_folder.values(), key=lambda language: (language.code, language.subfolder))
            text = language_card(languages, repo_id, card)
            operations = [CommitOperationAdd(path, _published(file)) for path, file in files.items()]
            operations.append(CommitOperationAdd(README, text.encode("utf-8")))
            return api.create_commit(
                repo_id,
                operations,
                commit_message=message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=parent,
            )
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status not in _RETRIED or create_pr or attempt == _ATTEMPTS:
                raise
            reason = "somebody else committed first" if status in _CONFLICTS else f"the Hub answered {status}"
            logger.warning(f"{repo_id}: {reason}, trying again ({attempt} of {_ATTEMPTS - 1})")
            time.sleep(random.uniform(0.5, 1) * min(2.0**attempt, 16) / 2)
    raise AssertionError("the last attempt returns or raises")


def _warn_of_local_bases(languages: Sequence[HubLanguage]) -> None:
    """Warn once of adapters whose base model is a folder of this machine."""
    bases = {language.base_model for language in languages if language.base_model}
    for base in sorted(name for name in bases if not is_hub_id(name)):
        logger.warning_once(
            f"the base model {base!r} is a folder of this machine. Its path is not published, as others lack it. "
            "If the model is on the Hub, write its id as base_model_name_or_path into adapter_config.json, or set "
            "model.peft_config[...].base_model_name_or_path, and push again"
        )


def _published(file: Path) -> str | bytes:
    """The file to upload, or its content without a path of this machine."""
    if file.name != CONFIG_NAME:
        return str(file)
    config = json.loads(file.read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base or is_hub_id(base):
        return str(file)
    return to_json({**config, "base_model_name_or_path": None}, sort_keys=True, ensure_ascii=True).encode()


def _read_repository(api: HfApi, repo_id: str, revision: str | None) -> tuple[str, list[HubLanguage], str | None]:
    """The newest commit of a branch, its languages, and its card."""
    info = api.model_info(repo_id, revision=revision, files_metadata=True)
    small = [
        sibling.rfilename
        for sibling in info.siblings
        if sibling.rfilename == README or _describes_language(sibling.rfilename, sibling.size)
    ]
    if not small:
        return info.sha, [], None
    folder = Path(api.snapshot_download(repo_id, revision=info.sha, allow_patterns=[escape(path) for path in small]))
    return info.sha, languages_of_snapshot(folder, info.siblings), read_card(folder)


def _describes_language(path: str, size: int | None) -> bool:
    """True for a config or record in the repository itself or one of its folders, unless it is too large to read."""
    folder, _, name = path.rpartition("/")
    return "/" not in folder and name in (CONFIG_NAME, RECORD_NAME) and (size or 0) <= MAX_JSON_BYTES


def _title(tag: str) -> str:
    return f"{language_name(tag)} ({tag})"
