"""Docstrings as Markdown: types without markup, and names in brackets as links to the reference."""

import re

import griffe

_ARGUMENT = re.compile(r"^( +\**\w+) \(([^\n]*?`[^\n]*?)\):", re.MULTILINE)
_RETURNED = re.compile(r"^( *(?:Returns|Yields):\n +)(\[?`[^\n]*?):(?=\s)", re.MULTILINE)
_TYPE = re.compile(r"\[?`~?([^`]*)`\]?")
_LINK = re.compile(r"\[`(~?)([\w.]*?)(\w+)`\](?![\[(])")


class Docstrings(griffe.Extension):
    """Rewrites the docstrings of a package for mkdocstrings, once all of them are loaded."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: object) -> None:
        pkg.docstring = None  # the page has text of its own

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: object) -> None:
        if obj.docstring is not None:
            public = loader.modules_collection["peft_clsr"].members
            obj.docstring.value = to_markdown(obj.docstring.value, public)


def to_markdown(docstring, public):
    """
    Args:
        docstring (`str`): Such as "size (`int` or `str`, *optional*, defaults to 1): See [`CLSRConfig`]."
        public (`Container[str]`): Names that have an entry in the reference. Others become code without a link.

    Returns:
        `str`: "size (int | str): See [`CLSRConfig`][peft_clsr.CLSRConfig]." Defaults are those of the signature.
    """
    docstring = _ARGUMENT.sub(lambda match: f"{match[1]} ({_plain(match[2])}):", docstring)
    docstring = _RETURNED.sub(lambda match: f"{match[1]}{_plain(match[2])}:", docstring)
    return _LINK.sub(lambda match: _link(*match.groups(), public), docstring)


def _plain(types):
    return _TYPE.sub(r"\1", types.partition(", *optional*")[0]).replace(" or ", " | ")


def _link(is_short, parents, name, public):
    code = f"`{name}`" if is_short else f"`{parents}{name}`"
    return f"[{code}][peft_clsr.{parents}{name}]" if f"{parents}{name}".partition(".")[0] in public else code
