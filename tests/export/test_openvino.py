"""Models of OpenVINO: PyTorch's logits with their caches as states, and transcripts of OpenVINO GenAI."""

import json

import numpy as np
import pytest
import torch

openvino = pytest.importorskip("openvino")
genai = pytest.importorskip("openvino_genai")
pytest.importorskip("nncf")
pytest.importorskip("transformers", minversion="5.23")
from helpers import noise

from peft_clsr import export_model

IN_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}  # by default, CPUs with instructions for bfloat16 use them


@pytest.fixture
def exported(export_once, bilingual, processor):
    """`exported("full", "int8")` is the folder of the Catalan expert of `bilingual("full")`."""

    def get(kind="low-rank", precision="float32"):
        settings = {"processor": processor, "format": "openvino", "precision": precision}
        return export_once(
            f"openvino/{kind}/{precision}", lambda folder: export_model(bilingual(kind), "ca", folder, **settings)
        )

    return get


class Graphs:
    """Encoder and decoder of a folder, on the CPU."""

    def __init__(self, folder):
        self.encoder, self.decoder = (
            openvino.Core()
            .compile_model(folder / f"openvino_{name}_model.xml", "CPU", IN_FLOAT32)
            .create_infer_request()
            for name in ("encoder", "decoder")
        )

    def logits(self, features, tokens, prompt):
        """Logits of a prompt of so many tokens, then of one token at a time."""
        states = self.encoder.infer({"input_features": features.numpy()})["last_hidden_state"].copy()
        self.decoder.reset_state()
        found = []
        for part in (tokens[:, :prompt], *tokens[:, prompt:].split(1, dim=1)):
            inputs = {"input_ids": part.numpy(), "encoder_hidden_states": states}
            inputs["beam_idx"] = np.arange(len(tokens), dtype=np.int32)
            found.append(torch.tensor(self.decoder.infer(inputs)["logits"]))
        return torch.cat(found, dim=1)


def sample(batch, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 80, 100, generator=generator), torch.randint(97, 122, (batch, 7), generator=generator)


@pytest.mark.parametrize("kind", ["low-rank", "full"])
def test_logits_are_those_of_pytorch_for_each_recording_after_another(exported, bilingual, kind):
    model, graphs = bilingual(kind), Graphs(exported(kind))
    for seed, (batch, prompt) in enumerate([(1, 1), (3, 4), (1, 2)]):
        features, tokens = sample(batch, seed)
        with torch.no_grad():
            model.set_adapter("ca")
            expected = model(input_features=features, decoder_input_ids=tokens).logits
            model.set_adapter("ro")
            others = model(input_features=features, decoder_input_ids=tokens).logits
        assert (expected - others).abs().max() > 0.1
        torch.testing.assert_close(graphs.logits(features, tokens, prompt), expected, atol=1e-4, rtol=1e-4)


def test_weights_in_int8_are_smaller_and_change_little(exported, bilingual):
    model, folder = bilingual("full"), exported("full", "int8")
    model.set_adapter("ca")
    features, tokens = sample(1)
    with torch.no_grad():
        expected = model(input_features=features, decoder_input_ids=tokens).logits
    sizes = [(path / "openvino_decoder_model.bin").stat().st_size for path in (folder, exported("full"))]
    assert sizes[0] < 0.5 * sizes[1]
    assert 0 < (Graphs(folder).logits(features, tokens, 3) - expected).abs().max() < 0.5


def test_genai_transcribes_the_tokens_of_pytorch(exported, bilingual, processor):
    model, folder = bilingual(), exported()
    assert json.loads((folder / "expert.json").read_text())["language"] == "ca"
    pipeline = genai.WhisperPipeline(str(folder), "CPU", **IN_FLOAT32)
    settings = {"task": "transcribe", "max_new_tokens": 8}
    texts = []
    for seed in range(3):  # other tokens than text, and in each turn other letters, are suppressed
        letters = [token for token in range(33, 93) if token % 3 != seed]
        settings["suppress_tokens"] = [token for token in range(len(processor.tokenizer)) if token not in letters]
        waveform = noise(0.9, seed=seed)
        features = processor.feature_extractor(waveform, sampling_rate=16000, return_tensors="pt").input_features
        tokens = model.generate(input_features=features, language="ca", **settings)
        texts.append(processor.tokenizer.decode(tokens[0], skip_special_tokens=True))
        assert pipeline.generate(waveform.tolist(), language="<|ca|>", **settings).texts[0] == texts[-1]
    assert len(set(texts)) > 1


def test_a_folder_with_an_export_is_refused(exported, bilingual, processor):
    with pytest.raises(ValueError, match="not an empty folder: give another one"):
        export_model(bilingual(), "ca", exported(), processor=processor, format="openvino", precision="int8")


def test_the_command_writes_a_folder_for_each_precision(export, tmp_path):
    status, printed = export(
        ["expert", "mixed", "shared", "mixed"], "--format", "openvino", "--precision", "float32", "float16"
    )
    assert status == 0, printed
    assert "| OpenVINO, float32 " in printed and "| OpenVINO, float16 " in printed
    sizes = [
        (tmp_path / "out" / precision / "openvino_decoder_model.bin").stat().st_size
        for precision in ("float16", "float32")
    ]
    assert sizes[0] < 0.6 * sizes[1]
