import math
from contextlib import contextmanager
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from torch import nn
from transformers import EvalPrediction, GenerationConfig, Seq2SeqTrainer, Seq2SeqTrainingArguments, WhisperConfig

from peft_clsr import error_rates, gate_means, make_compute_metrics, transcribe
from peft_clsr.evaluation.error_rates import format_rates
from peft_clsr.inference.transcribe import transcribe_files
from peft_clsr.multilingual import check_languages


def test_error_rates_are_those_counted_by_hand():
    pytest.importorskip("jiwer")
    # 1 substitution and 1 deletion in 3 + 2 words.
    rates = error_rates(["el gat blanc", "bona"], ["El gat, negre!", "Bona nit."], language="ca")
    assert rates["ca"]["wer"] == pytest.approx(2 / 5)
    # 5 substituted letters of "negre" and the 4 deleted characters of " nit", of 12 + 8 characters.
    assert rates["ca"]["cer"] == pytest.approx(9 / 20)
    assert (rates["ca"]["utterances"], rates["ca"]["skipped"]) == (2, 0)


def test_diacritics_count_but_case_and_punctuation_do_not():
    pytest.importorskip("jiwer")
    assert error_rates(["POMA, verda"], ["poma «verda»!"])["all"]["wer"] == 0.0
    rates = error_rates(["fata"], ["fată"])["all"]
    assert (rates["wer"], rates["cer"]) == (1.0, 0.25)


def test_languages_are_scored_apart():
    pytest.importorskip("jiwer")
    rates = error_rates(["a b", "c d", "x"], ["a b", "c e", "y"], ["ro", "ca", "ro"])
    assert rates["ro"]["wer"] == pytest.approx(1 / 3)
    assert rates["ca"]["wer"] == pytest.approx(1 / 2)
    assert (rates["ro"]["utterances"], rates["ca"]["utterances"]) == (2, 1)


def test_references_that_normalize_to_nothing_are_skipped_and_counted():
    pytest.importorskip("jiwer")
    rates = error_rates(["la la", "a b"], ["♪ (music)", "a c"], ["ro", "ro"])["ro"]
    assert (rates["wer"], rates["utterances"], rates["skipped"]) == (0.5, 1, 1)
    with pytest.warns(UserWarning, match="none of the 1 references in 'all' can be scored.*'♪!' .row 0.: its rates"):
        empty = error_rates(["la la"], ["♪!"])["all"]
    assert math.isnan(empty["wer"]) and math.isnan(empty["cer"])
    assert (empty["utterances"], empty["skipped"]) == (0, 1)
    assert error_rates([""], ["a b"])["all"]["wer"] == 1.0


def test_lists_of_other_lengths_are_refused():
    pytest.importorskip("jiwer")
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        error_rates(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="1 languages for 2 references"):
        error_rates(["a", "b"], ["a", "b"], ["ro"])


@pytest.mark.parametrize("missing", [None, math.nan, 3])
def test_a_missing_text_is_an_error_that_names_the_row(missing):
    pytest.importorskip("jiwer")
    with pytest.raises(ValueError, match=rf"the reference of rows 1, 3 is {missing}, expected a string"):
        error_rates(["a"] * 4, ["a", missing, "b", missing])
    with pytest.raises(ValueError, match=rf"the prediction of row 1 is {missing}, .*\"\" if nothing was heard"):
        error_rates(["a", missing], ["a", "b"])
    with pytest.raises(ValueError, match=rf"the language of row 0 is {missing}"):
        error_rates(["a"], ["a"], [missing])


def test_nothing_to_score_is_a_warning_that_names_the_language():
    pytest.importorskip("jiwer")
    with pytest.warns(UserWarning, match="language 'ca' has no reference to score: its rates are NaN"):
        assert math.isnan(error_rates([], [], language="ca")["ca"]["wer"])
    with pytest.warns(UserWarning, match="the 7 references in 'ro' .*rows 1, 2, 3, 4, 5 and 2 more.: its"):
        rates = error_rates([""] * 8, ["a", *["..."] * 7], ["ca", *["ro"] * 7])
    assert rates["ca"]["wer"] == 1.0


def test_rows_of_a_table_are_taken_in_order():
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("jiwer")
    table = pandas.DataFrame({"heard": ["x", "a b", "c"], "spoken": ["y", "a c", "c"]}).iloc[1:]
    assert error_rates(table["heard"], table["spoken"])["all"]["wer"] == 1 / 3


