"""Tokens that tell the languages of a call apart in its prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class LanguageTokens:
    """
    A token for each language of a call of `generate`, such that the prompt of a sample tells its language.

    Languages may share the token that belongs into their prompts: "ca" and "ca-valencia", or "rw" and "sw". The first
    one gets the token itself. Each further one gets the token of a language that the call does not use, for which
    `replace` puts the right one before the model sees it.

    Args:
        known (`Mapping[str, int]`): Ids of the language tokens of the model, such as `{"<|ca|>": 50270}`.
        prompts (`Mapping[str, str]`): Language of the call to the code in its prompt, `{"rw": "sw"}`.

    Attributes:
        languages (`dict[int, str]`): Id of a token to the language of the call that it stands for.

    Raises:
        ValueError: the model has fewer tokens than the call has languages.
    """

    def __init__(self, known: Mapping[str, int], prompts: Mapping[str, str]) -> None:
        self.languages = {token_id: token[2:-2] for token, token_id in known.items()}
        self._tokens: dict[str, str] = {}
        self._replaced: dict[int, int] = {}
        used = {f"<|{code}|>" for code in prompts.values()}
        spare = [token for token in known if token not in used]
        taken = set()
        for language, code in prompts.items():
            own = token = f"<|{code}|>"
            if own in taken:
                if not spare:
                    raise ValueError(
                        f"a call of {len(prompts)} languages, which share tokens, and the model has {len(known)} "
                        "language tokens: transcribe them in several calls"
                    )
                token = spare.pop()
                self._replaced[known[token]] = known[own]
            taken.add(token)
            self._tokens[language] = code if token == own else token
            if token in known:
                self.languages[known[token]] = language

    def names(self, languages: Sequence[str | None]) -> list[str | None]:
        """The codes or tokens of languages of the call, as `generate` of transformers takes them."""
        return [language and self._tokens[language] for language in languages]

    def replace(self, token: int) -> int:
        """The id of the token that belongs into the prompt."""
        return self._replaced.get(token, token)
