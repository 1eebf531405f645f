"""Turn a CTranslate2 Whisper model into a folder that transformers loads.

    python -m examples.demo.whisper_from_ctranslate2 MODEL.BIN CONFIG.JSON TOKENIZER.JSON OUT_DIR

A CTranslate2 file is, little-endian: format version, specification name, revision, number of variables; then each
variable as name, rank, dimensions, data type, size in bytes, bytes. Attention projections are stored joined: query,
key and value in self-attention, key and value in cross-attention.
"""

import json
import os
import shutil
import struct
import sys

import numpy as np
import torch
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizerFast,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def read_variables(model_bin: str) -> dict[str, np.ndarray]:
    """Read every variable of the CTranslate2 file `model_bin`.

    Raises:
        ValueError: If the file is no CTranslate2 Whisper model, ends too early, or has quantized (integer) weights.
    """
    with open(model_bin, "rb") as file:

        def read(size: int) -> bytes:
            data = file.read(size)
            if len(data) < size:
                raise ValueError(f"'{model_bin}' ends too early: fetch it again, and join all of its parts.")
            return data

        def number(code: str) -> int:
            return struct.unpack("<" + code, read(struct.calcsize("<" + code)))[0]

        def text() -> str:
            return read(number("H"))[:-1].decode()  # zero-terminated

        _version = number("I")
        try:
            specification = text()
        except UnicodeDecodeError:
            specification = None
        if specification != "WhisperSpec":
            raise ValueError(f"'{model_bin}' is no CTranslate2 Whisper model: its specification is {specification!r}.")
        _revision = number("I")
        variables = {}
        for _ in tqdm(range(number("I")), desc="Reading weights", unit="tensor"):
            name = text()
            shape = [number("I") for _ in range(number("B"))]
            dtype = DTYPES[number("B")]
            variables[name] = np.frombuffer(read(number("I")), dtype=dtype).reshape(shape)
    weight = variables["encoder/layer_0/ffn/linear_0/weight"]
    if not np.issubdtype(weight.dtype, np.floating):
        raise ValueError(f"'{model_bin}' has {weight.dtype} weights; convert from a float16 or float32 model instead.")
    return variables


def build_model(variables: dict[str, np.ndarray]) -> WhisperForConditionalGeneration:
    """Build the float32 transformers model that has the weights in `variables` (from `read_variables`)."""
    state = {}

    def tensor(source: str) -> torch.Tensor:
        return torch.from_numpy(variables[source].astype(np.float32))

    def count_layers(side: str) -> int:
        return sum(name.startswith(f"{side}/layer_") and name.endswith("/ffn/linear_0/weight") for name in variables)

    def norm(target: str, source: str) -> None:
        state[f"{target}.weight"], state[f"{target}.bias"] = tensor(f"{source}/gamma"), tensor(f"{source}/beta")

    def linear(target: str, source: str) -> None:
        state[f"{target}.weight"], state[f"{target}.bias"] = tensor(f"{source}/weight"), tensor(f"{source}/bias")

    def projections(attention: str, letters: str, source: str) -> None:
        weights = tensor(f"{source}/weight").chunk(len(letters))
        biases = tensor(f"{source}/bias").chunk(len(letters))
        for letter, weight, bias in zip(letters, weights, biases, strict=True):
            state[f"{attention}.{letter}_proj.weight"] = weight.clone()
            if letter != "k":  # Whisper's key projections have no bias
                state[f"{attention}.{letter}_proj.bias"] = bias.clone()

    for i in (1, 2):
        linear(f"model.encoder.conv{i}", f"encoder/conv{i}")
    state["model.decoder.embed_tokens.weight"] = tensor("decoder/embeddings/weight")
    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"] = tensor(f"{side}/position_encodings/encodings")
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for i in range(count_layers(side)):
            source, target = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            norm(f"{target}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
            projections(f"{target}.self_attn", "qkv", f"{source}/self_attention/linear_0")
            linear(f"{target}.self_attn.out_proj", f"{source}/self_attention/linear_1")
            if side == "decoder":
                norm(f"{target}.encoder_attn_layer_norm", f"{source}/attention/layer_norm")
                linear(f"{target}.encoder_attn.q_proj", f"{source}/attention/linear_0")
                projections(f"{target}.encoder_attn", "kv", f"{source}/attention/linear_1")
                linear(f"{target}.encoder_attn.out_proj", f"{source}/attention/linear_2")
            norm(f"{target}.final_layer_norm", f"{source}/ffn/layer_norm")
            linear(f"{target}.fc1", f"{source}/ffn/linear_0")
            linear(f"{target}.fc2", f"{source}/ffn/linear_1")

    vocab_size, d_model = state["model.decoder.embed_tokens.weight"].shape
    ffn_dim = state["model.encoder.layers.0.fc1.weight"].shape[0]
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=vocab_size,
            d_model=d_model,
            encoder_layers=count_layers("encoder"),
            decoder_layers=count_layers("decoder"),
            encoder_attention_heads=d_model // 64,  # true of every Whisper
            decoder_attention_heads=d_model // 64,
            encoder_ffn_dim=ffn_dim,
            decoder_ffn_dim=ffn_dim,
            num_mel_bins=state["model.encoder.conv1.weight"].shape[1],
            max_source_positions=state["model.encoder.embed_positions.weight"].shape[0],
            max_target_positions=state["model.decoder.embed_positions.weight"].shape[0],
        )
    )
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing != ["proj_out.weight"] or unexpected:  # proj_out is tied to the embedding
        raise ValueError(f"The model is no Whisper as expected: missing weights {missing}, unexpected {unexpected}.")
    model.tie_weights()
    return model