def test_each_language_has_the_rate_to_read():
    pytest.importorskip("jiwer")
    # Nobody separates 你好 and 世界. One character of four is wrong, in one utterance of one "word".
    rates = error_rates(["你 好, 世间", "bon dia"], ["你好，世界！", "bon vespre"], ["zh", "ca"])
    assert (rates["zh"]["rate"], rates["zh"]["cer"], rates["zh"]["wer"]) == ("cer", 1 / 4, 1.0)
    assert (rates["ca"]["rate"], rates["ca"]["wer"]) == ("wer", 1 / 2)
    assert format_rates(rates["zh"]) == "CER 25.0%, WER 100.0%"
    assert format_rates(rates["ca"] | {"cer": 0.6, "skipped": 2}) == (
        "WER 50.0%, CER 60.0%; transcripts without words, not scored: 2"
    )


@pytest.fixture
def evaluated(tiny_processor):
    """Predictions and labels as `Seq2SeqTrainer` gathers them, of (language, heard, spoken)."""
    pytest.importorskip("jiwer")
    tokenizer = tiny_processor.tokenizer

    def build(*utterances):
        sides = []
        for texts in ([heard for _, heard, _ in utterances], [spoken for _, _, spoken in utterances]):
            prompts = [f"<|{language}|><|transcribe|><|notimestamps|>" for language, _, _ in utterances]
            rows = [
                tokenizer(prompt + text + "<|endoftext|>", add_special_tokens=False).input_ids
                for prompt, text in zip(prompts, texts, strict=True)
            ]
            width = max(map(len, rows)) + 2
            sides.append(np.array([row + [-100] * (width - len(row)) for row in rows]))
        return EvalPrediction(predictions=sides[0], label_ids=sides[1])

    return build


def test_metrics_are_means_over_languages_not_utterances(tiny_processor, evaluated):
    metrics = make_compute_metrics(tiny_processor)(
        evaluated(("ca", " a b", " a b"), ("ro", " a b c d", " a x y z"), ("ca", " a b", " a c"), ("ca", "", " ♪!"))
    )
    assert metrics == pytest.approx(
        {"wer_ca": 1 / 4, "wer_ro": 3 / 4, "wer": 1 / 2, "cer_ca": 1 / 6, "cer_ro": 3 / 7, "cer": (1 / 6 + 3 / 7) / 2}
        | {"error_rate": 1 / 2}
    )


def test_the_mean_error_rate_takes_cer_of_languages_without_spaces(tiny_processor, evaluated, monkeypatch):
    # The tiny vocabulary has no such language, so Bulgarian stands for one.
    monkeypatch.setattr(
        "peft_clsr.evaluation.error_rates.leading_rate", lambda language: "cer" if language == "bg" else "wer"
    )
    metrics = make_compute_metrics(tiny_processor)(evaluated(("ca", " a b", " a c"), ("bg", "abcd", "abce")))
    assert (metrics["wer_bg"], metrics["cer_bg"], metrics["wer_ca"]) == (1.0, 1 / 4, 1 / 2)
    assert metrics["error_rate"] == (1 / 2 + 1 / 4) / 2 and metrics["wer"] == (1 / 2 + 1.0) / 2


def test_a_language_without_a_scorable_reference_is_left_out(tiny_processor, evaluated):
    compute_metrics = make_compute_metrics(tiny_processor)
    with pytest.warns(UserWarning, match="none of the 1 references in 'ro' can be scored.*'.*♪' .row 1."):
        metrics = compute_metrics(evaluated(("ca", " a", " a"), ("ro", " la", " ♪")))
    assert metrics == {
        "error_rate": 0.0,
        "wer": 0.0,
        "wer_ca": 0.0,
        "cer": 0.0,
        "cer_ca": 0.0,
    }
    with pytest.raises(ValueError, match="none of the 1 references can be scored"):
        compute_metrics(evaluated(("ro", " la", " ♪")))


def test_labels_without_a_language_and_predictions_that_are_logits_are_refused(tiny_processor, evaluated):
    compute_metrics = make_compute_metrics(tiny_processor)
    both = evaluated(("ca", " a", " a"), ("ro", " a", " a"))
    both.label_ids[1, 0] = -100
    with pytest.raises(ValueError, match="labels of utterance 1 have no language token"):
        compute_metrics(both)
    both.predictions = np.zeros((2, 3, 280))
    with pytest.raises(ValueError, match="predict_with_generate=True"):
        compute_metrics(both)


