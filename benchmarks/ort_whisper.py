"""transformers' own decoding with exported graphs as the model, to compare their tokens with PyTorch's."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import torch
from transformers import EncoderDecoderCache, GenerationConfig, WhisperConfig, WhisperForConditionalGeneration
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from peft_clsr.inference.exported import DECODER, ENCODER, ExportedExpert


class OrtWhisper(WhisperForConditionalGeneration):
    """A Whisper whose `generate` runs the graphs of an export. Make it with [`ort_whisper`]."""

    graphs: tuple[onnxruntime.InferenceSession, onnxruntime.InferenceSession]

    def forward(self, decoder_input_ids=None, encoder_outputs=None, past_key_values=None, **unused: Any):
        decoder = self.graphs[1]
        states = encoder_outputs[0].numpy()
        first = past_key_values is None or past_key_values.get_seq_length() == 0
        inputs = {"input_ids": decoder_input_ids.numpy(), "encoder_hidden_states": states}
        names = [value.name for value in decoder.get_outputs()][1:]
        for name in names:
            _, layer, side, kind = name.split(".")
            if first:
                heads, size = self.config.decoder_attention_heads, self.config.d_model
                past = np.zeros((0, heads, 0, size // heads), dtype=states.dtype)
            else:
                past = getattr(_cache(past_key_values, side).layers[int(layer)], f"{kind}s").numpy()
            inputs[name.replace("present", "past_key_values")] = past
        logits, *present = decoder.run(None, {**inputs, "use_cache_branch": np.array([not first])})
        found = dict(zip(names, map(torch.from_numpy, present), strict=True))
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        for layer in range(self.config.decoder_layers):
            for side in ("decoder", "encoder"):
                if first or side == "decoder":
                    pair = [found[f"present.{layer}.{side}.{kind}"] for kind in ("key", "value")]
                else:  # it does not change
                    old = _cache(past_key_values, side).layers[layer]
                    pair = [old.keys, old.values]
                _cache(cache, side).update(*pair, layer)
            cache.is_updated[layer] = True
        return Seq2SeqLMOutput(logits=torch.from_numpy(logits), past_key_values=cache)


def ort_whisper(expert: ExportedExpert, precision: str = "float32", threads: int = 0) -> OrtWhisper:
    """The graphs of an export, as a model of transformers in evaluation mode."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = OrtWhisper(WhisperConfig.from_pretrained(expert.folder)).eval()
    model.generation_config = GenerationConfig.from_pretrained(expert.folder)
    paths = [str(expert.graph(name, precision)) for name in (ENCODER, DECODER)]
    model.graphs = tuple(onnxruntime.InferenceSession(path, options) for path in paths)

    def encode(input_features: torch.Tensor, **unused: Any) -> BaseModelOutput:
        (states,) = model.graphs[0].run(None, {"input_features": input_features.numpy()})
        return BaseModelOutput(last_hidden_state=torch.from_numpy(states))

    model.model.encoder.forward = encode
    return model


def _cache(caches: EncoderDecoderCache, side: str) -> DynamicCache:
    return caches.self_attention_cache if side == "decoder" else caches.cross_attention_cache
