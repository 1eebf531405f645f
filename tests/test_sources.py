"""The sources that users name: an adapter's folder or repository, and a language in it."""

import pytest

from peft_clsr.sources import split_adapter_source


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("me/experts:pt", ("me/experts", "pt")),
        ("me/experts", ("me/experts", None)),
        ("experts:Portuguese", ("experts", "Portuguese")),
        ("../experts:ca-valencia", ("../experts", "ca-valencia")),
        ("C:\\experts", ("C:\\experts", None)),
        ("C:experts", ("C:experts", None)),
        ("C:\\experts:pt", ("C:\\experts", "pt")),
        ("D:/experts:pt", ("D:/experts", "pt")),
        ("a:b/c", ("a:b/c", None)),
    ],
)
def test_the_language_of_an_adapters_source_stands_after_a_colon(text, expected):
    assert split_adapter_source(text) == expected


def test_a_folder_that_exists_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experts:pt").mkdir()
    assert split_adapter_source("experts:pt") == ("experts:pt", None)
    assert split_adapter_source("experts:pt:fr") == ("experts:pt", "fr")


@pytest.mark.parametrize("text", ["me/experts:", ":pt", ":"])
def test_a_colon_stands_between_two_names(text):
    with pytest.raises(ValueError, match="is not FOLDER_OR_REPO"):
        split_adapter_source(text)