def test_a_trainer_evaluates_each_utterance_in_its_language(tiny_whisper, tiny_processor, tmp_path):
    pytest.importorskip("jiwer")
    pytest.importorskip("soundfile")
    from peft_clsr import DataCollatorSpeechSeq2SeqWithPadding, encode_labels

    model, tokenizer = tiny_whisper(init_std=1.0), tiny_processor.tokenizer
    torch.manual_seed(1)
    utterances = [("ca", "bon dia"), ("ro", "bună ziua"), ("ca", "adéu")]
    examples = [
        {"input_features": torch.randn(80, 100), "labels": encode_labels(tokenizer, text, code), "language": code}
        for code, text in utterances
    ]
    heard = [transcribe(model, tiny_processor, [example], example["language"])[0] for example in examples]
    expected = error_rates(heard, [text for _, text in utterances], [code for code, _ in utterances])
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            tmp_path, predict_with_generate=True, remove_unused_columns=False, report_to="none", use_cpu=True
        ),
        eval_dataset=examples,
        data_collator=DataCollatorSpeechSeq2SeqWithPadding(tiny_processor),
        compute_metrics=make_compute_metrics(tiny_processor),
    )
    metrics = trainer.evaluate()
    for name in ("wer", "cer"):
        assert metrics[f"eval_{name}"] == pytest.approx((expected["ca"][name] + expected["ro"][name]) / 2)
        assert metrics[f"eval_{name}_ca"] == pytest.approx(expected["ca"][name])


def test_transcripts_are_those_of_generate_one_by_one_and_modes_are_restored(tiny_whisper, tiny_processor):
    model = tiny_whisper(init_std=1.0)
    torch.manual_seed(1)
    examples = [{"input_features": torch.randn(80, 100)} for _ in range(3)]
    expected = []
    for example in examples:
        tokens = model.generate(
            input_features=example["input_features"][None], language="ro", task="transcribe", max_new_tokens=6
        )
        expected.append(tiny_processor.decode(tokens[0], skip_special_tokens=True).strip())
    model.train()
    model.model.encoder.eval()
    assert transcribe(model, tiny_processor, examples, "romanian", batch_size=2, max_new_tokens=6) == expected
    assert model.training and model.model.decoder.training and not model.model.encoder.training
    assert any(expected)


def test_a_peft_model_transcribes_at_a_cut_context(tiny_whisper, tiny_processor):
    from peft import LoraConfig, get_peft_model

    from peft_clsr import set_audio_context

    examples = [{"input_features": torch.randn(80, 50)} for _ in range(3)]
    plain, wrapped = tiny_whisper(), get_peft_model(tiny_whisper(), LoraConfig(target_modules=["fc1"]))
    for model in (plain, wrapped):
        set_audio_context(model, None, 0.5)
    # A fresh LoRA changes nothing; without max_new_tokens the decoder's 64 positions are the limit.
    assert transcribe(wrapped, tiny_processor, examples, "ro") == transcribe(plain, tiny_processor, examples, "ro")


@pytest.mark.parametrize(
    ("dataset", "named"),
    [
        ([{"audio": "a.wav", "sentence": "a"}], "no 'input_features', it has audio, sentence: prepare it first"),
        (["a.wav"], "no 'input_features', its items are of type str: prepare it first"),
        ({"train": [], "test": []}, r"a dict of the splits train, test: give one, dataset\['test'\]"),
        (datasets.Dataset.from_dict({"audio": ["a.wav"]}), "it has audio: prepare it first"),
        (datasets.DatasetDict(test=datasets.Dataset.from_dict({"audio": ["a.wav"]})), "a dict of the splits test"),
    ],
)
def test_a_dataset_that_is_not_prepared_is_named(tiny_whisper, tiny_processor, dataset, named):
    with pytest.raises(ValueError, match=named):
        transcribe(tiny_whisper(), tiny_processor, dataset, "ro")


def test_a_model_that_cannot_be_told_a_language_is_named(tiny_whisper, tiny_processor):
    model = tiny_whisper()
    current = model.generation_config
    examples = [{"input_features": torch.randn(80, 100)}]
    model.generation_config = GenerationConfig(is_multilingual=True)
    with pytest.raises(
        ValueError, match=r"outdated generation config, which lacks the languages \(lang_to_id, .*take"
    ):
        transcribe(model, tiny_processor, examples, "ro")
    with pytest.raises(ValueError, match="outdated generation config"):
        next(transcribe_files(model, tiny_processor, ["any.wav"], ["ro"]))
    model.generation_config = GenerationConfig(is_multilingual=False)
    with pytest.raises(ValueError, match="knows English only, expected a multilingual Whisper"):
        transcribe(model, tiny_processor, examples, "ro")
    model.generation_config = current
    assert len(transcribe(model, tiny_processor, examples, "ro")) == 1


