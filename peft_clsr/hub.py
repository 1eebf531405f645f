"""Languages on the Hub: one repository, one folder a language, one commit a push."""

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
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import TrainingArguments
from transformers.models.whisper.tokenization_whisper import LANGUAGES
from transformers.utils import logging

from .base_identity import check_base_model, ffn_identity
from .card import language_card
from .language_record import (
    MAX_JSON_BYTES,
    PLOT_NAME,
    RECORD_NAME,
    HubLanguage,
    check_results,
    read_languages,
    read_record,
    sha256_of,
    training_summary,
    write_record,
)
from .languages import adapter_of_language, language_code
from .safe_loading import check_adapter_folder, check_adapter_name, is_clsr, read_config, weights_of

README = "README.md"
# All that is ever pushed or fetched of a language's folder. A pickle is neither.
LANGUAGE_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, RECORD_NAME, PLOT_NAME)

# Somebody else's commit came first (412 on the Hub, 409 on some servers), or the server cannot answer for now.
_MOVED = (409, 412)
_RETRIED = (*_MOVED, 429, 500, 502, 503, 504)
_ATTEMPTS = 8

logger = logging.get_logger(__name__)


# ---------------------------------------------------------------- out


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
    Push the adapter of one language into its folder of a repository, and bring the model card up to date: one commit.

    Other languages' files stay as they are. Where somebody pushes at the same time, the commit is made anew on top of
    theirs. The repository is made where there is none. Among several processes, call it on one.

    Args:
        model (`PeftModel`): A model with the adapter.
        repo_id (`str`): The repository, "me/whisper-small-experts".
        language (`str`): The adapter's name, or its language's code or English name. The folder is named by the code.
        metrics (`Mapping`, *optional*):
            Test set (best its name on the Hub) to rates, as fractions: "wer", "cer", those of the base model as
            "base_wer", "base_cer", and, as far as known, "utterances", "skipped", "config" and "split" of the test
            set. What an earlier push said is replaced, as it was of other weights.
        training_args (`TrainingArguments`, *optional*):
            Those of the training; the card shows what decides about the result, and no path, name or token.
        gate_means (`Mapping[str, float]`, *optional*): From `gate_means`, for the plot on the card. Needs matplotlib.
        private (`bool`, *optional*): Whether a repository that is made is private.
        revision (`str`, *optional*): The branch to push to, made where there is none; "main" by default.
        create_pr (`bool`, *optional*, defaults to `False`): Open a pull request instead, also without write access.
        commit_message (`str`, *optional*): By default "Add Catalan (ca)".
        token (`str` or `bool`, *optional*): As everywhere in `huggingface_hub`: the one logged in with by default.

    Returns:
        `CommitInfo`: of the commit, with `pr_url` where one was opened.

    Raises:
        ValueError: no adapter of that language, weights or results that are not finite, or a card that cannot be read.
        HfHubHTTPError: the Hub refuses, or goes on failing.
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
    Save the adapter of one language to `directory/<code>`, with what [`push_language`] pushes beside the weights.

    Args and errors are those of [`push_language`].

    Returns:
        `Path`: the folder of the language.
    """
    adapter_name = adapter_of_language(model.peft_config, language)
    code = language_code(model.peft_config[adapter_name].language or language)
    results = check_results(metrics or {})
    folder = Path(directory) / code
    with tempfile.TemporaryDirectory() as temporary:
        # PEFT's folder is the adapter's name, which need not be the code.
        model.save_pretrained(temporary, selected_adapters=[adapter_name])
        saved = Path(temporary) if adapter_name == "default" else Path(temporary) / adapter_name
        folder.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
            shutil.copyfile(saved / name, folder / name)
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    text = json.dumps({**config, "language": code}, indent=2, sort_keys=True)
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
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
    """Check the folder of a saved adapter, and write beside the weights what is known of it."""
    check_adapter_folder(folder)
    if gate_means:
        from .plots import plot_gate_means

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
    Push all languages of a folder, as [`save_language`] or `save_pretrained` made them, and the card: one commit.

    Args and errors are those of [`push_language`]. Nothing else that lies in the folder is pushed.
    """
    directory = Path(directory)
    pushed = read_languages(directory)
    if not pushed:
        raise ValueError(f"{directory} holds no adapter of a language: save one there with save_language()")
    # PEFT saves an adapter "default" in the folder itself; on the Hub, every language has a folder.
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
    Write the model card anew from the folders of the repository: after PEFT's `model.push_to_hub`, or after deletions.

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
    Commit files and the card that follows from them and from what is there; on a moved parent, on top of the new one.

    Doing it again is harmless after an answer that got lost too: what is there already is no change. A pull request is
    not opened twice, so nothing is tried again for one.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            parent, languages, card = _state(api, repo_id, revision)
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


