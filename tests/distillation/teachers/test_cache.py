"""The cache of a teacher's decoder states: right, whole or refused."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SPECIAL_TOKENS
from peft import LoraConfig, get_peft_model
from scripts import cache_distributed
from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from two_processes import run_in_two_processes

datasets = pytest.importorskip("datasets")

from peft_clsr import (
    VocabularyMap,
    cache_teacher_states,
    load_teacher_states,
)
from peft_clsr.data.teacher_columns import unflatten_states
from peft_clsr.distillation.losses import KD_LOSSES, distillation_sum
from peft_clsr.distillation.teachers import shards
from peft_clsr.distillation.teachers.forward import teacher_decoder_states

LENGTHS = (4, 9, 3, 6, 5, 8, 7)
SIZES = {"batch_size": 2, "shard_size": 3}


def build_dataset(**columns):
    generator = torch.Generator().manual_seed(0)
    columns = {
        "input_features": [torch.randn(80, 100, generator=generator).numpy() for _ in LENGTHS],
        "labels": [torch.randint(0, 200, (length,), generator=generator).tolist() for length in LENGTHS],
        "text": [f"text {index}" for index in range(len(LENGTHS))],
        **columns,
    }
    features = {"input_features": datasets.Array2D((80, 100), "float32"), "text": datasets.Value("string")}
    features["labels"] = datasets.List(datasets.Value("int64"))
    if "teacher_input_features" in columns:
        features["teacher_input_features"] = datasets.Array2D((128, 100), "float32")
        features["teacher_labels"] = features["labels"]
    return datasets.Dataset.from_dict(columns, datasets.Features(features)).with_format("torch")


@pytest.fixture
def dataset():
    return build_dataset()


@pytest.fixture
def teacher(tiny_whisper):
    return tiny_whisper(init_std=0.3)


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def fail_at(teacher, call, error=RuntimeError):
    """Make the teacher raise at its n-th forward; returns the batch sizes that it was called with."""
    calls, forward = [], teacher.forward

    def failing(input_features, **kwargs):
        calls.append(len(input_features))
        if len(calls) == call:
            raise error
        return forward(input_features=input_features, **kwargs)

    teacher.forward = failing
    return calls


def test_cached_states_are_the_live_ones_in_float16(dataset, teacher, tiny_processor, tmp_path):
    states = cache_teacher_states(dataset, teacher, tiny_processor, tmp_path, **SIZES)
    assert states.hidden_size == 16 and len(states.dataset) == len(LENGTHS)
    for row, length in zip(states.dataset, LENGTHS, strict=True):
        live = teacher_decoder_states(teacher, row["input_features"][None], row["labels"][None])[0]
        cached = unflatten_states(row["teacher_states"], length)
        assert cached.dtype == torch.float16
        torch.testing.assert_close(cached.float(), live, atol=1e-5, rtol=2**-11)
    assert torch.equal(states.output_layer.weight, teacher.proj_out.weight)
    assert not states.output_layer.weight.requires_grad
    assert states.processor.tokenizer.get_vocab() == tiny_processor.tokenizer.get_vocab()
    assert states.processor.feature_extractor.n_samples == 16000


@pytest.mark.parametrize("kind", KD_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_from_the_cache_is_that_of_live_logits(dataset, tiny_whisper, tiny_processor, tmp_path, kind, dtype):
    teacher, student = tiny_whisper(init_std=0.3).to(dtype), tiny_whisper(seed=1, init_std=0.3)
    states = cache_teacher_states(dataset, teacher, tiny_processor, tmp_path, **SIZES)
    live_sum = cached_sum = 0.0
    for row in states.dataset:
        features, labels = row["input_features"][None], row["labels"][None]
        with torch.no_grad():
            student_logits = student(input_features=features, labels=labels).logits
            live = teacher(input_features=features.to(dtype), labels=labels).logits
            cached = states.output_layer(unflatten_states(row["teacher_states"], labels.shape[1])[None].to(dtype))
        live_sum += float(distillation_sum(student_logits, live, labels, kind=kind))
        cached_sum += float(distillation_sum(student_logits, cached, labels, kind=kind))
    assert live_sum / sum(LENGTHS) > 0.1
    assert cached_sum == pytest.approx(live_sum, rel=1e-3)


def test_the_dataset_keeps_its_columns_rows_and_format(dataset, teacher, tiny_processor, tmp_path):
    states = cache_teacher_states(dataset, teacher, tiny_processor, tmp_path, **SIZES)
    assert states.dataset.column_names == [*dataset.column_names, "teacher_states"]
    assert states.dataset.features["teacher_states"] == datasets.List(datasets.Value("float16"))
    assert states.dataset.format["type"] == "torch"
    for row, before in zip(states.dataset, dataset, strict=True):
        assert torch.equal(row["input_features"], before["input_features"])
        assert torch.equal(row["labels"], before["labels"]) and row["text"] == before["text"]
    plain = load_teacher_states(dataset.with_format(None), tmp_path).dataset
    assert plain.format["type"] is None
    cell = plain[1]["teacher_states"]
    expected = unflatten_states(states.dataset[1]["teacher_states"], LENGTHS[1])
    assert isinstance(cell, list) and torch.equal(unflatten_states(cell, LENGTHS[1]), expected)


def test_a_label_position_costs_two_bytes_a_number(tiny_whisper, tiny_processor, tmp_path):
    teacher = tiny_whisper(d_model=512)
    dataset = build_dataset(labels=[[index] * 60 for index in range(len(LENGTHS))])
    cache_teacher_states(dataset, teacher, tiny_processor, tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.arrow"))
    assert 2 * 512 <= size / (60 * len(LENGTHS)) < 1.01 * 2 * 512


def test_a_complete_cache_is_opened_without_running_the_teacher(dataset, teacher, tiny_processor, tmp_path):
    first = cache_teacher_states(dataset, teacher, tiny_processor, tmp_path, **SIZES)
    before = files_of(tmp_path)
    calls = fail_at(teacher, 1)
    again = cache_teacher_states(dataset, teacher, tiny_processor, tmp_path, batch_size=7, shard_size=2)
    loaded = load_teacher_states(dataset, tmp_path)
    assert calls == [] and files_of(tmp_path) == before
    for states in (again, loaded):
        assert torch.equal(states.output_layer.weight, first.output_layer.weight)
        for row, expected in zip(states.dataset, first.dataset, strict=True):
            assert torch.equal(row["teacher_states"], expected["teacher_states"])


@pytest.mark.parametrize("call, left", [(1, 7), (2, 7), (3, 4), (4, 4), (5, 1)])
def test_a_run_that_was_killed_goes_on_after_its_last_whole_shard(
    dataset, tiny_whisper, teacher, tiny_processor, tmp_path, call, left
):
    """Shards of 3, 3 and 1 examples take 2, 2 and 1 forwards."""
    cache_teacher_states(dataset, teacher, tiny_processor, tmp_path / "whole", **SIZES)
    killed = tiny_whisper(init_std=0.3)
    fail_at(killed, call, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        cache_teacher_states(dataset, killed, tiny_processor, tmp_path / "killed", **SIZES)
    with pytest.raises(ValueError, match=f"not complete, it holds the states of {7 - left} of 7 examples"):
        load_teacher_states(dataset, tmp_path / "killed")
    calls = fail_at(teacher, 0)
    cache_teacher_states(dataset, teacher, tiny_processor, tmp_path / "killed", **SIZES)
    assert sum(calls) == left
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_what_a_killed_process_left_half_written_is_written_anew(dataset, teacher, tiny_processor, tmp_path):
    cache_teacher_states(dataset, teacher, tiny_processor, tmp_path, **SIZES)
    whole = files_of(tmp_path)
    shard = tmp_path / "states-00001-of-00003.arrow"
    shard.with_suffix(".tmp").write_bytes(shard.read_bytes()[:100])
    shard.unlink()
    (tmp_path / "teacher").rename(tmp_path / "teacher.tmp")
    (tmp_path / "teacher.tmp" / "teacher.json").unlink()
    with pytest.raises(ValueError, match="holds no teacher states"):
        load_teacher_states(dataset, tmp_path)
    for other in tmp_path.glob("*.arrow"):
        other.unlink()
    cache_teacher_states(dataset, teacher, tiny_processor, tmp_path, **SIZES)
    assert files_of(tmp_path) == whole


def test_a_cache_of_something_else_is_refused_and_left_alone(dataset, tiny_whisper, teacher, tiny_processor, tmp_path):
    cache_teacher_states(dataset, teacher, tiny_processor, tmp_path, **SIZES)
    before = files_of(tmp_path)
    changed = [dataset["labels"][index].tolist() for index in range(7)]
    changed[4][0] += 1
    swapped = dataset.select([0, 1, 2, 3, 5, 4, 6])
    remedy = "give another cache_dir, or delete this one"
    for other, error in (
        (build_dataset(labels=changed), f"is of other examples than the dataset's, first at row 4: {remedy}"),
        (swapped, f"is of the dataset's examples in another order, first at row 4: {remedy}"),
        (dataset.select(range(6)), f"is of another dataset, of length 7, expected 6: {remedy}"),
    ):
        with pytest.raises(ValueError, match=error):
            load_teacher_states(other, tmp_path)
        with pytest.raises(ValueError, match=error):
            cache_teacher_states(other, teacher, tiny_processor, tmp_path, **SIZES)
    with pytest.raises(ValueError, match=f"is of another teacher, of hash {'.' * 32}, expected {'.' * 32}: {remedy}"):
        cache_teacher_states(dataset, tiny_whisper(seed=1), tiny_processor, tmp_path, **SIZES)
    assert files_of(tmp_path) == before


def test_other_features_are_another_dataset(dataset, teacher, tiny_processor, tmp_path):
    cache_teacher_states(dataset, teacher, tiny_processor, tmp_path, **SIZES)
    features = np.stack([row.numpy() for row in dataset["input_features"]])
    features[6, 79, 99] += 1e-6
    with pytest.raises(ValueError, match="other examples than the dataset's, first at row 6"):
        load_teacher_states(build_dataset(input_features=list(features)), tmp_path)


def test_a_cache_of_another_version_is_refused(dataset, teacher, tiny_processor, tmp_path, monkeypatch):
    cache_teacher_states(dataset, teacher, tiny_processor, tmp_path, **SIZES)
    monkeypatch.setattr(shards, "FORMAT_VERSION", 2)
    with pytest.raises(ValueError, match="is of format version 1, expected 2"):
        load_teacher_states(dataset, tmp_path)


def test_a_folder_of_other_files_is_left_alone(dataset, teacher, tiny_processor, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no teacher states but other files, such as 'notes.txt'"):
        cache_teacher_states(dataset, teacher, tiny_processor, tmp_path)
    assert files_of(tmp_path) == {"notes.txt": b"mine"}
    with pytest.raises(ValueError, match="holds no teacher states: make them with cache_teacher_states"):
        load_teacher_states(dataset, tmp_path)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e5])
def test_states_that_are_not_finite_name_their_example(dataset, teacher, tiny_processor, tmp_path, scale):
    forward, layer_norm = teacher.forward, teacher.model.decoder.layer_norm
    scales = iter([1.0, 1.0, scale])

    def scaled(**kwargs):
        layer_norm.weight.data.fill_(next(scales))
        return forward(**kwargs)

    layer_norm.weight.data.fill_(1.0)
    teacher.forward = scaled
    with pytest.raises(ValueError, match=r"states of example 3 \('text 3'\) are not finite in float16"):
        cache_teacher_states(dataset, teacher, tiny_processor, tmp_path, **SIZES)
    layer_norm.weight.data.fill_(1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["states-00000-of-00003.arrow", "teacher"]
    teacher.forward = forward
    assert len(cache_teacher_states(dataset, teacher, tiny_processor, tmp_path, **SIZES).dataset) == 7


def test_a_full_disk_leaves_whole_shards(dataset, tiny_whisper, teacher, tiny_processor, tmp_path, monkeypatch):
    cache_teacher_states(dataset, teacher, tiny_processor, tmp_path / "whole", **SIZES)
    synced = []

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device.*usable up to.*3 of 7 examples.*resumes it"):
            cache_teacher_states(dataset, teacher, tiny_processor, tmp_path / "full", **SIZES)
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["states-00000-of-00003.arrow", "teacher"]
    cache_teacher_states(dataset, teacher, tiny_processor, tmp_path / "full", **SIZES)
    assert files_of(tmp_path / "full") == files_of(tmp_path / "whole")


def test_a_file_that_cannot_grow_leaves_whole_shards(tiny_whisper, tiny_processor, tmp_path):
    """The operating system's own error, in the middle of a shard."""
    resource = pytest.importorskip("resource")
    teacher = tiny_whisper(max_target_positions=256)
    dataset = build_dataset(labels=[[1] * 8 if index < 3 else [1] * 200 for index in range(7)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (18_000, hard))  # the output layer takes 17,424
        with pytest.raises(OSError, match="usable up to its last complete shard, it holds the states of 3 of 7"):
            cache_teacher_states(dataset, teacher, tiny_processor, tmp_path, batch_size=1, shard_size=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(list(tmp_path.glob("*.arrow"))) == 1 and not list(tmp_path.glob("*.tmp"))


def test_datasets_that_were_not_prepared_are_refused(dataset, teacher, tiny_processor, tmp_path):
    arguments = teacher, tiny_processor, tmp_path / "cache"
    for column in ("input_features", "labels"):
        with pytest.raises(ValueError, match=f"no column '{column}'.*prepare_dataset"):
            cache_teacher_states(dataset.remove_columns(column), *arguments)
        with pytest.raises(ValueError, match=f"no column '{column}'.*prepare_dataset"):
            load_teacher_states(dataset.remove_columns(column), tmp_path / "cache")
    with pytest.raises(ValueError, match="the dataset is empty"):
        cache_teacher_states(dataset.select([]), *arguments)
    with pytest.raises(TypeError, match="is a DatasetDict, expected a datasets.Dataset"):
        cache_teacher_states(datasets.DatasetDict(train=dataset), *arguments)
    assert not (tmp_path / "cache").exists()


def test_a_dataset_or_processor_of_another_whisper_is_refused(dataset, tiny_whisper, tiny_processor, tmp_path):
    large = WhisperProcessor(WhisperFeatureExtractor(128, chunk_length=1), tiny_processor.tokenizer)
    with pytest.raises(ValueError, match="processor has 80 mel bins .* the teacher 128 .*: pass the teacher's own"):
        cache_teacher_states(dataset, tiny_whisper(num_mel_bins=128), tiny_processor, tmp_path)
    with pytest.raises(ValueError, match="features have 80 mel bins, the teacher takes 128: .*teacher_processor"):
        cache_teacher_states(dataset, tiny_whisper(num_mel_bins=128), large, tmp_path)
    for labels, shown in ([], r"\[\]"), ([3, 271], r"\[3, 271\]"):
        other = build_dataset(labels=[[1], labels, *([1] for _ in range(5))])
        with pytest.raises(ValueError, match=rf"example 1 \('text 1'\) has the labels {shown}.*all below 271"):
            cache_teacher_states(other, tiny_whisper(), tiny_processor, tmp_path / str(len(labels)))


def test_a_shuffled_dataset_is_cached_in_its_own_order(dataset, teacher, tiny_processor, tmp_path):
    dataset.save_to_disk(tmp_path / "dataset")
    shuffled = datasets.load_from_disk(tmp_path / "dataset").shuffle(seed=1)
    states = cache_teacher_states(shuffled, teacher, tiny_processor, tmp_path / "cache", **SIZES)
    assert states.dataset["text"][:] == shuffled["text"][:] != dataset["text"][:]
    for row in load_teacher_states(shuffled, tmp_path / "cache").dataset:
        live = teacher_decoder_states(teacher, row["input_features"][None], row["labels"][None])[0]
        cached = unflatten_states(row["teacher_states"], len(row["labels"]))
        torch.testing.assert_close(cached.float(), live, atol=1e-5, rtol=2**-11)


def test_a_start_token_in_the_labels_has_no_state(dataset, teacher, tiny_processor, tmp_path):
    """The collator takes it off: the model puts it in front."""
    start = teacher.config.decoder_start_token_id
    labels = [row["labels"].tolist() for row in dataset]
    with_start = build_dataset(labels=[[start, *row] for row in labels])
    states = cache_teacher_states(with_start, teacher, tiny_processor, tmp_path / "start", **SIZES)
    expected = cache_teacher_states(dataset, teacher, tiny_processor, tmp_path / "plain", **SIZES)
    for row, other in zip(states.dataset, expected.dataset, strict=True):
        assert torch.equal(row["teacher_states"], other["teacher_states"])


def test_a_teacher_in_training_mode_is_run_without_dropout(dataset, tiny_whisper, tiny_processor, tmp_path):
    teacher = tiny_whisper(init_std=0.3, dropout=0.5, apply_spec_augment=True, mask_time_length=2)
    adapted = get_peft_model(teacher, LoraConfig(target_modules=["fc1"], lora_dropout=0.5, init_lora_weights=False))
    expected = cache_teacher_states(dataset, adapted.eval(), tiny_processor, tmp_path / "eval", **SIZES)
    states = cache_teacher_states(dataset, adapted.train(), tiny_processor, tmp_path / "train", **SIZES)
    assert adapted.training and teacher.model.encoder.layers[0].training
    for row, other in zip(states.dataset, expected.dataset, strict=True):
        assert torch.equal(row["teacher_states"], other["teacher_states"])


def test_a_teacher_with_its_own_features_and_vocabulary_gets_them(tiny_whisper, tiny_processor, tmp_path):
    """As large-v3 beside the smaller ones: 128 mel bins, and `<|yue|>`, behind which special ids shift by one."""
    yue = SPECIAL_TOKENS.index("<|translate|>")
    symbols = [*bytes_to_unicode().values(), *SPECIAL_TOKENS[:yue], "<|yue|>", *SPECIAL_TOKENS[yue:]]
    tokenizer = WhisperTokenizer(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[])
    processor = WhisperProcessor(WhisperFeatureExtractor(128, chunk_length=1), tokenizer)
    teacher = tiny_whisper(init_std=0.3, num_mel_bins=128, vocab_size=len(tokenizer))
    vocabulary = VocabularyMap.between(tiny_processor.tokenizer, tokenizer)
    ids = tiny_processor.tokenizer.convert_tokens_to_ids(["<|ca|>", "<|transcribe|>", "<|notimestamps|>", "a"])
    generator = torch.Generator().manual_seed(0)
    dataset = build_dataset(
        labels=[ids] * 7,
        teacher_input_features=[torch.randn(128, 100, generator=generator).numpy() for _ in LENGTHS],
        teacher_labels=[vocabulary.teacher_labels(ids)] * 7,
    )
    assert dataset[0]["teacher_labels"].tolist() == [ids[0], ids[1] + 1, ids[2] + 1, ids[3]]
    states = cache_teacher_states(dataset, teacher, processor, tmp_path, **SIZES)
    for row in states.dataset:
        with torch.no_grad():
            logits = teacher(
                input_features=row["teacher_input_features"][None], labels=row["teacher_labels"][None]
            ).logits[0]
        cached = states.output_layer(unflatten_states(row["teacher_states"], 4).float())
        assert cached.shape == (4, 272)
        torch.testing.assert_close(cached, logits, atol=1e-2, rtol=0)
    assert states.processor.feature_extractor.feature_size == 128
    assert states.processor.tokenizer.convert_tokens_to_ids("<|yue|>") == 256 + yue
    with pytest.raises(ValueError, match="other examples"):
        load_teacher_states(dataset.remove_columns("teacher_labels"), tmp_path)


def test_two_processes_share_the_shards(dataset, teacher, tiny_processor, tmp_path):
    dataset.save_to_disk(tmp_path / "dataset")
    teacher.save_pretrained(tmp_path / "teacher")
    tiny_processor.save_pretrained(tmp_path / "teacher")
    cache_teacher_states(dataset, teacher, tiny_processor, tmp_path / "one", **SIZES)
    run_in_two_processes(cache_distributed.main, tmp_path / "dataset", tmp_path / "teacher", tmp_path / "two")
    # Shards 0 and 2, of 3 examples and 1, are those of process 0.
    printed = [(tmp_path / f"process-{process}").read_text() for process in range(2)]
    assert printed == ["process 0 of 2: 4, 7", "process 1 of 2: 3, 7"]
    one, two = files_of(tmp_path / "one"), files_of(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        if "processor" not in name:
            assert one[name] == two[name], name
