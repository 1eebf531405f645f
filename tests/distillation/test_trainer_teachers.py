"""`DistillationTrainer` with any Whisper as teacher: live, cached, wrapped, or the student's own base."""

import pytest
import torch
from conftest import SPECIAL_TOKENS, build_tokenizer
from datasets import Dataset
from helpers import clsr, randomize
from peft import LoraConfig, get_peft_model
from training import adapter_weights, base_state, collate, distiller, make_dataset
from transformers import (
    BitsAndBytesConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from peft_clsr import DataCollatorSpeechSeq2SeqWithPadding, VocabularyMap, cache_teacher_states, load_teacher_states
from peft_clsr.distillation.losses import distillation_sum


def prepared(size=6, lengths=(5, 3), seed=0):
    rows = [{name: value.numpy() for name, value in row.items()} for row in make_dataset(size, lengths, seed=seed)]
    return Dataset.from_list(rows).with_format("torch")


def first_log(trainer):
    trainer.train()
    return next(entry for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_may_be_of_half_precision(readable_whisper, tmp_path, dtype):
    losses = []
    for teacher_dtype in (torch.float32, dtype):
        teacher = readable_whisper(seed=1).to(teacher_dtype)
        trainer = distiller(randomize(clsr(readable_whisper())), teacher, tmp_path, make_dataset(size=4), max_steps=1)
        losses.append(first_log(trainer)["kd_loss"])
    assert losses[0] > 0.05
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_a_teacher_may_be_quantized(readable_whisper, tiny_whisper, tmp_path):
    pytest.importorskip("bitsandbytes")
    sizes = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
    tiny_whisper(seed=1, init_std=0.2, **sizes).save_pretrained(tmp_path / "teacher")
    losses = []
    for quantization in (None, BitsAndBytesConfig(load_in_8bit=True)):
        teacher = WhisperForConditionalGeneration.from_pretrained(
            tmp_path / "teacher", quantization_config=quantization, dtype=torch.float32
        )
        trainer = distiller(randomize(clsr(readable_whisper())), teacher, tmp_path, make_dataset(size=4), max_steps=1)
        losses.append(first_log(trainer)["kd_loss"])
    assert losses[0] > 0.05
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_a_teacher_of_another_depth_and_width_teaches_by_its_logits(readable_whisper, tiny_whisper, tmp_path):
    teacher = tiny_whisper(seed=1, d_model=24, encoder_layers=3, decoder_layers=1, init_std=0.3)
    student, dataset = randomize(clsr(readable_whisper())), make_dataset(size=4, lengths=(5, 3))
    trainer = distiller(student, teacher, tmp_path, dataset, eval_dataset=dataset, temperature=2.0, kd_loss="kl")
    batch = collate(dataset)
    with torch.no_grad():
        ours, theirs = student.eval()(**batch).logits, teacher(**batch).logits
    expected = distillation_sum(ours, theirs, batch["labels"], kind="kl", temperature=2.0)
    kd_loss = trainer.evaluate()["eval_kd_loss"]
    assert kd_loss > 0.05
    assert kd_loss == pytest.approx(expected.item() / (batch["labels"] != -100).sum().item(), rel=1e-4)


def test_a_wrapped_teacher_teaches_with_its_adapter(readable_whisper, tmp_path):
    def wrapped(scale):
        teacher = get_peft_model(readable_whisper(seed=1), LoraConfig(target_modules=["fc2"], r=2))
        with torch.no_grad():
            for name, parameter in teacher.named_parameters():
                if "lora_B" in name:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * scale)
        return teacher

    losses = [
        first_log(distiller(randomize(clsr(readable_whisper())), teacher, tmp_path, max_steps=1))["kd_loss"]
        for teacher in (readable_whisper(seed=1), wrapped(0.0), wrapped(3.0))
    ]
    assert losses[0] == losses[1]
    assert abs(losses[2] - losses[1]) > 1e-3


@pytest.mark.parametrize("give", [lambda model: model, lambda model: model.get_base_model()], ids=["model", "base"])
def test_the_students_own_base_teaches_as_a_copy_of_it_does(readable_whisper, tmp_path, give):
    results = []
    for own in (True, False):
        model = randomize(clsr(readable_whisper(), gate_noise=1.0, skip_gate_prob=0.2))
        before = base_state(model)
        teacher = give(model) if own else readable_whisper()
        trainer = distiller(model, teacher, tmp_path, max_steps=3, gradient_accumulation_steps=2)
        logs = first_log(trainer)
        assert logs["kd_loss"] > 1e-3
        results.append(adapter_weights(model))
        assert all(torch.equal(tensor, before[name]) for name, tensor in base_state(model).items())
    for name, weight in results[1].items():
        torch.testing.assert_close(results[0][name], weight, atol=1e-6, rtol=1e-5)


def test_cached_states_teach_as_the_teacher_does(readable_whisper, tiny_processor, tmp_path):
    """Up to float16: the KD loss to 1e-3."""
    dataset, teacher = prepared(), readable_whisper(seed=1)
    collator = DataCollatorSpeechSeq2SeqWithPadding(tiny_processor)
    cache_teacher_states(dataset, teacher, tiny_processor, tmp_path / "cache", batch_size=4)
    states = load_teacher_states(dataset, tmp_path / "cache")
    logs = []
    for teacher_model, data in ((teacher, dataset), (states, states.dataset)):
        model = randomize(clsr(readable_whisper()))
        trainer = distiller(model, teacher_model, tmp_path, data, eval_dataset=data, max_steps=1, kd_loss="js")
        trainer.data_collator = collator
        evaluation = trainer.evaluate()
        logs.append((first_log(trainer)["kd_loss"], evaluation["eval_kd_loss"], evaluation["eval_loss"]))
    assert logs[0][0] > 0.05
    assert logs[1] == pytest.approx(logs[0], rel=1e-3)


def test_training_without_the_cached_column_is_refused_and_evaluation_goes_without_distillation(
    readable_whisper, tiny_processor, tmp_path
):
    dataset = prepared()
    states = cache_teacher_states(dataset, readable_whisper(seed=1), tiny_processor, tmp_path / "cache")
    trainer = distiller(clsr(readable_whisper()), states, tmp_path, dataset, eval_dataset=dataset, max_steps=1)
    trainer.data_collator = DataCollatorSpeechSeq2SeqWithPadding(tiny_processor)
    with pytest.raises(
        ValueError, match="no 'teacher_states': train on the dataset that cache_teacher_states returned"
    ):
        trainer.train()
    metrics = trainer.evaluate()
    assert "eval_kd_loss" not in metrics and metrics["eval_ce_loss"] > 0


@pytest.fixture
def later_processor(tiny_processor):
    """As large-v3 differs from large-v2: 128 mel bins, and a token more among the special ones."""
    tokenizer = build_tokenizer((*SPECIAL_TOKENS[:9], "<|yue|>", *SPECIAL_TOKENS[9:]))
    return WhisperProcessor(WhisperFeatureExtractor(feature_size=128, chunk_length=1), tokenizer)


def test_a_teacher_with_other_features_and_vocabulary_teaches_what_both_know(
    readable_whisper, tiny_whisper, tiny_processor, later_processor, tmp_path
):
    teacher = tiny_whisper(seed=1, num_mel_bins=128, vocab_size=len(later_processor.tokenizer), init_std=0.3)
    student = randomize(clsr(readable_whisper()))
    collator = DataCollatorSpeechSeq2SeqWithPadding(tiny_processor, language="ca", teacher_processor=later_processor)
    audio = torch.randn(2, 16000, generator=torch.Generator().manual_seed(0)).numpy() * 0.1
    dataset = [
        {"audio": {"array": sound, "sampling_rate": 16000}, "text": text}
        for sound, text in zip(audio, ("a", "bcd"), strict=True)
    ]
    trainer = distiller(student, None, tmp_path, dataset, eval_dataset=dataset)
    arguments = {"model": student, "args": trainer.args, "data_collator": collator, "train_dataset": dataset}
    arguments |= {"eval_dataset": dataset, "teacher_model": teacher, "teacher_processor": later_processor}
    trainer = type(trainer)(**arguments, processing_class=tiny_processor)

    batch = collator(dataset)
    assert batch["teacher_input_features"].shape == (2, 128, 100)
    assert batch["teacher_labels"][0, 1] == batch["labels"][0, 1] + 1  # <|transcribe|>, after <|yue|>
    vocabulary = VocabularyMap.between(tiny_processor.tokenizer, later_processor.tokenizer)
    with torch.no_grad():
        ours = student.eval()(input_features=batch["input_features"], labels=batch["labels"]).logits
        theirs = teacher(input_features=batch["teacher_input_features"], labels=batch["teacher_labels"]).logits
    expected = distillation_sum(
        ours[..., vocabulary.student_ids], theirs[..., vocabulary.teacher_ids], batch["labels"]
    )
    tokens = (batch["labels"] != -100).sum().item()
    assert trainer.evaluate()["eval_kd_loss"] == pytest.approx(expected.item() / tokens, rel=1e-4)
    trainer.train()


def test_a_teacher_with_another_vocabulary_needs_both_processors(tiny_whisper, tmp_path):
    student, teacher = clsr(tiny_whisper()), tiny_whisper(vocab_size=300)
    with pytest.raises(ValueError, match="give teacher_processor= and processing_class=") as error:
        distiller(student, teacher, tmp_path / "out", max_steps=1)
    assert "300" in str(error.value) and str(student.config.vocab_size) in str(error.value)


@pytest.mark.parametrize("teacher_config", [{"num_mel_bins": 128}, {"max_source_positions": 100}])
def test_a_teacher_that_cannot_hear_the_students_features_is_refused(tiny_whisper, tmp_path, teacher_config):
    trainer = distiller(clsr(tiny_whisper()), tiny_whisper(**teacher_config), tmp_path / "out", max_steps=1)
    with pytest.raises(ValueError, match=r"the teacher takes .* give teacher_processor= to the collator"):
        trainer.train()


def test_the_teacher_hears_what_specaugment_masks_for_the_student(readable_whisper, tmp_path):
    def logged(mask_time_prob):
        model = randomize(clsr(readable_whisper()))
        model.config.apply_spec_augment, model.config.mask_time_prob = mask_time_prob > 0, mask_time_prob
        teacher = readable_whisper(seed=1)
        heard = []
        encoder = teacher.get_encoder()
        encoder.register_forward_pre_hook(lambda module, args, kwargs: heard.append(args[0].clone()), with_kwargs=True)
        own = model.get_base_model().get_encoder()
        masked = []
        own.register_forward_pre_hook(lambda module, args, kwargs: masked.append(args[0].clone()), with_kwargs=True)
        dataset = make_dataset(size=4)
        trainer = distiller(model, teacher, tmp_path, dataset, max_steps=2, gradient_accumulation_steps=2)
        trainer.train()
        zeros = [(features == 0).float().mean().item() for features in masked]
        assert all((features == 0).sum() == 0 for features in heard)
        return zeros

    assert all(share == 0 for share in logged(0.0))
    shares = logged(0.5)
    assert all(0.2 < share < 0.7 for share in shares)
