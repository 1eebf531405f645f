import numpy as np
import pytest

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

from peft_clsr import EmptyAudioError, read_audio


def tone(seconds, rate, hertz=440.0):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def test_audio_at_the_wanted_rate_is_read_unchanged(tmp_path):
    samples = tone(0.25, 16000)
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    read = read_audio(tmp_path / "a.wav")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, samples)


def test_audio_at_44_1_khz_is_resampled_to_the_same_tone(tmp_path):
    soundfile.write(tmp_path / "a.flac", tone(2.0, 44100), 44100)
    read = read_audio(str(tmp_path / "a.flac"))
    assert read.shape == (32000,)
    assert np.abs(np.fft.rfft(read)).argmax() == 880  # 440 Hz in bins of 0.5 Hz
    np.testing.assert_allclose(read[1000:-1000], tone(2.0, 16000)[1000:-1000], atol=1e-3)


def test_stereo_is_averaged(tmp_path):
    left = tone(0.1, 16000)
    soundfile.write(tmp_path / "a.wav", np.stack([left, np.zeros_like(left)], axis=1), 16000, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), left / 2, atol=1e-7)
    np.testing.assert_allclose(
        read_audio({"array": np.stack([left, np.zeros_like(left)]), "sampling_rate": 16000}), left / 2, atol=1e-7
    )


def test_the_dicts_of_datasets_are_read(tmp_path):
    samples = tone(0.1, 16000)
    file = tmp_path / "a.wav"
    soundfile.write(file, samples, 16000, subtype="FLOAT")
    for audio in (
        {"array": samples.astype(np.float64), "sampling_rate": 16000, "path": None},
        {"bytes": file.read_bytes(), "path": "a.wav"},
        {"bytes": None, "path": str(file)},
    ):
        read = read_audio(audio)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, samples)


def test_bad_audio_is_refused_by_name(tmp_path):
    (tmp_path / "text.wav").write_text("not audio")
    with pytest.raises(ValueError, match=r"text\.wav cannot be read"):
        read_audio(tmp_path / "text.wav")
    with pytest.raises(ValueError, match=r"gone\.wav cannot be read: no such file"):
        read_audio({"bytes": None, "path": str(tmp_path / "gone.wav")})
    with pytest.raises(ValueError, match=r"clip\.mp3 cannot be read"):
        read_audio({"bytes": b"nonsense", "path": "clip.mp3"})
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan], dtype=np.float32), 16000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"nan\.wav holds NaN"):
        read_audio(tmp_path / "nan.wav")


def test_empty_audio_is_refused_by_name(tmp_path):
    soundfile.write(tmp_path / "none.wav", np.zeros(0, dtype=np.float32), 16000)
    (tmp_path / "zero.wav").touch()
    for name in ("none.wav", "zero.wav"):
        with pytest.raises(EmptyAudioError, match=name.replace(".", r"\.")):
            read_audio(tmp_path / name)


def test_an_array_the_wrong_way_round_is_refused():
    with pytest.raises(ValueError, match=r"\(16000, 2\).*transpose"):
        read_audio({"array": np.zeros((16000, 2)), "sampling_rate": 16000})
