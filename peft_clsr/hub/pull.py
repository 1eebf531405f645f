"""Lists and loads the languages of a repository on the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers.utils import logging

from ..checkpoints.base_model import check_base_model
from ..checkpoints.checks import check_adapter_folder
from ..checkpoints.configs import is_clsr, read_config
from ..checkpoints.guards import already_checked
from ..checkpoints.weights import weights_path
from ..files import sha256_of
from ..languages.tags import are_equal_tags, closest_tags, language_tag
from ..tuner.adapter_names import check_adapter_name
from .record import RECORD_NAME, HubLanguage, languages_of_snapshot, read_languages, read_record

logger = logging.get_logger(__name__)


def list_languages(repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> list[HubLanguage]:
    """
    List the languages of a repository, without downloading weights.

    Args:
        repo_id (`str`): The repository.
        revision (`str`, *optional*): A branch, tag or commit; "main" by default.
        token (`str` or `bool`, *optional*): The token, as for `huggingface_hub`.

    Returns:
        `list[HubLanguage]`: code, name, folder, base model, rank, size in bytes, `error_rate` and all results. Folders
        that cannot be read are left out, with a warning. Offline, the languages in the cache.

    Raises:
        RepositoryNotFoundError: there is no such repository, or the token may not read it.

    Example:

    ```py
    >>> for language in list_languages("me/whisper-small-experts"):
    ...     print(language.code, language.name, language.base_model, language.rank, language.size, language.error_rate)
    ```
    """
    api = HfApi(token=token)
    folder = small_files(api, repo_id, revision)
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
    autocast_adapter_dtype: bool = True,
    token: str | bool | None = None,
) -> PeftModel:
    """
    Load one, several or all languages of a repository. Each becomes an adapter with the name of its folder.

    All are downloaded and checked before the model is changed: they must be safetensors with the right names and
    shapes and finite values, trained on this base model. Files in the cache are not downloaded again, and are enough
    to work offline (`HF_HUB_OFFLINE=1`).

    Args:
        model (`nn.Module`): The base model, or a `PeftModel` around it, which may have other languages.
        repo_id (`str`): The repository.
        language (`str` or `Sequence[str]`, *optional*):
            A folder, or a language as in [`language_tag`]; or a list of them. By default all languages. Where a
            dialect has no expert, a broader language's is loaded, with a warning.
        revision (`str`, *optional*): A branch, tag or commit; "main" by default.
        allow_other_base (`bool`, *optional*, defaults to `False`):
            Load even if the base model has another name or other weights. Shapes must fit in any case.
        is_trainable (`bool`, *optional*, defaults to `False`): Make the adapters trainable.
        autocast_adapter_dtype (`bool`, *optional*, defaults to `True`):
            Keep experts of a half-precision base in float32, as PEFT does and training needs. `False` halves their
            memory.
        token (`str` or `bool`, *optional*): The token, as for `huggingface_hub`.

    Returns:
        `PeftModel`: `model` itself, with its active adapter unchanged (call `model.set_adapter("ca")`); or, around a
        base model, a new one in which the first language is active.

    Raises:
        ValueError: there is no such language; its adapter does not fit or has another base model; or the model has an
            adapter of that name.
        LocalEntryNotFoundError: the Hub cannot be reached, and the files are not in the cache.

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
        snapshot = small_files(api, repo_id, revision)
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
            record = read_record(folder, sha256_of(weights_path(folder)))
            check_base_model(model, config.get("base_model_name_or_path"), record.get("base_ffn"), adapter)
        check_adapter_folder(folder, model)

    was_wrapped = isinstance(model, PeftModel)
    settings: dict[str, bool] = {"is_trainable": is_trainable, "autocast_adapter_dtype": autocast_adapter_dtype}
    try:
        for name, folder in folders.items():
            with already_checked():
                if isinstance(model, PeftModel):
                    model.load_adapter(str(folder), name, **settings)
                else:
                    model = PeftModel.from_pretrained(model, str(folder), adapter_name=name, **settings)
    except ValueError:  # each fits alone, but not together, such as with different max_audio_seconds
        if was_wrapped:
            for name in folders.keys() & model.peft_config.keys():
                model.delete_adapter(name)
        elif isinstance(model, PeftModel):
            model.unload()
        raise
    return model


def small_files(api: HfApi, repo_id: str, revision: str | None) -> Path:
    """Download the configs and records of all languages. The name of the folder returned is the commit."""
    patterns = [pattern for name in (CONFIG_NAME, RECORD_NAME) for pattern in (name, f"*/{name}")]
    return Path(api.snapshot_download(repo_id, revision=revision, allow_patterns=patterns))


def _fetch(api: HfApi, repo_id: str, language: str, revision: str | None) -> tuple[str, Path]:
    """Download a language. Returns the adapter's name and its folder in the cache."""
    try:
        tag = language_tag(language)
    except ValueError:
        check_adapter_name(language)
        tag = language  # a folder that is not named by a language
    for subfolder in _possible_folders(language, tag):
        folder = download(api, repo_id, subfolder, revision)
        if (folder / CONFIG_NAME).is_file():
            return subfolder, folder
    # Its folder has another name, or is the repository itself.
    snapshot = small_files(api, repo_id, revision)
    languages = read_languages(snapshot)
    closest = closest_tags(tag, [entry.code for entry in languages])
    found = [entry for entry in languages if entry.code in closest]
    if len(found) > 1:  # the one that is named by its language
        found = [entry for entry in found if entry.subfolder == entry.code] or found
    if len(found) != 1:
        raise ValueError(
            f"{repo_id} has {'several folders' if found else 'nothing'} for {language!r}; it has "
            + (", ".join(f"{entry.subfolder or entry.code} ({entry.name})" for entry in languages) or "no language")
        )
    if not are_equal_tags(tag, found[0].code):
        logger.warning(f"{repo_id} has none for {tag!r}, so that for {found[0].code!r} is loaded, which is broader")
    return found[0].subfolder or found[0].code, download(api, repo_id, found[0].subfolder, snapshot.name)


def _possible_folders(language: str, tag: str) -> list[str]:
    """Folders to look for a language in: the name as it was given, such as "ca_valencia", then the tag."""
    try:
        check_adapter_name(language)
    except ValueError:  # "<|ca|>"
        return [tag]
    return list(dict.fromkeys([language, tag]))


def download(api: HfApi, repo_id: str, subfolder: str, revision: str | None) -> Path:
    """Download what loading an adapter needs. Returns its folder, without files if the repository has none."""
    prefix = f"{escape(subfolder)}/" if subfolder else ""
    patterns = [prefix + name for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, RECORD_NAME)]
    return Path(api.snapshot_download(repo_id, revision=revision, allow_patterns=patterns)) / subfolder
