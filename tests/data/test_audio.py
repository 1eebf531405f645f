import unicodedata
from fractions import Fraction

import numpy as np
import pytest
from helpers import write_container

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

from peft_clsr import EmptyAudioError, TruncatedAudioError, read_audio
from peft_clsr.data.audio import audio_seconds


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


# ---------------------------------------------------------------- containers

CONTAINERS = {
    "a.m4a": {"codec": "aac"},
    "a.aac": {"codec": "aac"},
    "a.3gp": {"codec": "aac"},
    "a.webm": {"codec": "libopus"},
    "a.mp4": {"codec": "aac", "video": True},
    "a.mov": {"codec": "pcm_s16le", "video": True},
    "a.mka": {"codec": "pcm_s16le", "channels": 1},
    "a.caf": {"codec": "alac"},
    "a.ts": {"codec": "ac3"},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_sound_that_libsndfile_refuses_is_read_through_pyav(tmp_path, name):
    file = tmp_path / name
    write_container(file, tone(2.0, 48000), 48000, **CONTAINERS[name])
    with pytest.raises(soundfile.LibsndfileError):
        soundfile.info(str(file))
    assert audio_seconds(str(file)) == pytest.approx(2.0, abs=0.1)
    for audio in (file, {"bytes": file.read_bytes(), "path": name}):
        read = read_audio(audio)
        assert len(read) / 16000 <= audio_seconds(audio) + 1e-3  # a context for the header's length holds it
        assert read.dtype == np.float32 and len(read) == pytest.approx(32000, abs=1600)
        spectrum = np.abs(np.fft.rfft(read[:32000], 32000))
        assert abs(spectrum.argmax() - 880) <= 1  # 440 Hz in bins of 0.5 Hz
        assert np.abs(read[8000:24000]).max() == pytest.approx(0.5, abs=0.05)


def test_a_stream_without_a_length_is_measured(tmp_path):
    import av

    write_container(tmp_path / "a.webm", tone(2.0, 48000), 48000, "libopus", live="1")  # as browsers record
    with av.open(str(tmp_path / "a.webm")) as container:
        assert not container.duration
    assert audio_seconds(tmp_path / "a.webm") == pytest.approx(2.0, abs=0.05)
    assert len(read_audio(tmp_path / "a.webm")) == pytest.approx(32000, abs=500)


def test_a_video_without_sound_is_refused_by_name(tmp_path):
    write_container(tmp_path / "silent.mp4", tone(1.0, 16000), 16000, None, video=True)
    for read in (read_audio, audio_seconds):
        with pytest.raises(ValueError, match=r"silent\.mp4 cannot be read: it has no audio track"):
            read(tmp_path / "silent.mp4")


def test_a_truncated_file_is_refused_by_name(tmp_path):
    samples = tone(4.0, 48000)
    write_container(tmp_path / "index_last.m4a", samples, 48000, "aac")
    write_container(tmp_path / "index_first.m4a", samples, 48000, "aac", movflags="faststart")
    write_container(tmp_path / "a.webm", samples, 48000, "libopus")
    soundfile.write(tmp_path / "a.mp3", samples, 48000)
    soundfile.write(tmp_path / "a.flac", np.random.default_rng(0).normal(0, 0.1, 160000), 48000)
    for name in ("index_last.m4a", "index_first.m4a", "a.webm", "a.mp3", "a.flac"):
        read_audio(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    for name in ("index_last.m4a", "a.flac"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            read_audio(tmp_path / name)
    for name in ("index_first.m4a", "a.webm", "a.mp3"):
        with pytest.raises(TruncatedAudioError, match=rf"{name} ends after [12]\.\d s of the 4\.0 s") as error:
            read_audio(tmp_path / name)
        assert 16000 < len(error.value.samples) < 48000


def test_the_content_decides_and_not_the_name(tmp_path):
    soundfile.write(tmp_path / "a.mp3", tone(2.0, 16000), 16000)
    (tmp_path / "a.mp3").rename(tmp_path / "mp3.wav")
    write_container(tmp_path / "a.m4a", tone(2.0, 16000), 16000, "aac")
    (tmp_path / "a.m4a").rename(tmp_path / "m4a.wav")
    (tmp_path / "link.mp3").symlink_to(tmp_path / "m4a.wav")
    for name in ("mp3.wav", "m4a.wav", "link.mp3"):
        assert len(read_audio(tmp_path / name)) == pytest.approx(32000, abs=2000)


@pytest.mark.parametrize(("subtype", "steps"), [("PCM_U8", 128), ("PCM_16", 2**15), ("PCM_24", 2**23)])
def test_integer_files_are_scaled_by_their_range(tmp_path, subtype, steps):
    soundfile.write(tmp_path / "a.wav", tone(0.1, 16000), 16000, subtype=subtype)
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), tone(0.1, 16000), atol=1.01 / steps)


# ---------------------------------------------------------------- arrays


@pytest.mark.parametrize(
    ("samples", "scaled"),
    [
        (np.array([0, -(2**15), 2**14], dtype=np.int16), [0, -1, 0.5]),
        (np.array([0, -(2**31), 2**30], dtype=np.int32), [0, -1, 0.5]),
        (np.array([0, -128, 64], dtype=np.int8), [0, -1, 0.5]),
        (np.array([128, 0, 192], dtype=np.uint8), [0, -1, 0.5]),
        (np.array([[0, -(2**15)], [2**15 - 1, 0]], dtype=np.int16), [(1 - 2**-15) / 2, -0.5]),
        (np.array([0, -1.5, 0.5]), [0, -1.5, 0.5]),  # a loud mix is no integer
    ],
)
def test_integer_arrays_are_scaled_by_their_range(samples, scaled):
    np.testing.assert_allclose(read_audio({"array": samples, "sampling_rate": 16000}), scaled, atol=1e-7)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([0.0, 20000.0, -300.0]), r"floats up to 20000, expected -1 to 1: .*array / 32768"),
        (np.array([0.0, np.nan]), "NaN or infinite"),
        (np.array([0.0, 1e39]), r"floats up to 1e\+39"),
        ([0, 20000, -300], r"type int64, .*astype\('int16'\)"),
        (np.array([1, 40000], dtype=np.uint16), "type uint16"),
        (np.array([True, False]), "type bool"),
        ([Fraction(1, 2)], "type object"),
        ([[0.0, 0.1], [0.2]], "NumPy cannot read"),
        (np.zeros((1, 2, 3)), r"shape \(1, 2, 3\)"),
    ],
)
def test_arrays_of_unknown_range_or_shape_are_refused(array, message):
    with pytest.raises(ValueError, match=f"talk.wav h.*{message}"):
        read_audio({"array": array, "sampling_rate": 16000, "path": "talk.wav"})


