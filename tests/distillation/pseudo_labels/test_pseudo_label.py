"""A teacher's transcripts as training data."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from accelerate import PartialState
from conftest import SPECIAL_TOKENS, build_tokenizer
from helpers import noise, random_clsr
from scripts import pseudo_label_distributed
from transformers import WhisperFeatureExtractor, WhisperProcessor
from two_processes import run_in_two_processes

from peft_clsr import filter_pseudo_labels, load_recordings, pack_utterances, prepare_dataset, pseudo_label
from peft_clsr.cli import main
from peft_clsr.data.labels import encode_segments
from peft_clsr.distillation.pseudo_labels import label as label_module
from peft_clsr.distillation.pseudo_labels import rows as rows_module
from peft_clsr.distillation.pseudo_labels.scores import compression_ratio, score_segments
from peft_clsr.inference.subtitles import Transcript
from peft_clsr.inference.transcribe import make_features, transcribe_waveforms

TIMESTAMPS = [f"<|{position / 50:.2f}|>" for position in range(51)]
SECONDS = [0.4, 0.9, 0.6, 0.8]


@pytest.fixture
def processor():
    return WhisperProcessor(WhisperFeatureExtractor(chunk_length=1), build_tokenizer([*SPECIAL_TOKENS, *TIMESTAMPS]))


@pytest.fixture
def teacher(tiny_whisper, processor):
    whisper = tiny_whisper(init_std=0.2, vocab_size=len(processor.tokenizer))
    whisper.generation_config.max_length = 12
    return whisper


@pytest.fixture
def recordings(tmp_path):
    """Four recordings, of which two have a transcript."""
    paths = [str(tmp_path / f"{index}.wav") for index in range(len(SECONDS))]
    for index, (path, seconds) in enumerate(zip(paths, SECONDS, strict=True)):
        soundfile.write(path, noise(seconds, seed=index), 16000)
    return datasets.Dataset.from_dict({"audio": paths, "transcription": ["un", "dos tres", "", None]})


def says(text, segments=None):
    """A transcriber that hears one text in all recordings."""

    def transcribe(model, processor, waveforms, languages, **settings):
        transcripts = []
        for language, seconds in zip(languages, [len(waveform) / 16000 for waveform in waveforms], strict=True):
            whole = [{"start": 0.0, "end": seconds, "text": text}] if text else []
            transcripts.append(Transcript(language, None, seconds, segments or whole))
        return transcripts

    return transcribe


def test_rows_have_the_teachers_text_its_scores_and_wer_where_there_is_a_transcript(
    teacher, processor, recordings, tmp_path
):
    labels = pseudo_label(recordings, teacher, processor, "ca", output_dir=tmp_path / "labels", batch_size=2)
    heard = []
    for row in sorted(range(4), key=SECONDS.__getitem__, reverse=True):
        heard.append((row, noise(SECONDS[row], seed=row)))
    texts = {}
    for first in (0, 2):
        batch = heard[first : first + 2]
        waveforms = [soundfile.read(recordings[row]["audio"], dtype="float32")[0] for row, _ in batch]
        for (row, _), one in zip(batch, transcribe_waveforms(teacher, processor, waveforms, ["ca"] * 2), strict=True):
            texts[row] = one.text
    expected = [row for row in range(4) if texts[row]]
    assert labels["recording"][:] == expected
    assert labels["transcription"][:] == [texts[row] for row in expected]
    assert labels["reference"][:] == [recordings[row]["transcription"] for row in expected]
    assert [wer is None for wer in labels["wer"][:]] == [row > 1 for row in expected]
    assert all(value < 0 for value in labels["log_probability"][:])
    assert all(0 <= value <= 1 for value in labels["no_speech_probability"][:])
    assert labels["start"][:] == [None] * len(expected)


def test_scores_are_those_of_a_forward_pass(teacher, processor):
    waveform, text = noise(0.8), "un dos"
    segments = [{"start": 0.1, "end": 0.4, "text": " un"}, {"start": 0.5, "end": 0.78, "text": " dos"}]
    scores = score_segments(teacher, processor, waveform, segments, "ca")
    labels = encode_segments(processor.tokenizer, [(0.0, 0.3, "un"), (0.4, 0.68, "dos")], "ca")
    features, _ = make_features([waveform[1600:]], processor.feature_extractor, 1.0)
    start = teacher.config.decoder_start_token_id
    with torch.no_grad():
        inputs = torch.tensor([[start, *labels[:-1]]])
        log_probabilities = teacher(input_features=features, decoder_input_ids=inputs).logits[0].log_softmax(-1)
    values = log_probabilities[range(len(labels)), labels].tolist()
    tokens = processor.tokenizer.convert_ids_to_tokens(labels)
    times = [place for place, token in enumerate(tokens) if token.startswith("<|") and token[2:3].isdigit()]
    for score, (before, after) in zip(scores, (times[:2], times[2:]), strict=True):
        assert score["log_probability"] == pytest.approx(np.mean(values[before + 1 : after]), abs=1e-5)
        assert score["compression_ratio"] == compression_ratio(text)


def test_an_expert_of_the_teacher_transcribes_and_scores(teacher, processor, recordings, tmp_path):
    plain = pseudo_label(recordings, teacher, processor, "ca", output_dir=tmp_path / "plain")
    segments = [{"start": 0.0, "end": 0.4, "text": " un"}]
    base = score_segments(teacher, processor, noise(0.4), segments, "ca")
    model = random_clsr(teacher, "ca")
    labels = pseudo_label(recordings, model, processor, "ca", output_dir=tmp_path / "expert")
    assert labels["transcription"][:] != plain["transcription"][:]
    expert = score_segments(model, processor, noise(0.4), segments, "ca")
    with model.disable_adapter():
        assert score_segments(model, processor, noise(0.4), segments, "ca") == base
        other = score_segments(model, processor, noise(0.4), segments, "bg")
    assert expert != base
    # A language without an expert is scored by the base model.
    assert score_segments(model, processor, noise(0.4), segments, "bg") == other


def test_long_recordings_become_segments_that_training_takes(teacher, processor, tmp_path, monkeypatch):
    path = tmp_path / "long.wav"
    soundfile.write(path, noise(40), 16000)
    segments = [{"start": start, "end": start + 0.6, "text": f" {start}"} for start in (3.0, 4.0, 31.5)]
    monkeypatch.setattr(label_module, "transcribe_waveforms", says("", segments))
    dataset = datasets.Dataset.from_dict({"audio": [str(path)]})
    labels = pseudo_label(dataset, teacher, processor, "ca", output_dir=tmp_path / "labels")
    assert [(row["start"], row["end"], row["transcription"]) for row in labels] == [
        (3.0, 3.6, "3.0"),
        (4.0, 4.6, "4.0"),
        (31.5, 32.1, "31.5"),
    ]
    prepared, counts = prepare_dataset(labels, processor, "ca")
    assert counts["kept"] == 3
    packed = pack_utterances(labels, processor, "ca", max_seconds=1.0)
    assert sorted(" ".join(row["text"] for row in packed).split()) == ["3.0", "31.5", "4.0"]


def test_a_killed_run_goes_on_where_it_was(teacher, processor, recordings, tmp_path, monkeypatch):
    folder, batches = tmp_path / "labels", []

    def until_killed(model, processor, waveforms, languages, **settings):
        batches.append(len(waveforms))
        if len(batches) == 2:
            raise KeyboardInterrupt
        return says("un")(model, processor, waveforms, languages)

    monkeypatch.setattr(label_module, "transcribe_waveforms", until_killed)
    with pytest.raises(KeyboardInterrupt):
        pseudo_label(recordings, teacher, processor, "ca", output_dir=folder, batch_size=3)
    with (folder / "labels-0.jsonl").open("a") as file:
        file.write('{"row": 0, "text": "written by hal')
    labels = pseudo_label(recordings, teacher, processor, "ca", output_dir=folder, batch_size=3)
    assert batches == [3, 1, 1]
    assert labels["recording"][:] == [0, 1, 2, 3] and labels["transcription"][:] == ["un"] * 4
    pseudo_label(recordings, teacher, processor, "ca", output_dir=folder)
    assert len(batches) == 3  # complete labels are opened


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"language": "fr"}, "another language"),
        ({"num_beams": 2}, "another num_beams"),
        ({"rows": 3}, "another number of recordings"),
        ({"seed": 1}, "another teacher"),
    ],
)
def test_labels_of_other_settings_are_not_mixed(
    teacher, tiny_whisper, processor, recordings, tmp_path, monkeypatch, change, named
):
    monkeypatch.setattr(label_module, "transcribe_waveforms", says("un"))
    folder = tmp_path / "labels"
    pseudo_label(recordings, teacher, processor, "ca", output_dir=folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    if "seed" in change:
        teacher = tiny_whisper(seed=1, vocab_size=len(processor.tokenizer))
    dataset = recordings.select(range(change.get("rows", 4)))
    options = {name: value for name, value in change.items() if name == "num_beams"}
    with pytest.raises(ValueError, match=named):
        pseudo_label(dataset, teacher, processor, change.get("language", "ca"), output_dir=folder, **options)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_teacher_that_hears_nothing_in_everything_is_an_error(teacher, processor, recordings, tmp_path, monkeypatch):
    monkeypatch.setattr(label_module, "transcribe_waveforms", says(""))
    with pytest.raises(ValueError, match="gave no text for any of the 4 recordings .*in 4 it hears nothing"):
        pseudo_label(recordings, teacher, processor, "ca", output_dir=tmp_path / "labels")


def test_recordings_that_cannot_be_read_are_named_and_counted(
    teacher, processor, recordings, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(label_module, "transcribe_waveforms", says("un"))
    (tmp_path / "1.wav").write_bytes(b"no audio")
    labels = pseudo_label(recordings, teacher, processor, "ca", output_dir=tmp_path / "labels")
    assert labels["recording"][:] == [0, 2, 3]
    assert "left out: item 1" in caplog.text and "1.wav" in caplog.text
    assert "1 of 4 recordings cannot be read; they have no rows" in caplog.text


def test_bad_input_is_refused(teacher, processor, recordings, tmp_path):
    with pytest.raises(ValueError, match="the dataset is empty"):
        pseudo_label(recordings.select([]), teacher, processor, "ca", output_dir=tmp_path / "labels")
    with pytest.raises(ValueError, match="no column 'speech'; it has 'audio', 'transcription'"):
        pseudo_label(recordings, teacher, processor, "ca", output_dir=tmp_path / "labels", audio_column="speech")
    with pytest.raises(ValueError, match="'qqqq' is neither a language tag"):
        pseudo_label(recordings, teacher, processor, "qqqq", output_dir=tmp_path / "labels")
    assert not (tmp_path / "labels").exists()


def test_a_language_that_the_teacher_cannot_be_told_leaves_nothing_behind(teacher, processor, recordings, tmp_path):
    with pytest.raises(ValueError, match="'rw' has no adapter on the model"):
        pseudo_label(recordings, teacher, processor, "rw", output_dir=tmp_path / "labels")
    del teacher.generation_config.lang_to_id["<|bg|>"]
    with pytest.raises(ValueError, match=r"no token <\|bg\|> for the language 'bg'"):
        pseudo_label(recordings, teacher, processor, "bg", output_dir=tmp_path / "labels")
    assert not (tmp_path / "labels").exists()


def test_a_part_of_a_recording_is_heard_alone_and_keeps_its_times(
    teacher, processor, recordings, tmp_path, monkeypatch
):
    heard = []

    def transcribe(model, processor, waveforms, languages, **settings):
        heard.extend(len(waveform) for waveform in waveforms)
        return says("un")(model, processor, waveforms, languages)

    monkeypatch.setattr(label_module, "transcribe_waveforms", transcribe)
    path = recordings["audio"][1]
    parts = {"audio": [path] * 2, "start": ["0", "0.5"], "end": ["0.3", "0.75"], "transcription": ["un", "dos"]}
    labels = pseudo_label(
        datasets.Dataset.from_dict(parts), teacher, processor, "ca", output_dir=tmp_path / "labels", batch_size=2
    )
    assert heard == [4800, 4000]
    assert labels["start"][:] == [0.0, 0.5] and labels["end"][:] == [0.3, 0.75] and labels["wer"][:] == [0.0, 1.0]
    parts["end"][0] = "0.2"
    with pytest.raises(ValueError, match="audio files, or times in them"):
        pseudo_label(datasets.Dataset.from_dict(parts), teacher, processor, "ca", output_dir=tmp_path / "labels")


def test_segments_of_a_long_part_count_from_the_beginning_of_the_recording(
    teacher, processor, recordings, tmp_path, monkeypatch
):
    monkeypatch.setattr(rows_module, "WHOLE", 0.2)
    segments = [{"start": 0.02, "end": 0.1, "text": " un"}, {"start": 0.12, "end": 0.24, "text": " dos"}]
    monkeypatch.setattr(label_module, "transcribe_waveforms", says("", segments))
    part = datasets.Dataset.from_dict({"audio": recordings["audio"][1:2], "start": [0.5], "end": [0.75]})
    labels = pseudo_label(part, teacher, processor, "ca", output_dir=tmp_path / "labels")
    assert labels["start"][:] == pytest.approx([0.52, 0.62]) and labels["end"][:] == pytest.approx([0.6, 0.74])
    assert labels["seconds"][:] == pytest.approx([0.08, 0.12])


def test_labels_of_other_audio_in_the_dataset_itself_are_not_taken(
    teacher, processor, recordings, tmp_path, monkeypatch
):
    monkeypatch.setattr(label_module, "transcribe_waveforms", says("un"))
    one, other = (
        datasets.Dataset.from_dict({"audio": [{"bytes": open(path, "rb").read(), "path": None}]})
        for path in recordings["audio"][:2]
    )
    pseudo_label(one, teacher, processor, "ca", output_dir=tmp_path / "labels")
    assert len(pseudo_label(one, teacher, processor, "ca", output_dir=tmp_path / "labels")) == 1
    with pytest.raises(ValueError, match="another audio files"):
        pseudo_label(other, teacher, processor, "ca", output_dir=tmp_path / "labels")


def test_a_text_beyond_the_decoders_limit_has_no_score_and_does_not_pass(
    teacher, processor, recordings, tmp_path, monkeypatch, caplog
):
    segments = [{"start": 0.0, "end": 0.1, "text": " un" * 300}, {"start": 0.2, "end": 0.3, "text": " un"}]
    monkeypatch.setattr(label_module, "transcribe_waveforms", says("", segments))
    labels = pseudo_label(recordings, teacher, processor, "ca", output_dir=tmp_path / "labels")
    assert labels["log_probability"][:] == [None] * 4 and None not in labels["compression_ratio"][:]
    assert "4 of 4 pseudo-labels lack a score" in caplog.text
    with pytest.raises(ValueError, match="no pseudo-label passes"):
        filter_pseudo_labels(labels, max_compression_ratio=None, max_no_speech_probability=None)


@pytest.mark.parametrize("feature", [datasets.Value("string"), datasets.Audio(), datasets.Audio(decode=False)])
def test_labels_can_be_joined_with_transcribed_recordings(
    teacher, processor, recordings, tmp_path, monkeypatch, feature
):
    monkeypatch.setattr(label_module, "transcribe_waveforms", says("un"))
    recordings = recordings.cast_column("audio", feature)
    transcribed, others = recordings.select([0, 1]), recordings.select([3, 2])
    labels = pseudo_label(others, teacher, processor, "ca", output_dir=tmp_path / "labels")
    labels = labels.select([1, 0]).select_columns(["audio", "transcription"])
    joined = datasets.concatenate_datasets([transcribed, labels])
    assert joined.features["audio"] == feature
    rows = joined.cast_column("audio", datasets.Audio(decode=False))
    assert [Path(row["audio"]["path"]).name for row in rows] == ["0.wav", "1.wav", "2.wav", "3.wav"]
    assert joined["transcription"][:] == ["un", "dos tres", "un", "un"]


def test_transcripts_may_be_mended_and_stand_in_a_column_text(teacher, processor, recordings, tmp_path, monkeypatch):
    monkeypatch.setattr(label_module, "transcribe_waveforms", says("un"))
    rows = {"audio": recordings["audio"][:1], "text": ["dos"]}
    for text, wer in (("dos", 1.0), ("un", 0.0)):
        dataset = datasets.Dataset.from_dict({**rows, "text": [text]})
        labels = pseudo_label(dataset, teacher, processor, "ca", output_dir=tmp_path / "labels")
        assert labels["wer"][:] == [wer] and labels["reference"][:] == [text]
    with pytest.raises(ValueError, match="no column 'words' of transcripts; it has 'audio', 'text'"):
        pseudo_label(dataset, teacher, processor, "ca", output_dir=tmp_path / "labels", text_column="words")


def test_no_process_transcribes_before_all_have_read_the_labels(teacher, processor, recordings, tmp_path, monkeypatch):
    """Else one process would cut off the line that another one is writing, and they would share other rows."""
    events = []

    def note(owner, name, event):
        called = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: events.append(event) or called(*args, **kwargs))

    monkeypatch.setattr(label_module, "transcribe_waveforms", says("un"))
    note(label_module, "transcribe_waveforms", "transcribe")
    note(label_module, "read_labels", "read")
    note(PartialState, "wait_for_everyone", "wait")
    pseudo_label(recordings, teacher, processor, "ca", output_dir=tmp_path / "labels", batch_size=4)
    before, after = events[: events.index("transcribe")], events[events.index("transcribe") + 1 :]
    assert before[0] == "read" and before[-1] == "wait" and before.count("wait") == 2  # main_process_first waits, too
    assert after == ["wait", "read"]


def test_two_processes_share_the_recordings(teacher, processor, recordings, tmp_path):
    teacher.save_pretrained(tmp_path / "teacher")
    processor.save_pretrained(tmp_path / "teacher")
    recordings.save_to_disk(tmp_path / "recordings")
    run_in_two_processes(
        pseudo_label_distributed.main, tmp_path / "recordings", tmp_path / "teacher", tmp_path / "labels"
    )
    printed = [(tmp_path / f"process-{process}").read_text() for process in range(2)]
    assert printed == [f"process {process} of 2: 4 labels" for process in range(2)]
    files = [(tmp_path / "labels" / f"labels-{process}.jsonl").read_text() for process in range(2)]
    assert [sorted(json.loads(line)["row"] for line in file.splitlines()) for file in files] == [[0, 2], [1, 3]]


# ---------------------------------------------------------------- the command


@pytest.fixture
def run(teacher, processor, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    teacher.save_pretrained(tmp_path / "teacher")
    processor.save_pretrained(tmp_path / "teacher")

    def call(*arguments, output_dir="labels"):
        command = ["pseudo-label", "--teacher", tmp_path / "teacher", "--language", "ca"]
        command += ["--output_dir", tmp_path / output_dir, *arguments]
        try:
            status = main([str(part) for part in command])
        except SystemExit as error:
            status = error.code
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return call


OFF = ("--min_log_probability", "off", "--max_compression_ratio", "off", "--max_no_speech_probability", "off")


def test_the_command_writes_a_folder_to_train_on_and_filters_it_again_without_the_teacher(
    run, recordings, tmp_path, monkeypatch
):
    folder = tmp_path / "raw"
    folder.mkdir()
    for index in range(4):
        (tmp_path / f"{index}.wav").rename(folder / f"{index}.wav")
    monkeypatch.setattr(label_module, "transcribe_waveforms", says("un dos"))
    status, printed = run("--dataset", folder, *OFF)
    assert status == 0 and "4 of 4 rows" in printed, printed
    rows = load_recordings(tmp_path / "labels", "ca", "train")
    assert rows["transcription"][:] == ["un dos"] * 4
    assert len(pack_utterances(rows, WhisperProcessor.from_pretrained(tmp_path / "teacher"), "ca", max_seconds=1)) > 0

    def fail(*args, **kwargs):
        raise AssertionError("the teacher transcribes again")

    monkeypatch.setattr(label_module, "transcribe_waveforms", fail)
    status, printed = run("--dataset", folder, *OFF[:4], "--max_no_speech_probability", "0")
    assert status == 2 and "no pseudo-label passes the filters" in printed
    assert len(load_recordings(tmp_path / "labels", "ca", "train")) == 4  # the earlier table stays
    monkeypatch.setattr(label_module, "transcribe_waveforms", says("un tres"))
    arguments = ("--dataset", folder, *OFF, "--other", tmp_path / "labels")
    status, printed = run(*arguments, "--max_disagreement", "0.4", output_dir="second")
    assert status == 2 and "disagreement 0.04 min" in printed
    status, printed = run(*arguments, "--max_disagreement", "0.5", output_dir="second")
    assert status == 0 and "4 of 4 rows" in printed


@pytest.fixture
def raw(tmp_path):
    """A factory of folders with recordings."""

    def build(name, count=4):
        folder = tmp_path / name
        folder.mkdir()
        for index in range(count):
            soundfile.write(folder / f"{index}.wav", noise(0.3 + index / 50, seed=index), 16000)
        return folder

    return build


def test_the_command_takes_tables_without_transcripts_and_folders_with_other_files(run, raw, tmp_path, monkeypatch):
    monkeypatch.setattr(label_module, "transcribe_waveforms", says("un dos"))
    table = raw("table")
    (table / "metadata.csv").write_text("file_name\n0.wav\n2.wav\n")
    status, printed = run("--dataset", table, *OFF, output_dir="one")
    assert status == 0 and "2 of 2 rows" in printed, printed
    folder = raw("folder")
    (folder / "README.txt").write_text("about these recordings")
    for _ in range(2):  # what the first call wrote into the folder is no part of the dataset
        status, printed = run("--dataset", folder, *OFF, output_dir="folder/labels")
        assert status == 0 and "4 of 4 rows" in printed, printed


def test_a_folder_with_other_files_is_refused_and_left_as_it_is(
    run, teacher, processor, recordings, raw, tmp_path, monkeypatch
):
    monkeypatch.setattr(label_module, "transcribe_waveforms", says("un dos"))
    folder = tmp_path / "mine"
    (folder / "train").mkdir(parents=True)
    raw("all").rename(folder / "all")
    table = folder / "train" / "metadata.jsonl"
    table.write_text('{"file_name": "../all/0.wav"}\n')
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    message = f"output_dir {folder} has files that are no labels, such as 'all': give a new or empty folder"
    status, printed = run("--dataset", table, *OFF, output_dir="mine")
    assert status == 2 and message in printed, printed
    with pytest.raises(ValueError, match=message):
        pseudo_label(recordings, teacher, processor, "ca", output_dir=folder)
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


def test_the_table_names_files_that_are_there_also_below_a_symbolic_link(run, raw, tmp_path, monkeypatch):
    monkeypatch.setattr(label_module, "transcribe_waveforms", says("un dos"))
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    status, printed = run("--dataset", raw("raw"), *OFF, output_dir="link/labels")
    assert status == 0, printed
    paths = load_recordings(tmp_path / "link" / "labels", "ca", "train")["audio"][:]
    assert len(paths) == 4 and all(Path(path).is_file() for path in paths)


def test_a_kill_while_all_rows_are_written_leaves_nothing_that_is_read_as_complete(run, raw, tmp_path, monkeypatch):
    monkeypatch.setattr(label_module, "transcribe_waveforms", says("un dos"))
    folder, save = raw("raw"), datasets.Dataset.save_to_disk

    class Killed(BaseException):
        pass

    def killed(self, path, **kwargs):
        Path(path).mkdir(parents=True)
        (Path(path) / "data-00000-of-00001.arrow").write_bytes(b"half")
        raise Killed

    monkeypatch.setattr(datasets.Dataset, "save_to_disk", killed)
    with pytest.raises(Killed):
        run("--dataset", folder, *OFF)
    status, printed = run("--dataset", folder, *OFF, "--other", tmp_path / "labels", output_dir="second")
    assert status == 2 and "has no finished labels" in printed
    monkeypatch.setattr(datasets.Dataset, "save_to_disk", save)
    assert run("--dataset", folder, *OFF)[0] == 0
    every = datasets.load_from_disk(tmp_path / "labels" / "all")
    assert len(every) == 4 and "audio" not in every.column_names  # it would be copied for each segment
    assert run("--dataset", folder, *OFF, "--other", tmp_path / "labels", output_dir="second")[0] == 0


def test_the_second_teachers_labels_are_of_the_same_recordings_and_in_another_folder(run, raw, tmp_path, monkeypatch):
    monkeypatch.setattr(label_module, "transcribe_waveforms", says("un dos"))
    one, other = raw("one"), raw("other")
    assert run("--dataset", one, *OFF)[0] == 0
    status, printed = run("--dataset", one, *OFF, "--other", tmp_path / "labels")
    assert status == 2 and "--other is --output_dir" in printed
    status, printed = run("--dataset", other, *OFF, "--other", tmp_path / "labels", output_dir="second")
    assert status == 2 and "has labels of other recordings" in printed
    assert not (tmp_path / "second").exists()


def test_the_command_refuses_bad_input(run, tmp_path):
    status, printed = run("--dataset", tmp_path, "--other", tmp_path / "nothing")
    assert status == 2 and "has no finished labels" in printed
    status, printed = run("--dataset", tmp_path / "nowhere")
    assert status == 2 and "does not exist" in printed
    (tmp_path / "recordings").mkdir()
    status, printed = run("--dataset", tmp_path / "recordings", "--split", "test", "--file_column", "path")
    assert status == 2 and "has neither tables nor texts, so --split, --file_column would do nothing" in printed
    status, printed = run("--dataset", tmp_path, "--batch_size", 0)
    assert status == 2 and "--batch_size is 0" in printed
    status, printed = run("--dataset", tmp_path, "--max_disagreement", 0.1)
    assert status == 2
    assert "--max_disagreement changes nothing without --other: leave it out, or give --other" in printed
    for limit in ("high", "nan"):
        status, printed = run("--dataset", tmp_path, "--max_wer", limit)
        assert status == 2 and f"'{limit}' is no limit: expected a number, or 'off'" in printed
    assert not (tmp_path / "labels").exists()


def test_a_line_of_labels_is_json(teacher, processor, recordings, tmp_path, monkeypatch):
    monkeypatch.setattr(label_module, "transcribe_waveforms", says("un"))
    pseudo_label(recordings, teacher, processor, "ca", output_dir=tmp_path / "labels")
    lines = [json.loads(line) for line in (tmp_path / "labels" / "labels-0.jsonl").read_text().splitlines()]
    assert sorted(line["row"] for line in lines) == [0, 1, 2, 3]
    assert {"text", "seconds", "segments"} <= set(lines[0])
