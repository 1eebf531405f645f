"""
Transcribe an archive with Ray Data, on this machine or on a cluster. Started again, it goes on where it was stopped.

    pip install 'peft_clsr[archive]'
    python examples/transcribe_archive.py recordings/ --model openai/whisper-base --adapters experts \
        --language ca --output_dir transcripts --workers 2

The input is a folder of recordings, a table with the columns file_name and language, or Parquet (a file or a folder)
with the column audio, as `datasets` writes it or as paths, and maybe language and id. The output is Parquet, one file
for each part, which is there as a whole or not at all. Its columns: id (else the path in the input), language, model,
adapter (null: the base model), text, segments (start and end in seconds, text), seconds, and error, if the recording
cannot be read or is cut off. Rows with an error are not tried again: delete their file to do so.
"""

import argparse
import hashlib
import os
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reads it when it is imported

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
import torch
from pyarrow.dataset import dataset

import peft_clsr

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("input", type=Path)
parser.add_argument("--model", default="openai/whisper-base")
parser.add_argument("--adapters", nargs="*", default=[], help="folders or repositories of experts")
parser.add_argument("--language", help="of recordings for which the input names none; detected without it")
parser.add_argument("--output_dir", type=Path, required=True, help="on a cluster, a folder that all machines see")
parser.add_argument("--part_size", type=int, default=64, help="recordings in a file; a stopped worker repeats them")
parser.add_argument("--batch_size", type=int, default=8, help="recordings at a time")
parser.add_argument("--workers", type=int, default=1, help="copies of the model")
parser.add_argument("--threads", type=int, default=1, help="CPU threads of a worker")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda: a GPU a worker")
parser.add_argument("--ray_address", default="local", help="a running cluster, such as auto")

SEGMENT = pa.struct({"start": pa.float64(), "end": pa.float64(), "text": pa.string()})  # in seconds
TEXTS = dict.fromkeys(("id", "language", "model", "adapter", "text", "error"), pa.string())
SCHEMA = pa.schema({**TEXTS, "seconds": pa.float64(), "segments": pa.list_(SEGMENT)})


class Transcribe:
    """A worker. Its model and experts stay loaded, and it writes each part as a whole or not at all."""

    def __init__(self, options, folder, tags):
        self.model, self.processor = peft_clsr.load_with_experts(options.model, options.adapters, set(tags.values()))
        self.model.to(options.device).eval()
        self.options, self.folder, self.tags = options, folder, tags

    def __call__(self, part: pa.Table) -> pa.Table:
        rows = part.to_pylist()
        for row in rows:
            row |= {"model": self.options.model, "language": self.tags[row["language"]]}
            audio = row["audio"] if isinstance(row["audio"], dict) else {"bytes": None, "path": row["audio"]}
            row["audio"] = audio if audio["bytes"] is not None else self.folder / (audio["path"] or "")
            with suppress(ValueError):  # reading it tells the error
                row["seconds"] = peft_clsr.audio_seconds(row["audio"])
        rows.sort(key=lambda row: row.get("seconds", 0.0))  # a batch has recordings of similar lengths
        for start in range(0, len(rows), self.options.batch_size):
            self.transcribe(rows[start : start + self.options.batch_size])
        name = hashlib.sha256("\n".join(row["id"] for row in rows).encode()).hexdigest()[:16]
        unfinished = self.options.output_dir / f".{name}.part"  # readers of the folder skip what starts with a dot
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), unfinished)
        unfinished.replace(self.options.output_dir / f"{name}.parquet")
        return pa.table({"recordings": [len(rows)], "errors": [sum("error" in row for row in rows)]})

    def transcribe(self, batch):
        """Transcribe recordings of any languages, each with the expert of its language."""
        heard = []
        for row in batch:
            try:
                heard.append((row, peft_clsr.read_audio(row["audio"], self.processor.feature_extractor.sampling_rate)))
            except peft_clsr.TruncatedAudioError as error:
                heard.append((row, error.samples))
                row["error"] = str(error)
            except ValueError as error:
                row["error"] = str(error)
        if heard:
            rows, waveforms = zip(*heard, strict=True)
            languages = [row["language"] for row in rows]
            transcripts = peft_clsr.transcribe_waveforms(self.model, self.processor, waveforms, languages)
            for row, transcript in zip(rows, transcripts, strict=True):
                row.update(vars(transcript), text=transcript.text)


def columns(schema: pa.Schema) -> dict[str, pc.Expression]:
    """The columns of an archive. Without a column id, the path of a recording is its id."""
    path = ("audio", "path") if pa.types.is_struct(schema.field("audio").type) else ("audio",)
    name = pc.field("id") if "id" in schema.names else pc.field(*path)
    language = pc.field("language") if "language" in schema.names else pc.scalar(None).cast("string")
    return {"id": name.cast("string"), "audio": pc.field("audio"), "language": language}


def missing(rows: pa.Table, done: pa.Array) -> pa.Table:
    wanted = columns(rows.schema)
    return dataset(rows).to_table(wanted, filter=~wanted["id"].isin(done))


def main():
    options = parser.parse_args()
    options.input, options.output_dir = options.input.resolve(), options.output_dir.resolve()
    folder = options.input if options.input.is_dir() else options.input.parent
    try:
        if is_parquet := options.input.suffix == ".parquet" or any(options.input.rglob("*.parquet")):
            archive = dataset(options.input, format="parquet")
        else:
            found = peft_clsr.find_recordings([options.input])
            paths = [os.path.relpath(recording.path, folder) for recording in found]
            table = pa.table({"audio": paths, "language": pa.array([one.language for one in found], pa.string())})
            archive = dataset(table)
        wanted = columns(archive.schema)
        names = archive.to_table({name: wanted[name] for name in ("id", "language")}).to_pydict()
        given = {name: name or options.language for name in set(names["language"])}
        tags = {name: language and peft_clsr.language_tag(language) for name, language in given.items()}
    except (ValueError, OSError, KeyError) as error:
        parser.error(str(error))
    if None in names["id"] or len(set(names["id"])) < len(names["id"]):
        parser.error("two recordings have the same path, or one has none: add a column id, different for each")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    written = dataset(options.output_dir, SCHEMA, format="parquet").to_table(["id", "model"])
    if others := set(written["model"].to_pylist()) - {options.model}:
        parser.error(f"{options.output_dir} has transcripts by {', '.join(others)}: give another --output_dir")
    left = set(names["id"]) - set(written["id"].to_pylist())
    print(f"{len(names['id']) - len(left)} of {len(names['id'])} recordings are transcribed", flush=True)
    if not left:
        return

    cpus = options.workers * options.threads + 1  # one reads
    ray.init(options.ray_address, num_cpus=cpus if options.ray_address == "local" else None)
    rows = ray.data.read_parquet(str(options.input)) if is_parquet else ray.data.from_arrow(table)
    parts = (
        rows.map_batches(missing, fn_args=[written["id"].combine_chunks()], batch_size=None, batch_format="pyarrow")
        .repartition(target_num_rows_per_block=options.part_size, strict=True)
        .map_batches(
            Transcribe,
            fn_constructor_args=[options, folder, tags],
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=options.workers),
            num_cpus=options.threads,
            num_gpus=1 if options.device == "cuda" else None,
        )
    )
    counts = parts.to_pandas().sum()
    print(f"{counts['recordings']} transcribed now, {counts['errors']} of them with an error", flush=True)


if __name__ == "__main__":
    main()
