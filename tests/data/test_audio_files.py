"""Files of the audio of a dataset."""

import datasets
import numpy as np
import pytest
import soundfile

from peft_clsr.data.audio_files import audio_paths


def test_audio_that_was_half_written_is_not_taken_for_whole(tmp_path, monkeypatch):
    samples = np.linspace(-0.5, 0.5, 16000, dtype=np.float32)
    rows = datasets.Dataset.from_dict({"audio": [{"array": samples, "sampling_rate": 16000}]})
    write = soundfile.write

    def killed(file, data, *args, **kwargs):
        write(file, data[:8000], *args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(soundfile, "write", killed)
        list(audio_paths(rows, "audio", tmp_path))
    (path,) = audio_paths(rows, "audio", tmp_path)
    assert path.suffix == ".flac" and list(tmp_path.iterdir()) == [path]
    np.testing.assert_allclose(soundfile.read(path)[0], samples, atol=1e-4)