def _state(api: HfApi, repo_id: str, revision: str | None) -> tuple[str, list[HubLanguage], str | None]:
    """The commit that a branch is at, its languages, and its card."""
    info = api.model_info(repo_id, revision=revision, files_metadata=True)
    small = [
        sibling.rfilename
        for sibling in info.siblings
        if sibling.rfilename == README or _is_small_file_of_a_language(sibling.rfilename, sibling.size)
    ]
    if not small:
        return info.sha, [], None
    folder = Path(api.snapshot_download(repo_id, revision=info.sha, allow_patterns=[escape(path) for path in small]))
    card = None
    if README in small:
        with (folder / README).open(newline="", encoding="utf-8-sig") as file:
            card = file.read()
    return info.sha, _languages_of(folder, info.siblings), card


def _is_small_file_of_a_language(path: str, size: int | None) -> bool:
    folder, _, name = path.rpartition("/")
    return "/" not in folder and name in (CONFIG_NAME, RECORD_NAME) and (size or 0) <= MAX_JSON_BYTES


def _languages_of(folder: Path, siblings: Sequence[Any]) -> list[HubLanguage]:
    sizes = {sibling.rfilename: sibling.size for sibling in siblings if sibling.size is not None}
    sha256s = {sibling.rfilename: sibling.lfs.sha256 for sibling in siblings if sibling.lfs is not None}
    return read_languages(folder, sizes, sha256s)


# ---------------------------------------------------------------- in


def list_languages(repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> list[HubLanguage]:
    """
    The languages of a repository, without downloading weights.

    Args:
        repo_id (`str`): The repository.
        revision (`str`, *optional*): A branch, tag or commit; "main" by default.
        token (`str` or `bool`, *optional*): As everywhere in `huggingface_hub`.

    Returns:
        `list[HubLanguage]`: code, name, folder, base model, rank, size in bytes, `wer` and the other results. Folders
        that cannot be read are left out, with a warning. Offline, what the cache holds.

    Raises:
        RepositoryNotFoundError: there is no such repository, or none that the token may read.

    Example:

    ```py
    >>> for language in list_languages("me/whisper-small-experts"):
    ...     print(language.code, language.name, language.base_model, language.rank, language.size, language.wer)
    ```
    """
    api = HfApi(token=token)
    folder = _small_files(api, repo_id, revision)
    try:
        siblings = api.model_info(repo_id, revision=folder.name, files_metadata=True).siblings
    except OfflineModeIsEnabled:
        siblings = []
    return _languages_of(folder, siblings)


def load_language(
    model: nn.Module,
    repo_id: str,
    language: str | Sequence[str] | None = None,
    *,
    revision: str | None = None,
    allow_other_base: bool = False,
    is_trainable: bool = False,
    token: str | bool | None = None,
) -> PeftModel:
    """
    Load one language of a repository, several, or all, each as an adapter that is named as its folder.

    All are downloaded and checked before the model is touched: only safetensors, of the right names, shapes and
    finite values, trained on this base model. Files that are in the cache are not fetched again, and suffice offline
    (`HF_HUB_OFFLINE=1`).

    Args:
        model (`nn.Module`): The base model, or a `PeftModel` around it that may have other languages.
        repo_id (`str`): The repository.
        language (`str` or `Sequence[str]`, *optional*):
            A folder, or a language's code or English name; several; all that are there by default.
        revision (`str`, *optional*): A branch, tag or commit; "main" by default.
        allow_other_base (`bool`, *optional*, defaults to `False`):
            Load although the base model has another name or other weights. Shapes must fit all the same.
        is_trainable (`bool`, *optional*, defaults to `False`): Whether the adapters can be trained further.
        token (`str` or `bool`, *optional*): As everywhere in `huggingface_hub`.

    Returns:
        `PeftModel`: `model` itself, or a new one around it whose first language is active. In a model that was one
        before, the active adapter stays; call `model.set_adapter("ca")`.

    Raises:
        ValueError: no such language, an adapter that does not fit or of another base, or a name that the model has.
        LocalEntryNotFoundError: the Hub is out of reach, and the cache does not have it.

    Example:

    ```py
    >>> model = load_language(whisper, "me/whisper-small-experts", "ca")
    >>> model = load_language(model, "me/whisper-small-experts", ["uk", "romanian"])
    ```
    """
    if Path(repo_id).is_dir():
        raise ValueError(
            f"{repo_id} is a folder here, expected a repository on the Hub: take PeftModel.from_pretrained(model, "
            f'{repo_id!r}, subfolder="ca", adapter_name="ca") for the first adapter, and load_adapter for others'
        )
    api = HfApi(token=token)
    folders: dict[str, Path] = {}
    if language is None:
        snapshot = _small_files(api, repo_id, revision)
        wanted = [entry.subfolder or entry.code for entry in read_languages(snapshot)]
        if not wanted:
            raise ValueError(f"{repo_id} has no language: {snapshot} holds no adapter_config.json of one")
    else:
        wanted = [language] if isinstance(language, str) else list(language)
    for name in dict.fromkeys(wanted):
        adapter_name, folder = _fetch(api, repo_id, name, revision)
        folders[adapter_name] = folder

    for name, folder in folders.items():
        adapter = f"{name!r} of {repo_id}"
        if isinstance(model, PeftModel) and name in model.peft_config:
            raise ValueError(
                f"the model has an adapter {name!r} already: take it off with model.delete_adapter({name!r}) first"
            )
        config = read_config(folder / CONFIG_NAME)
        if is_clsr(config) and not allow_other_base:
            record = read_record(folder, sha256_of(weights_of(folder)))
            check_base_model(model, config.get("base_model_name_or_path"), record.get("base_ffn"), adapter)
        check_adapter_folder(folder, model)

    was_wrapped = isinstance(model, PeftModel)
    try:
        for name, folder in folders.items():
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder), name, is_trainable=is_trainable)
            else:
                model = PeftModel.from_pretrained(model, str(folder), adapter_name=name, is_trainable=is_trainable)
    except ValueError:  # each fits the model, but not beside another, as of other max_audio_seconds
        if was_wrapped:
            for name in folders.keys() & model.peft_config.keys():
                model.delete_adapter(name)
        elif isinstance(model, PeftModel):
            model.unload()
        raise
    return model


