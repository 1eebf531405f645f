"""The page: a recording, and its transcripts by the base model and by the expert."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ..data.table_reader import TABLE_SUFFIXES
from ..data.tables import read_table
from ..evaluation.error_rates import error_rates, format_rates
from ..evaluation.normalization import normalize_text
from ..extras import require
from ..inference.recordings import find_recordings, split_readable
from ..inference.subtitles import format_transcript
from ..languages.tags import closest_tags, language_name
from .html import CSS, differences, download_html, plain_words, text_html, waveform_html
from .recognizer import Recognizer, Result

# Files of an upload that was never read, such as after a lost connection, go after an hour.
_FORGOTTEN = (600, 3600)
_MAX_FILE = "500mb"
# Visitors whose recordings are in memory, 115 MB for half an hour. The oldest are forgotten first.
_MAX_SESSIONS = 50
_LEGEND = (
    "Green: the expert's gates are open, in words by the decoder, in the waveform by the encoder. Underlined: the two "
    "differ, but for case and punctuation."
)
_NO_EXPERT = "There is no expert for this language, so the base model alone was asked."


@dataclass(frozen=True)
class Example:
    """A recording on the server, and what is known of it."""

    path: Path
    language: str | None
    reference: str


def find_examples(inputs: Sequence[str]) -> list[Example]:
    """
    Find the recordings to offer as examples.

    Args:
        inputs (`Sequence[str]`): Files, folders and tables, as in [`find_recordings`]. A table has the references.

    Raises:
        ValueError: there is no recording, or one cannot be read.
    """
    if not inputs:
        return []
    recordings = find_recordings([Path(given) for given in inputs])
    _, problems = split_readable(recordings)
    if problems:
        raise ValueError(f"an example cannot be read: {problems[0]}")
    references = {
        path.resolve(): row.get("transcription") or row.get("sentence") or row.get("text") or ""
        for given in map(Path, inputs)
        if given.suffix.lower() in TABLE_SUFFIXES
        for path, row in read_table(given)
    }
    return [Example(one.path, one.language, references.get(one.path.resolve(), "")) for one in recordings]


def open_app(
    model: str,
    adapters: Sequence[str],
    languages: Sequence[str] = (),
    examples: Sequence[str] = (),
    *,
    max_seconds: float = 1800,
    share: bool | None = None,
) -> Any:
    """
    Open the page of `peft-clsr app` from Python: a recording, and its text by the base model and by the expert.

    Args:
        model (`str`): The base Whisper: Hub id or folder.
        adapters (`Sequence[str]`): Adapter folders, folders with one folder a language, or Hub repositories.
        languages (`Sequence[str]`, *optional*): The only languages to offer, tags or English names. Empty for all.
        examples (`Sequence[str]`, *optional*): Recordings to offer: files, folders, or tables with their text.
        max_seconds (`float`, *optional*, defaults to 1800): Longest recording.
        share (`bool`, *optional*):
            Give the page a public address at gradio.live. By default only in a hosted notebook, such as Colab, where
            the page could not be reached otherwise.

    Returns:
        `gradio.Blocks`: the page, shown below the cell of a notebook. `local_url` is its address, `close()` ends it.

    Raises:
        ValueError: model, adapters, a language or an example cannot be used.
        OSError: there is no free port.
    """
    found = find_examples(examples)
    return open_page(Recognizer(model, adapters, languages, max_seconds), found, share=share)


def launch_page(
    recognizer: Recognizer, examples: Sequence[Example] = (), host: str | None = None, port: int | None = None
) -> None:
    """Serve the page until the process is stopped. Arguments and errors are those of [`open_page`]."""
    page = open_page(recognizer, examples, host, port, share=False)
    print(f"the page is at {page.local_url}", flush=True)
    try:
        page.block_thread()
    finally:
        page.close()


def open_page(
    recognizer: Recognizer,
    examples: Sequence[Example] = (),
    host: str | None = None,
    port: int | None = None,
    share: bool | None = None,
) -> Any:
    """
    Serve the page in the background. A notebook shows it below its cell.

    Uploads go to a folder of its own, which is deleted when the process ends.

    Args:
        recognizer ([`Recognizer`]): The model and its experts.
        examples (`Sequence[Example]`, *optional*): Recordings to choose from.
        host (`str`, *optional*): Where to listen. By default as gradio does: a Hugging Face Space says it by itself.
        port (`int`, *optional*): The port. By default a free one from 7860 on.
        share (`bool`, *optional*): As in [`open_app`].

    Returns:
        `gradio.Blocks`: the page. `close()` ends it.

    Raises:
        OSError: the port is taken.
    """
    gr = require("gradio")
    folder = os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="peft-clsr-app-")  # before components are made
    page = make_page(recognizer, examples)
    weakref.finalize(page, shutil.rmtree, folder, ignore_errors=True)  # at the latest when the process ends
    page.launch(
        server_name=host,
        server_port=port,
        share=share,
        ssr_mode=False,  # it would need Node
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=_MAX_FILE,
        state_session_capacity=_MAX_SESSIONS,
        footer_links=[],
        theme=gr.themes.Default(font="system-ui", font_mono="monospace"),  # others are fetched from Google
        css=CSS,
        height=900,  # in a notebook
    )
    return page


def make_page(recognizer: Recognizer, examples: Sequence[Example] = ()) -> Any:
    """
    Make the page, a `gradio.Blocks`. Arguments are as in [`open_page`].

    A recording is in memory for its session. Its file is deleted as soon as it is read.
    """
    gr = require("gradio")

    def failed(error: Exception) -> Exception:
        return gr.Error(escape(str(error)), duration=None, print_exception=False)

    def loaded(path: Path) -> tuple[Any, ...]:
        try:
            waveform = recognizer.read(path, lambda message: gr.Warning(escape(message)))
        except ValueError as error:
            raise failed(error) from error
        about = _about(path.name, len(waveform) / recognizer.rate)
        return (waveform, path.name), about, waveform_html(waveform), "", "", "", ""

    def read(file: str | None) -> tuple[Any, ...]:
        if file is None:
            return (gr.skip(),) * (1 + len(shown))
        try:
            return None, *loaded(Path(file))
        finally:
            shutil.rmtree(Path(file).parent, ignore_errors=True)  # gradio makes a folder for each upload

    def read_example(index: int) -> tuple[Any, ...]:
        example = examples[index]
        tags = closest_tags(example.language, [tag for _, tag in choices if tag]) if example.language else []
        return next(iter(tags), choices[0][1]), example.reference, *loaded(example.path)

    def transcribe(
        recording: tuple[np.ndarray, str] | None,
        tag: str,
        reference: str,
        progress: Any = gr.Progress(),  # noqa: B008 gradio looks for it here
    ) -> tuple[str, ...]:
        if recording is None:
            raise failed(ValueError("there is no recording yet: record one, or drop a file"))
        waveform, name = recording
        try:
            result = recognizer.transcribe(
                waveform, tag or None, lambda part, what: progress(min(part, 1.0), desc=what)
            )
        except ValueError as error:
            raise failed(error) from error
        return _results(result, waveform, name, reference)

    choices = recognizer.languages()
    experts = recognizer.expert_languages()
    if len(choices) > 1:
        choices.insert(0, ("Detect", ""))
    # Small models detect languages badly, so a single expert is asked for its own.
    first = experts[0] if len(experts) == 1 else choices[0][1]
    with gr.Blocks(title="peft_clsr", analytics_enabled=False, delete_cache=_FORGOTTEN) as page:
        gr.Markdown("# Whisper, without and with a language expert")
        recording = gr.State(None, time_to_live=3600)
        with gr.Row():
            with gr.Column():
                audio = gr.Audio(
                    sources=["upload", "microphone"],
                    type="filepath",
                    editable=False,
                    label="Recording",
                    elem_id="audio",
                )
                example = gr.Radio(
                    [(one.path.name, index) for index, one in enumerate(examples)],
                    visible=bool(examples),
                    label="Examples",
                    elem_id="examples",
                )
            with gr.Column():
                language = gr.Dropdown(choices, value=first, label="Language", elem_id="language")
                reference = gr.Textbox(label="Its true text, for error rates (optional)", lines=2, elem_id="reference")
                start = gr.Button("Transcribe", variant="primary", elem_id="start")
        about, wave = gr.HTML(elem_id="about"), gr.HTML(elem_id="wave", min_height=100)
        with gr.Row():
            with gr.Column(min_width=280):  # a column goes below the other on a narrow screen
                base = gr.HTML(elem_id="base")
            with gr.Column(min_width=280):
                expert = gr.HTML(elem_id="expert")
        legend, srt = gr.HTML(elem_id="legend"), gr.HTML(elem_id="srt")
        results = [about, wave, base, expert, legend, srt]
        shown = [recording, *results]
        private: Any = {"api_visibility": "private"}
        gr.on([audio.upload, audio.stop_recording], read, audio, [audio, *shown], show_progress_on=wave, **private)
        example.input(read_example, example, [language, reference, *shown], show_progress_on=wave, **private)
        # One at a time, as the recognizer asks for.
        start.click(
            transcribe,
            [recording, language, reference],
            results,
            show_progress_on=wave,
            concurrency_limit=1,
            **private,
        )
    return page


def _results(result: Result, waveform: np.ndarray, name: str, reference: str) -> tuple[str, ...]:
    """The contents of the page's parts."""
    best = result.expert or result.base
    about = _about(name, best.seconds, language_name(best.language))
    srt = download_html(f"{Path(name).stem}.srt", format_transcript(best, "srt", Path(name)))
    base_words = plain_words(result.base.text, best.language)
    expert_words = [] if result.gates is None else result.gates.words
    base_flags, expert_flags = differences(base_words, expert_words, best.language)

    def side(title: str, text: str, html: str) -> str:
        return f"<h3>{title}{_rates(text, reference, best.language)}</h3>{html}"

    if result.expert is None or result.gates is None:
        base = side("Base model", result.base.text, text_html(base_words, [False] * len(base_words)))
        return about, waveform_html(waveform), base, "", _NO_EXPERT, srt
    return (
        about,
        waveform_html(waveform, result.gates.positions),
        side("Base model", result.base.text, text_html(base_words, base_flags)),
        side("With the expert", result.expert.text, text_html(expert_words, expert_flags)),
        _LEGEND,
        srt,
    )


def _about(name: str, seconds: float, language: str = "") -> str:
    return f"<b>{escape(name)}</b>, {seconds:.1f} s{language and ', ' + escape(language)}"


def _rates(text: str, reference: str, language: str) -> str:
    """The error rates for a title; "" without a reference that has words."""
    if not normalize_text(reference, language):
        return ""
    return f" · {format_rates(error_rates([text], [reference], language=language)[language])}"
