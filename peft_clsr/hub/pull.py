"""Lists and loads languages from the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn

from ..checkpoints.checks import check_adapter_folder, weights_of
from ..checkpoints.config_checks import read_config
from ..languages import language_code
from ..tuner.adapter_names import check_adapter_name
from .base_model import check_base_model
from .record import RECORD_NAME, HubLanguage, languages_of_snapshot, read_languages, read_record, sha256_of


def list_languages(repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> list[HubLanguage]:
    """
    List the languages of a repository, without downloading weights.

    Args:
        repo_id (`str`): The repository.
        revision (`str`, *optional*): A branch, tag or commit; "main" by default.
        token (`str` or `bool`, *optional*): As in `huggingface_hub`.

    Returns:
        `list[HubLanguage]`: code, name, folder, base model, rank, size in bytes, `wer` and the other results.
        Unreadable folders are left out, with a warning. Offline, the languages in the cache.

    Raises:
        RepositoryNotFoundError: there is no such repository, or the token may not read it.

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
    return languages_of_snapshot(folder, siblings)


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
    Load one, several or all languages of a repository. Each becomes an adapter with the name of its folder.

    All are downloaded and checked before the model changes: safetensors only, with the right names and shapes, finite
    values, and trained on this base model. Cached files are not downloaded again and suffice offline
    (`HF_HUB_OFFLINE=1`).

    Args:
        model (`nn.Module`): The base model, or a `PeftModel` around it that may have other languages.
        repo_id (`str`): The repository.
        language (`str` or `Sequence[str]`, *optional*):
            A folder, or a language's code or English name, or several. By default all languages.
        revision (`str`, *optional*): A branch, tag or commit; "main" by default.
        allow_other_base (`bool`, *optional*, defaults to `False`):
            Load even if the base model has another name or other weights. Shapes must fit.
        is_trainable (`bool`, *optional*, defaults to `False`): Load the adapters for further training.
        token (`str` or `bool`, *optional*): As in `huggingface_hub`.

    Returns:
        `PeftModel`: `model` itself, or a new one around it, whose first language is active. If `model` was a
        `PeftModel`, its active adapter stays: call `model.set_adapter("ca")`.

    Raises:
        ValueError: there is no such language, an adapter does not fit or is for another base, or the model has an
            adapter of that name.
        LocalEntryNotFoundError: the Hub is out of reach, and the language is not in the cache.

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
            raise ValueError(f"{repo_id} has no language: {snapshot} has no adapter_config.json of one")
    else:
        wanted = [language] if isinstance(language, str) else list(language)
    for name in dict.fromkeys(wanted):
        adapter_name, folder = _fetch(api, repo_id, name, revision)
        folders[adapter_name] = folder

    for name, folder in folders.items():
        adapter = f"{name!r} of {repo_id}"
        if isinstance(model, PeftModel) and name in model.peft_config:
            raise ValueError(
                f"the model has an adapter {name!r} already: delete it with model.delete_adapter({name!r}) first"
            )
        config = read_config(folder / CONFIG_NAME)
        if config is not None and not allow_other_base:
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
    except ValueError:  # each fits the model, but not with another one, such as one of another max_audio_seconds
        if was_wrapped:
            for name in folders.keys() & model.peft_config.keys():
                model.delete_adapter(name)
        elif isinstance(model, PeftModel):
            model.unload()
        raise
    return model


def _small_files(api: HfApi, repo_id: str, revision: str | None) -> Path:
    """Download the small files of all languages. Returns their folder, whose name is the commit."""
    patterns = [pattern for name in (CONFIG_NAME, RECORD_NAME) for pattern in (name, f"*/{name}")]
    return Path(api.snapshot_download(repo_id, revision=revision, allow_patterns=patterns))


def _fetch(api: HfApi, repo_id: str, language: str, revision: str | None) -> tuple[str, Path]:
    """Download a language. Returns the adapter's name, and the folder of its files."""
    try:
        code = language_code(language)
    except ValueError:
        check_adapter_name(language)
        code = language  # a folder name that is no language
    for subfolder in _possible_folders(language, code):
        folder = _download(api, repo_id, subfolder, revision)
        if (folder / CONFIG_NAME).is_file():
            return subfolder, folder
    # Its folder has another name, or is the repository itself.
    snapshot = _small_files(api, repo_id, revision)
    entries = read_languages(snapshot)
    found = [entry for entry in entries if entry.code == code]
    if len(found) != 1:
        raise ValueError(
            f"{repo_id} has {'several folders' if found else 'nothing'} for {language!r}; it has "
            + (", ".join(f"{entry.subfolder or entry.code} ({entry.name})" for entry in entries) or "no language")
        )
    return found[0].subfolder or found[0].code, _download(api, repo_id, found[0].subfolder, snapshot.name)


def _possible_folders(language: str, code: str) -> list[str]:
    """Possible folders of a language: with exactly that name, such as "ca_valencia", or with its code."""
    try:
        check_adapter_name(language)
    except ValueError:  # "<|ca|>"
        return [code]
    return list(dict.fromkeys([language, code]))


def _download(api: HfApi, repo_id: str, subfolder: str, revision: str | None) -> Path:
    prefix = f"{escape(subfolder)}/" if subfolder else ""
    patterns = [prefix + name for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, RECORD_NAME)]
    return Path(api.snapshot_download(repo_id, revision=revision, allow_patterns=patterns)) / subfolder
