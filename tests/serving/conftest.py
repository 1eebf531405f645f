"""Recordings, and the models of `expert_models`."""

from types import SimpleNamespace

import pytest
import soundfile
from expert_models import LANGUAGES, models  # noqa: F401
from helpers import noise, write_container


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Sixteen recordings, shorter and longer than the context, each in a language. One has no expert."""
    folder = tmp_path_factory.mktemp("recordings")
    found = []
    for index in range(16):
        seconds = (0.4, 0.9, 2.3, 3.1)[index % 4] + index / 100
        path = folder / f"{index}{('.wav', '.mp3', '.flac', '.m4a')[index // 4]}"
        if path.suffix == ".m4a":
            write_container(path, noise(seconds, seed=index), 16000, "aac")
        else:
            soundfile.write(path, noise(seconds, seed=index), 16000)
        found.append(SimpleNamespace(path=path, language=[*LANGUAGES, "fr"][index % 6]))
    return found