def _small_files(api: HfApi, repo_id: str, revision: str | None) -> Path:
    """A folder with the small files of all languages; its name is the commit."""
    patterns = [pattern for name in (CONFIG_NAME, RECORD_NAME) for pattern in (name, f"*/{name}")]
    return Path(api.snapshot_download(repo_id, revision=revision, allow_patterns=patterns))


def _fetch(api: HfApi, repo_id: str, language: str, revision: str | None) -> tuple[str, Path]:
    """The name for an adapter, and the folder in the cache with its files."""
    try:
        code = language_code(language)
    except ValueError:
        check_adapter_name(language)
        code = language  # a name of its own
    for subfolder in _names(language, code):
        folder = _download(api, repo_id, subfolder, revision)
        if (folder / CONFIG_NAME).is_file():
            return subfolder, folder
    # Not under its code: under a name of its own, or the repository itself.
    snapshot = _small_files(api, repo_id, revision)
    there = read_languages(snapshot)
    found = [entry for entry in there if entry.code == code]
    if len(found) != 1:
        raise ValueError(
            f"{repo_id} has {'several folders' if found else 'nothing'} for {language!r}; it has "
            + (", ".join(f"{entry.subfolder or entry.code} ({entry.name})" for entry in there) or "no language")
        )
    return found[0].subfolder or found[0].code, _download(api, repo_id, found[0].subfolder, snapshot.name)


def _names(language: str, code: str) -> list[str]:
    """Folders that a language may have: of that very name, such as "ca_valencia", or of its code."""
    try:
        check_adapter_name(language)
    except ValueError:  # "<|ca|>"
        return [code]
    return list(dict.fromkeys([language, code]))


def _download(api: HfApi, repo_id: str, subfolder: str, revision: str | None) -> Path:
    prefix = f"{escape(subfolder)}/" if subfolder else ""
    patterns = [prefix + name for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, RECORD_NAME)]
    return Path(api.snapshot_download(repo_id, revision=revision, allow_patterns=patterns)) / subfolder


def _title(code: str) -> str:
    return f"{LANGUAGES[code].title()} ({code})"
