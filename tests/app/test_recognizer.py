"""The transcripts of the page, and the gates beside them."""

import numpy as np
import pytest
import soundfile
import torch
from conftest import build_tokenizer
from helpers import noise

pytest.importorskip("gradio")

from peft_clsr import load_with_experts, transcribe_waveforms
from peft_clsr.app.gates import split_words, windows
from peft_clsr.app.html import differences, download_html, plain_words, text_html, waveform_html
from peft_clsr.app.page import find_examples
from peft_clsr.app.recognizer import Recognizer
from peft_clsr.inference.subtitles import Transcript


@pytest.fixture(scope="module")
def recognizer(models):
    return Recognizer(str(models / "tiny"), [str(models / "experts")], [], max_seconds=5)


def test_both_sides_are_those_of_transcribe_waveforms(recognizer, models):
    waveform, heard = noise(2.4), []
    result = recognizer.transcribe(waveform, "ca", lambda part, what: heard.append((part, what)))
    model, processor = load_with_experts(str(models / "tiny"), [str(models / "experts")], [None])
    (expert,) = transcribe_waveforms(model.eval(), processor, [waveform], ["ca"])
    base, _ = load_with_experts(str(models / "tiny"), [], [None])
    (plain,) = transcribe_waveforms(base.eval(), processor, [waveform], ["ca"])
    assert (result.expert.text, result.base.text) == (expert.text, plain.text)
    assert expert.text != plain.text
    assert result.expert.adapter == "ca" and result.base.adapter is None
    assert {what.split(":")[0] for _, what in heard} == {"Base model", "Expert", "Gates"}
    assert all(0 <= part <= 1 for part, _ in heard)


def test_gates_are_those_of_a_forward_with_the_expert(recognizer):
    waveform = noise(0.8)
    result = recognizer.transcribe(waveform, "ro", lambda *_: None)
    assert len(result.gates.positions) == 40
    features = recognizer.processor(waveform, sampling_rate=16000, return_tensors="pt").input_features
    with recognizer.model.base_model.record_gates() as recorded, torch.no_grad():
        recognizer.model(input_features=features, decoder_input_ids=torch.tensor([[257]]), adapter_names=["ro"])
    encoder = torch.stack([gate[0] for name, gate in recorded.items() if "encoder" in name]).mean(0)
    assert np.array_equal(result.gates.positions, encoder[:40].numpy())
    assert 0 < result.gates.positions.mean() < 1
    assert "".join(word.text for word in result.gates.words).strip() == result.expert.text
    assert all(0 <= word.gate <= 1 for word in result.gates.words)


def test_a_language_without_an_expert_has_the_base_alone(recognizer):
    result = recognizer.transcribe(noise(0.8), "fr", lambda *_: None)
    assert result.expert is None and result.gates is None and result.base.language == "fr"


def test_a_language_is_detected(recognizer):
    assert recognizer.transcribe(noise(0.8), None, lambda *_: None).base.language in dict(
        (tag, name) for name, tag in recognizer.languages()
    )
    assert recognizer.languages()[0] == ("Belarusian · expert", "be")


def test_a_recording_that_is_too_long_or_no_recording_is_refused_by_name(recognizer, tmp_path):
    soundfile.write(tmp_path / "long.wav", noise(6), 16000)
    with pytest.raises(ValueError, match="^long.wav is longer than 5 s: give a part"):
        recognizer.read(tmp_path / "long.wav", print)
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(ValueError, match="text.wav") as error:
        recognizer.read(tmp_path / "text.wav", print)
    assert str(tmp_path) not in str(error.value)


def test_windows_cut_no_segment_that_fits():
    segments = [{"start": a, "end": b, "text": "x"} for a, b in ((0.0, 0.6), (0.7, 1.4), (3.0, 3.5))]
    found = list(windows(Transcript("ca", "ca", 5.2, segments), 1.0))
    assert [(round(start, 2), round(end, 2), len(inside)) for start, end, inside in found] == [
        (0.0, 0.6, 1),
        (0.6, 1.4, 1),
        (1.4, 2.4, 0),
        (2.4, 3.0, 0),
        (3.0, 4.0, 1),
        (4.0, 5.0, 0),
        (5.0, 5.2, 0),
    ]


def test_windows_end_with_a_segment_longer_than_the_context():
    segments = [{"start": 0.0, "end": 1.5, "text": "x"}]
    found = list(windows(Transcript("ca", "ca", 2.0, segments), 1.0))
    assert [(start, end, len(inside)) for start, end, inside in found] == [(0.0, 1.0, 1), (1.0, 2.0, 0)]


def test_a_word_has_the_mean_gate_of_its_tokens():
    tokenizer = build_tokenizer()
    tokens = tokenizer(" și ha", add_special_tokens=False).input_ids  # 4 and 3 bytes
    words = split_words(tokenizer, tokens, [1, 1, 0, 0, 1, 0], "ro")
    assert [(word.text, word.gate) for word in words] == [(" și", 0.5), (" ha", 0.5)]


def test_characters_are_words_where_no_spaces_are():
    tokenizer = build_tokenizer()
    tokens = tokenizer("你好", add_special_tokens=False).input_ids
    words = split_words(tokenizer, tokens, [1, 1, 1, 0, 0, 0], "zh")
    assert [(word.text, word.gate) for word in words] == [("你", 1.0), ("好", 0.0)]


def test_case_and_punctuation_are_no_difference():
    sides = plain_words("El gat, negre", "ca"), plain_words("el gat blanc dorm", "ca")
    assert differences(*sides, "ca") == ([False, False, True], [False, False, True, True])


def test_text_is_escaped():
    html = text_html(plain_words("<script>&", "ca"), [True])
    assert "<mark>&lt;script&gt;&amp;</mark>" in html and "<script>" not in html
    assert '"a&quot;.srt"' in download_html('a".srt', "1\n")


def test_bars_are_green_where_gates_are_open():
    html = waveform_html(noise(1.0), np.repeat([0.0, 1.0], 25))
    assert html.count("rgb(156, 156, 156)") == html.count("rgb(5, 150, 105)") == 50
    assert waveform_html(np.zeros(10, dtype=np.float32)).count("<rect") == 1


def test_examples_of_a_table_have_language_and_reference(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(0.4), 16000)
    (tmp_path / "metadata.csv").write_text("file_name,transcription,language\na.wav,Bon dia,ca\n")
    (example,) = find_examples([str(tmp_path / "metadata.csv")])
    assert (example.path.name, example.language, example.reference) == ("a.wav", "ca", "Bon dia")
    (tmp_path / "a.wav").write_text("no sound")
    with pytest.raises(ValueError, match="an example cannot be read"):
        find_examples([str(tmp_path / "metadata.csv")])
