"""
The second round's recordings: three folds of texts.

The recordings of a language are divided by text into folds. A run of fold f is tested on fold f, validated on the
first recordings of the next fold, and trained on all others. So each recording is in the test of one fold.
"""

from __future__ import annotations

FOLDS = 3
VALIDATION = 60  # recordings
LANGUAGES = ("ro", "be", "ru", "el", "bg", "ca")
GRID_LANGUAGES = LANGUAGES[:3]  # of the grid, and of its teacher
HUMAN = "ru"  # out of domain it has a human voice, the other languages a synthetic one
# Settings that all runs share, as in the Makefile's recipe: windows of 30 s, four passes over all recordings.
FOLD_SETTINGS = {"audio_seconds": 30.0, "epochs": 4, "batch_size": 1, "train_size": None}
WINDOWS = {"single": 0.2, "timestamps": 0.5, "previous_text": 0.1, "no_speech": 0.05}


def fold_name(fold: int) -> str:
    """The folder of a fold: "fold0", "fold1", "fold2"."""
    return f"fold{fold % FOLDS}"


def parts(split: str, fold: int) -> list[tuple[str, slice]]:
    """
    The recordings of a split in a run of a fold.

    Args:
        split (`str`): "train", "validation", "test", or another split, which all folds share.
        fold (`int`): From 0 to 2.

    Returns:
        `list[tuple[str, slice]]`: folders and which of their recordings.
    """
    if split == "test":
        return [(fold_name(fold), slice(None))]
    if split == "validation":
        return [(fold_name(fold + 1), slice(VALIDATION))]
    if split == "train":
        return [(fold_name(fold + 1), slice(VALIDATION, None)), (fold_name(fold + 2), slice(None))]
    return [(split, slice(None))]
