"""`peft-clsr push`: a folder of adapters goes to a repository on the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from .help import HelpFormatter

DESCRIPTION = "push the languages of a folder, and their model card, to the Hub"


def make_parser(prog: str, everything: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=DESCRIPTION, formatter_class=HelpFormatter)
    parser.add_argument("folder", type=Path, help="the --output_dir of train, or a folder from save_pretrained")
    parser.add_argument("repo_id", help="the repository, such as me/whisper-small-experts; created if missing")
    parser.add_argument("--private", action="store_true", help="create a missing repository as private")
    parser.add_argument("--revision", help="branch to push to, created if missing; main if not given")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request, which needs no write access")
    parser.add_argument("--commit_message", default="Add languages", help="message of the commit")
    return parser


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    options = parser.parse_args(argv)
    from huggingface_hub.errors import HfHubHTTPError

    from ..hub.push import push_folder

    try:
        commit = push_folder(
            options.folder,
            options.repo_id,
            private=options.private or None,
            revision=options.revision,
            create_pr=options.create_pr,
            commit_message=options.commit_message,
        )
    except (ValueError, OSError, HfHubHTTPError) as error:
        parser.exit(2, f"error: {error}\n")
    print(commit.pr_url or commit.commit_url)
    return 0
