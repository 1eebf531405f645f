"""Pushes languages to the Hub: one repository, one folder a language, one commit a push."""

from __future__ import annotations

import json
import random
import shutil
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
from transformers.models.whisper.tokenization_whisper import LANGUAGES
from transformers.utils import logging

from ..checkpoints.checks import check_adapter_folder
from ..evaluation.plots import plot_gate_means
from ..files import MAX_JSON_BYTES, write_text
from ..languages import adapter_of_language, language_code
from ..tuner.adapter_names import adapter_folder
from .base_model import ffn_identity
from .card import README, language_card
from .record import (
    PLOT_NAME,
    RECORD_NAME,
    HubLanguage,
    check_results,
    languages_of_snapshot,
    read_languages,
    training_summary,
    write_record,
)

# Only these files of a language's folder are pushed. A pickle never is.
LANGUAGE_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, RECORD_NAME, PLOT_NAME)

# Somebody else's commit came first (412 on the Hub, 409 on some servers), or the server is busy.
_MOVED = (409, 412)
_RETRIED = (*_MOVED, 429, 500, 502, 503, 504)
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

    Files of other languages do not change. If somebody else pushes at the same time, the commit is rebuilt on top of
    theirs. A missing repository is created. With several processes, call it on one.

    Args:
        model (`PeftModel`): A model with the adapter.
        repo_id (`str`): The repository, "me/whisper-small-experts".
        language (`str`): The adapter's name, or its language's code or English name. The code names the folder.
        metrics (`Mapping`, *optional*):
            Test set (best its name on the Hub) to rates, as fractions: "wer" and "cer", "base_wer" and "base_cer" of
            the base model, and, if known, "utterances", "skipped", "config" and "split" of the test set. They replace
            the results of an earlier push, which were for other weights.
        training_args (`TrainingArguments`, *optional*):
            Those of the training. The card shows the ones that affect the result, and no path, name or token.
        gate_means (`Mapping[str, float]`, *optional*): From [`gate_means`], for the plot on the card. Needs
            matplotlib.
        private (`bool`, *optional*): Create a missing repository as private.
        revision (`str`, *optional*): The branch, created if missing. "main" by default.
        create_pr (`bool`, *optional*, defaults to `False`): Open a pull request instead. It needs no write access.
        commit_message (`str`, *optional*): By default "Add Catalan (ca)".
        token (`str` or `bool`, *optional*): As in `huggingface_hub`. By default that of the login.

    Returns:
        `CommitInfo`: the commit, with `pr_url` for a pull request.

    Raises:
        ValueError: no adapter of that language, weights or results that are not finite, or an unreadable card.
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
    Save the adapter of one language to `directory/<code>`, with its record and plot, as [`push_language`] pushes them.

    Args and errors are those of [`push_language`].

    Returns:
        `Path`: the folder of the language.
    """
    adapter_name = adapter_of_language(model.peft_config, language)
    code = language_code(model.peft_config[adapter_name].language or language)
    results = check_results(metrics or {})
    folder = Path(directory) / code
    with tempfile.TemporaryDirectory() as temporary:
        # PEFT names the folder by the adapter, whose name may differ from the code.
        model.save_pretrained(temporary, selected_adapters=[adapter_name])
        saved = adapter_folder(Path(temporary), adapter_name)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
            shutil.copyfile(saved / name, folder / name)
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    text = json.dumps({**config, "language": code}, indent=2, sort_keys=True)
    write_text(folder / CONFIG_NAME, text)
    describe_adapter(model, adapter_name, folder, results=results, training_args=training_args, gate_means=gate_means)
    return folder


def describe_adapter(
    model: PeftModel,
    adapter_name: str,
    folder: Path,
    *,
    results: Mapping[str, Mapping[str, Any]],
    training_args: TrainingArguments | None,
    gate_means: Mapping[str, float] | None,
) -> None:
    """Check the folder of a saved adapter, and write its record and plot."""
    check_adapter_folder(folder)
    if gate_means:
        plot_gate_means(gate_means, folder / PLOT_NAME, title=f"{adapter_name}: mean gate by layer")
    write_record(
        folder,
        ffn_identity(model, adapter_name),
        results=check_results(results),
        training={} if training_args is None else training_summary(training_args),
        has_plot=bool(gate_means),
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
    Push all languages of a folder from [`save_language`] or `save_pretrained`, and the card, in one commit.

    Args and errors are those of [`push_language`]. Other files of the folder are not pushed.
    """
    directory = Path(directory)
    pushed = read_languages(directory)
    if not pushed:
        raise ValueError(f"{directory} has no adapter of a language: save one there with save_language()")
    # PEFT saves an adapter "default" in the folder itself. On the Hub, every language has a folder.
    files = {
        f"{language.subfolder or language.code}/{name}": directory / language.subfolder / name
        for language in pushed
        for name in LANGUAGE_FILES
        if (directory / language.subfolder / name).is_file()
    }
    pushed = [replace(language, subfolder=language.subfolder or language.code) for language in pushed]
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # with the user's name
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return _commit(api, repo_id, pushed, files, revision, create_pr, commit_message)


def update_model_card(
    repo_id: str, *, revision: str | None = None, create_pr: bool = False, token: str | bool | None = None
) -> CommitInfo:
    """
    Rewrite the model card from the folders of a repository, after PEFT's `model.push_to_hub` or deletions.

    Args and errors are those of [`push_language`].
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
    Commit files, and the card of all languages. If somebody else committed first, commit on top of that.

    A retry is harmless, also after a lost answer: unchanged files are no change. A pull request is never retried, as
    it would be opened twice.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            parent, languages, card = _read_repository(api, repo_id, revision)
            by_folder = {language.subfolder: language for language in (*languages, *pushed)}
            languages = sorted(by_folder.values(), key=lambda language: (language.code, language.subfolder))
            text = language_card(languages, repo_id, card)
            operations = [CommitOperationAdd(path, str(file)) for path, file in files.items()]
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
            reason = "somebody else committed first" if status in _MOVED else f"the Hub answered {status}"
            logger.warning(f"{repo_id}: {reason}, trying again ({attempt} of {_ATTEMPTS - 1})")
            time.sleep(random.uniform(0.5, 1) * min(2.0**attempt, 16) / 2)
    raise AssertionError("the last attempt returns or raises")


def _read_repository(api: HfApi, repo_id: str, revision: str | None) -> tuple[str, list[HubLanguage], str | None]:
    """The current commit of a branch, its languages, and its card."""
    info = api.model_info(repo_id, revision=revision, files_metadata=True)
    small = [
        sibling.rfilename
        for sibling in info.siblings
        if sibling.rfilename == README or _is_config_or_record(sibling.rfilename, sibling.size)
    ]
    if not small:
        return info.sha, [], None
    folder = Path(api.snapshot_download(repo_id, revision=info.sha, allow_patterns=[escape(path) for path in small]))
    card = None
    if README in small:
        with (folder / README).open(newline="", encoding="utf-8-sig") as file:
            card = file.read()
    return info.sha, languages_of_snapshot(folder, info.siblings), card


def _is_config_or_record(path: str, size: int | None) -> bool:
    folder, _, name = path.rpartition("/")
    return "/" not in folder and name in (CONFIG_NAME, RECORD_NAME) and (size or 0) <= MAX_JSON_BYTES


def _title(code: str) -> str:
    return f"{LANGUAGES[code].title()} ({code})"
