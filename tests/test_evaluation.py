import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from peft_clsr.evaluation import error_rates, gate_means, transcribe


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

    pytest.importorskip("soxr")
    from peft_clsr.trainer.audio import set_audio_context

    examples = [{"input_features": torch.randn(80, 50)} for _ in range(3)]
    plain, wrapped = tiny_whisper(), get_peft_model(tiny_whisper(), LoraConfig(target_modules=["fc1"]))
    for model in (plain, wrapped):
        set_audio_context(model, None, 0.5)
    # A fresh LoRA changes nothing; without max_new_tokens the decoder's 64 positions are the limit.
    assert transcribe(wrapped, tiny_processor, examples, "ro") == transcribe(plain, tiny_processor, examples, "ro")


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
    from peft_clsr.trainer.collator import DataCollatorSpeechSeq2SeqWithPadding

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


def test_the_plot_is_a_png_and_leaves_pyplot_alone(tmp_path):
    pytest.importorskip("matplotlib")
    import sys

    from peft_clsr.plots import plot_gate_means

    gates = {f"model.{side}.layers.{i}": 0.1 * i for side in ("encoder", "decoder") for i in range(3)}
    sys.modules.pop("matplotlib.pyplot", None)
    plot_gate_means(gates, tmp_path / "gates.png", title="ca")
    assert (tmp_path / "gates.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "matplotlib.pyplot" not in sys.modules
    with pytest.raises(ValueError, match="no gate means"):
        plot_gate_means({}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
