"""Every architecture whose FFN the tuner knows by itself, gated ones included."""

import pytest
import torch
from helpers import QUIET, clsr, randomize
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    M2M100Config,
    MBartConfig,
    MistralConfig,
    MT5Config,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
    Speech2TextConfig,
    Speech2TextForConditionalGeneration,
    T5Config,
    UMT5Config,
)

from peft_clsr import CLSRConfig
from peft_clsr.tuner.architectures import FFN_PROJECTIONS

BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "decoder_start_token_id": 2,
}
T5 = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0}
GATED = {**T5, "feed_forward_proj": "gated-gelu"}
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
OPT = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 16}
OPT |= {"dropout": 0.0, "max_position_embeddings": 64}
CONFIGS = {
    "bart": (BartConfig, BART),
    "mbart": (MBartConfig, BART),
    "m2m_100": (M2M100Config, BART),
    "t5": (T5Config, T5),
    "t5 v1.1": (T5Config, GATED),
    "mt5": (MT5Config, GATED),
    "umt5": (UMT5Config, GATED),
    "opt": (OPTConfig, OPT),
    "llama": (LlamaConfig, LLAMA),
    "mistral": (MistralConfig, LLAMA),
    "qwen2": (Qwen2Config, LLAMA),
    "qwen3": (Qwen3Config, {**LLAMA, "head_dim": 8}),
    "gemma": (GemmaConfig, {**LLAMA, "head_dim": 8}),
    "gemma2": (Gemma2Config, {**LLAMA, "head_dim": 8}),
}


def test_every_known_model_type_is_tested():
    assert {name.split()[0] for name in CONFIGS} | {"whisper", "speech_to_text"} == set(FFN_PROJECTIONS)


@pytest.fixture(params=CONFIGS)
def build(request):
    config_class, kwargs = CONFIGS[request.param]

    def build():
        torch.manual_seed(0)
        config = config_class(vocab_size=60, **kwargs)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        return auto.from_config(config, dtype=torch.float32).eval()

    return build


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, 60, (3, 20), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 11:] = 0
    labels = torch.where(attention_mask == 1, input_ids, -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@pytest.mark.parametrize("training", [False, True])
def test_fresh_adapter_equals_base(build, inputs, training):
    base, model = build().train(training), clsr(build()).train(training)
    with torch.no_grad():
        assert (model(**inputs).logits - base(**inputs).logits).abs().max() <= 1e-6


def test_one_gate_a_feed_forward_network(build, inputs):
    model = clsr(build())
    with torch.no_grad(), model.base_model.record_gates() as gates:
        model(**inputs)
    assert len(gates) == (4 if model.config.is_encoder_decoder else 2)
    assert sum("clsr_gate_out" in name for name, _ in model.named_parameters()) == len(gates)


def test_grouping_tokens_and_computing_both_paths_agree(build, inputs, monkeypatch):
    model = randomize(clsr(build()), scale=0.3)
    with torch.no_grad(), model.base_model.record_gates() as gates:
        grouped_logits = model(**inputs).logits
        values = torch.cat([gate.flatten() for gate in gates.values()])
        assert 0 < values.mean() < 1
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as under torch.compile
        torch.testing.assert_close(model(**inputs).logits, grouped_logits, atol=1e-4, rtol=1e-4)


def test_every_gate_and_expert_gets_a_gradient_and_survives_saving(build, inputs, tmp_path):
    model = randomize(clsr(build()), scale=0.3).train()
    model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == ("clsr_" in name), name
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path, subfolder="ca", adapter_name="ca").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_reentrant_checkpointing_gives_the_same_gradients_where_no_loss_needs_the_budget(build, inputs):
    """
    With labels the budget loss would train nothing, silently, and it is refused; without, nothing is lost.

    In float64: checkpointing sums gradients in another order, and in float32 that changes large ones visibly.
    """
    del inputs["labels"]
    gradients = []
    for checkpointing in (False, True):
        model = randomize(clsr(build()), scale=0.3).double().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            model.enable_input_require_grads()
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        model(**inputs).logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-6)
    with pytest.raises(RuntimeError, match="gate values"):
        model.base_model.budget_loss()


def test_task_types_train_and_generate_with_a_language_a_sample(build, inputs):
    task_type = "SEQ_2_SEQ_LM" if build().config.is_encoder_decoder else "CAUSAL_LM"
    config = CLSRConfig.paper(**QUIET, gate_dim=8, task_type=task_type, init_weights=False)
    model = get_peft_model(build(), config, adapter_name="ca")
    model.add_adapter("uk", config)
    with torch.no_grad():
        without_budget = model.train()(**inputs).loss - model.base_model.budget_loss()
    config.budget_weight = 0.0
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).loss, without_budget)

    names = ["uk", "__base__", "ca"]
    prompt = {"input_ids": inputs["input_ids"], "attention_mask": torch.ones_like(inputs["input_ids"])}
    options = {"num_beams": 2, "do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    with torch.no_grad():
        logits = [model.eval()(**inputs, adapter_names=[name] * 3).logits for name in names]
    assert not any(torch.allclose(logits[a], logits[b], atol=1e-4) for a, b in ((0, 1), (1, 2), (2, 0)))
    mixed = model.generate(**prompt, **options, adapter_names=names)
    for row, name in enumerate(names):
        one = {key: value[row : row + 1] for key, value in prompt.items()}
        alone = model.generate(**one, **options, adapter_names=[name])
        assert torch.equal(mixed[row : row + 1], alone), name
        if name != "__base__":
            model.set_adapter(name)
            assert torch.equal(model.generate(**one, **options), alone), name


def test_speech_to_text_takes_audio_as_whisper_does(tmp_path):
    def build():
        torch.manual_seed(0)
        sizes = {"vocab_size": 60, "conv_channels": 16, "input_feat_per_channel": 8, "max_source_positions": 40}
        config = Speech2TextConfig(**BART, **sizes, max_target_positions=20, num_conv_layers=2)
        return Speech2TextForConditionalGeneration(config).eval()

    inputs = {"input_features": torch.randn(2, 40, 8), "labels": torch.randint(3, 60, (2, 6))}
    base, model = build(), clsr(build())
    with torch.no_grad():
        assert (model(**inputs).logits - base(**inputs).logits).abs().max() <= 1e-6
    loss = randomize(model, scale=0.3).train()(**inputs).loss
    loss.backward()
    assert all((p.grad is not None) == ("clsr_" in name) for name, p in model.named_parameters())
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path, subfolder="ca", adapter_name="ca").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