def test_integers_in_a_float_file_are_refused_by_name(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(0.1, 16000) * 32768, 16000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"a\.wav holds floats up to 1\d{4}"):
        read_audio(tmp_path / "a.wav")


# ---------------------------------------------------------------- names and headers


@pytest.mark.parametrize(("on_disk", "asked"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_is_found_in_its_other_unicode_form(tmp_path, on_disk, asked):
    folder = tmp_path / unicodedata.normalize(on_disk, "München")
    folder.mkdir()
    soundfile.write(folder / unicodedata.normalize(on_disk, "grün.wav"), tone(0.1, 16000), 16000)
    for parent in (folder.name, unicodedata.normalize(asked, "München")):
        path = tmp_path / parent / unicodedata.normalize(asked, "grün.wav")
        assert not path.exists()
        for audio in (path, {"bytes": None, "path": str(path)}):
            assert len(read_audio(audio)) == 1600
    with pytest.raises(ValueError, match="no such file"):
        read_audio(tmp_path / "München" / "rot-ü.wav")


def test_the_length_is_in_the_header(tmp_path):
    for name in ("a.wav", "a.flac", "a.mp3"):
        soundfile.write(tmp_path / name, tone(2.0, 44100), 44100)
        assert audio_seconds({"bytes": None, "path": str(tmp_path / name)}) == pytest.approx(2.0, abs=1e-3)
    assert audio_seconds({"array": np.zeros((2, 8000)), "sampling_rate": 16000}) == 0.5
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16000)
    with pytest.raises(EmptyAudioError, match="none.wav"):
        audio_seconds(tmp_path / "none.wav")
    with pytest.raises(ValueError, match="gone.wav cannot be read: no such file"):
        audio_seconds(tmp_path / "gone.wav")
    with pytest.raises(ValueError, match="cannot be read: it is a folder"):
        audio_seconds(tmp_path)