@pytest.mark.parametrize(
    ("d_model", "layers", "mels", "name"),
    [(384, 4, 80, "tiny"), (1280, 32, 80, "large-v2"), (1280, 32, 128, "large-v3"), (1280, 4, 128, "large-v3-turbo")],
)
def test_the_current_generation_config_is_that_of_the_same_size(d_model, layers, mels, name):
    config = WhisperConfig(d_model=d_model, decoder_layers=layers, num_mel_bins=mels)
    with pytest.raises(ValueError, match=f'from_pretrained\\("openai/whisper-{name}"\\)'):
        check_languages(config, GenerationConfig(), "it")
    with pytest.raises(ValueError, match="knows English only"):  # OpenAI's, without is_multilingual
        check_languages(WhisperConfig(vocab_size=51864), GenerationConfig(), "it")
    with pytest.raises(ValueError, match="hf download me/whisper --local-dir FOLDER, save .*, and give the folder"):
        check_languages(config, GenerationConfig(), "it", source="me/whisper")


class Gated(nn.Module):
    """A stand-in for a CLSR model: gates that are known in advance."""

    def __init__(self, encoder_gates, decoder_gates):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.gates, self.rows, self.device, self.dtype = (encoder_gates, decoder_gates), 0, "cpu", torch.float32
        self.base_model = SimpleNamespace(record_gates=self.record_gates)

    @contextmanager
    def record_gates(self):
        self.recorded = {}
        yield self.recorded

    def forward(self, input_features, attention_mask, labels):
        assert not self.training
        rows = slice(self.rows, self.rows + len(labels))
        self.rows += len(labels)
        self.recorded["encoder.layers.0"] = self.gates[0][rows, : attention_mask.shape[1] // 2]
        self.recorded["decoder.layers.0"] = self.gates[1][rows, : labels.shape[1]]


def test_gate_means_leave_padding_out_and_weigh_tokens_not_batches(tiny_processor):
    from peft_clsr import DataCollatorSpeechSeq2SeqWithPadding

    examples = [
        {"input_features": torch.zeros(80, 8), "attention_mask": [1] * frames + [0] * (8 - frames), "labels": labels}
        for frames, labels in ((8, [1, 2, 3]), (3, [1]), (2, [1, 2]))
    ]
    # Rows are utterances; 1s beyond the audio (4, 2 and 1 tokens) or the labels (3, 1 and 2) are padding.
    encoder = torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1]])
    decoder = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 1]])
    model = Gated(encoder, decoder).train()
    means = gate_means(model, examples, DataCollatorSpeechSeq2SeqWithPadding(tiny_processor), batch_size=2)
    assert means == pytest.approx({"encoder.layers.0": 4 / 7, "decoder.layers.0": 3 / 6})
    assert model.training


def test_gate_means_read_the_text_before_a_window(tiny_whisper, tiny_processor):
    from helpers import random_clsr

    from peft_clsr import DataCollatorSpeechSeq2SeqWithPadding

    model = random_clsr(tiny_whisper(init_std=0.2), "ca")
    labels, prompt = list(range(40, 46)), list(range(60, 75))
    example = {"input_features": torch.randn(80, 100), "labels": labels, "prompt_ids": prompt}
    collator = DataCollatorSpeechSeq2SeqWithPadding(tiny_processor)
    start = model.config.decoder_start_token_id
    with torch.no_grad(), model.base_model.record_gates() as gates:
        inputs = torch.tensor([[*prompt, start, *labels[:-1]]])
        model(input_features=example["input_features"][None], decoder_input_ids=inputs)
    expected = {
        name: float((gate[0, len(prompt) :] if "decoder" in name else gate).mean()) for name, gate in gates.items()
    }
    assert gate_means(model, [example], collator) == pytest.approx(expected)
    assert gate_means(model, [{**example, "prompt_ids": []}], collator) != pytest.approx(expected)


def test_the_plot_is_a_png_and_leaves_pyplot_alone(tmp_path):
    pytest.importorskip("matplotlib")
    import sys

    from peft_clsr import plot_gate_means

    gates = {f"model.{side}.layers.{i}": 0.1 * i for side in ("encoder", "decoder") for i in range(3)}
    sys.modules.pop("matplotlib.pyplot", None)
    plot_gate_means(gates, tmp_path / "gates.png", title="ca")
    assert (tmp_path / "gates.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "matplotlib.pyplot" not in sys.modules
    with pytest.raises(ValueError, match="no gate means"):
        plot_gate_means({}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
