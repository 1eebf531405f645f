"""The languages and experts of a service, known before any weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import GenerationConfig

from ..hub.record import HubLanguage
from ..inference.experts import choose_experts
from ..languages.tags import closest_tags, language_tag, own_prompt_code
from ..sources import check_whisper


@dataclass(frozen=True)
class Catalog:
    """
    Says which languages are served, and by which expert.

    Args:
        experts (`list[tuple[str, HubLanguage]]`): As of [`choose_experts`].
        known (`frozenset[str]`): Codes of the languages of which the model has a token.
        languages (`list[str]`): Tags of the only languages that are served. Empty for all.
    """

    experts: list[tuple[str, HubLanguage]]
    known: frozenset[str]
    languages: list[str]

    def expert(self, tag: str) -> tuple[str, HubLanguage] | None:
        """The expert of a language, and its source; `None` if the base model serves it."""
        closest = closest_tags(tag, [expert.code for _, expert in self.experts])
        return next((entry for entry in self.experts if entry[1].code in closest), None)

    def served_language(self, tag: str) -> str:
        """The language of a tag's expert, else Whisper's code. These are few; the tags of clients have no bound."""
        entry = self.expert(tag)
        return own_prompt_code(tag) or tag if entry is None else entry[1].code

    def find(self, language: str | None) -> str | None:
        """
        Return the tag of a language that a client asks for; `None` if it is to be detected.

        Args:
            language (`str`, *optional*): As in [`language_tag`]. `None`: not given.

        Raises:
            ValueError: it is no language, or is not served; or languages sound alike, and none is given.
        """
        if language is None:
            return self._not_given()
        tag = language_tag(language)
        if self.languages and not closest_tags(tag, self.languages):
            raise ValueError(f"language {language!r} is not served here: expected {', '.join(self.languages)}")
        code = self._prompt(tag)
        if code not in self.known:
            served = ", ".join(sorted(self.known | {expert.code for _, expert in self.experts}))
            raise ValueError(
                f"language {language!r} has no expert here, and the model does not know it: expected one of {served}"
            )
        return tag

    def _not_given(self) -> str | None:
        if len(self.languages) == 1:
            return self.languages[0]
        prompts: dict[str | None, str] = {}
        for tag in self.languages:
            other = prompts.setdefault(self._prompt(tag), tag)
            if other != tag:
                raise ValueError(
                    f"no language is given, and {other!r} and {tag!r} are heard as the same one: give one of "
                    f"{', '.join(self.languages)}"
                )
        return None

    def _prompt(self, tag: str) -> str | None:
        """Whisper's code of the language in the prompt."""
        entry = self.expert(tag)
        return own_prompt_code(tag) if entry is None else entry[1].prompt_language


def make_catalog(model_name: str, adapters: Sequence[str], languages: Sequence[str]) -> Catalog:
    """
    Look at the small files of a model and of its experts.

    Args:
        model_name (`str`): The base Whisper: Hub id or folder.
        adapters (`Sequence[str]`): Folders and repositories, as in [`choose_experts`].
        languages (`Sequence[str]`): The only languages to serve, as in [`language_tag`]. Empty for all.

    Raises:
        ValueError: the model is no Whisper for several languages; the adapters cannot be used, or not together; or
            there is neither an expert nor a token for a language.
    """
    check_whisper(model_name, "--model")
    tags = list(dict.fromkeys(language_tag(language) for language in languages))
    experts = choose_experts(adapters, set(tags))
    tokens: dict[str, int] = getattr(GenerationConfig.from_pretrained(model_name), "lang_to_id")  # noqa: B009
    known = frozenset(token[2:-2] for token in tokens)
    catalog = Catalog(experts, known, tags)
    for tag in tags:
        catalog.find(tag)
    return catalog
