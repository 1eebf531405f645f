"""`peft-clsr push`: publish the languages of a folder on the Hub."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

DESCRIPTION = "publish the languages of a folder on the Hub"


def make_parser(prog: str, everything: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog,
        description="Push all language experts of a folder to a repository, and update its model card, in one commit. "
        "Other languages of the repository are not changed.",
    )
    parser.add_argument("folder", help="output_dir of a 'peft-clsr train', or a folder of saved adapters")
    parser.add_argument("repository", help="such as me/whisper-small-experts; created if there is none")
    parser.add_argument("--private", action="store_true", help="make a repository that is created private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to; main by default")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request, which needs no write access")
    parser.add_argument("--commit_message", metavar="TEXT", default="Add languages", help="message of the commit")
    return parser


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    arguments = parser.parse_args(argv)

    from huggingface_hub.utils import validate_repo_id

    from ..hub.push import push_folder
    from ..sources import did_you_mean

    if not os.path.isdir(arguments.folder):
        parser.exit(2, f"error: there is no folder {arguments.folder!r}{did_you_mean(arguments.folder)}\n")
    try:
        validate_repo_id(arguments.repository)
    except ValueError as error:
        expected = "expected one such as me/whisper-small-experts"
        parser.exit(2, f"error: {arguments.repository!r} is no name of a repository, {expected}: {error}\n")
    try:
        _check_finished(Path(arguments.folder))
        commit = push_folder(
            arguments.folder,
            arguments.repository,
            private=arguments.private or None,
            revision=arguments.revision,
            create_pr=arguments.create_pr,
            commit_message=arguments.commit_message,
        )
    except (OSError, ValueError) as error:  # the Hub's errors are of both kinds
        parser.exit(2 if isinstance(error, ValueError) else 1, f"error: {arguments.folder} was not pushed: {error}\n")
    print(f"pushed: {commit.pr_url or commit.commit_url}")
    return 0


def _check_finished(folder: Path) -> None:
    """Raise a `ValueError` if the folder has an adapter whose training is not finished."""
    from peft.utils import CONFIG_NAME

    from ..hub.record import read_languages
    from .run_folder import describe_unfinished, read_results

    run = folder.parent if (folder / CONFIG_NAME).is_file() else folder
    try:
        results = read_results(run)
    except ValueError:  # no folder of 'peft-clsr train'
        return
    if not results["unfinished"].keys().isdisjoint(language.code for language in read_languages(folder)):
        raise ValueError(f"{describe_unfinished(results, run)}, or push the folders of finished languages alone")