def convert(model_bin: str, config_json: str, tokenizer_json: str, out_dir: str) -> None:
    """Write the multilingual Whisper of a CTranslate2 model to `out_dir` as a transformers folder, weights in float16.

    Args:
        model_bin (`str`): CTranslate2's weights, float16 or float32.
        config_json (`str`): CTranslate2's settings; its suppressed tokens and alignment heads are used.
        tokenizer_json (`str`): The tokenizer, with all special tokens and timestamps.
        out_dir (`str`): Made where it is missing.
    """
    model = build_model(read_variables(model_bin))
    os.makedirs(out_dir, exist_ok=True)
    extractor = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
    end = "<|endoftext|>"  # also pads, as in OpenAI's tokenizers
    tokenizer = WhisperTokenizerFast(
        tokenizer_file=tokenizer_json, bos_token=end, eos_token=end, pad_token=end, unk_token=end
    )
    WhisperProcessor(extractor, tokenizer).save_pretrained(out_dir)
    shutil.copyfile(tokenizer_json, os.path.join(out_dir, "tokenizer.json"))  # re-saving loses the BPE merges
    tokenizer = WhisperProcessor.from_pretrained(out_dir).tokenizer

    def token_id(token: str) -> int:
        return tokenizer.get_vocab()[f"<|{token}|>"]

    vocab = tokenizer.get_vocab()
    with open(config_json, encoding="utf-8") as file:
        settings = json.load(file)
    special = {
        "bos_token_id": token_id("endoftext"),
        "eos_token_id": token_id("endoftext"),
        "pad_token_id": token_id("endoftext"),
        "decoder_start_token_id": token_id("startoftranscript"),
    }
    model.config.update(special)  # WhisperConfig's defaults are those of the English-only models
    model.generation_config = GenerationConfig(
        **special,
        max_length=model.config.max_target_positions,
        is_multilingual=True,
        return_timestamps=False,
        max_initial_timestamp_index=50,
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=[*tokenizer.encode(" ", add_special_tokens=False), token_id("endoftext")],
        alignment_heads=settings["alignment_heads"],
        lang_to_id={f"<|{code}|>": token_id(code) for code in LANGUAGES if f"<|{code}|>" in vocab},
        task_to_id={task: token_id(task) for task in ("transcribe", "translate")},
        no_timestamps_token_id=token_id("notimestamps"),
        prev_sot_token_id=token_id("startofprev"),
    )
    model.half().save_pretrained(out_dir)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    convert(*sys.argv[1:])
