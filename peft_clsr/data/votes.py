"""The recordings that most listeners found right, by the votes in Common Voice's tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets

UP_VOTES, DOWN_VOTES = "up_votes", "down_votes"


def most_upvoted(recordings: datasets.Dataset, number: int, name: str) -> datasets.Dataset:
    """
    The recordings with most up-votes, in their order. Among equals, fewer down-votes count, then the place.

    Args:
        recordings (`datasets.Dataset`): With the columns `up_votes` and, if known, `down_votes`: whole numbers.
        number (`int`): Of recordings to take; all, if there are fewer.
        name (`str`): The dataset's, for messages.

    Raises:
        ValueError: there is no column `up_votes`, or a cell is no number.
    """
    if UP_VOTES not in recordings.column_names:
        raise ValueError(
            f"{name} has no column {UP_VOTES!r}, which Common Voice's tables have, but "
            f"{', '.join(recordings.column_names)}: take the first recordings instead, with --max_train_samples "
            f"{number}, or leave --most_upvoted out"
        )
    votes = [
        [_votes(cell, name, column, row) for row, cell in enumerate(recordings[column][:])]
        for column in (UP_VOTES, DOWN_VOTES)
        if column in recordings.column_names
    ]
    order = sorted(range(len(recordings)), key=lambda row: (-votes[0][row], *(down[row] for down in votes[1:])))
    return recordings.select(sorted(order[:number]))


def _votes(cell: object, name: str, column: str, row: int) -> int:
    try:
        return int(str(cell).strip())
    except ValueError as error:
        raise ValueError(f"{name}, row {row}: {column} is {cell!r}, expected a whole number") from error
