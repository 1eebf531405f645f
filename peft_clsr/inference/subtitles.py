"""Transcripts as text, SRT, VTT and JSON."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import to_json

# Endings of the files, by format.
SUFFIXES = {"text": ".txt", "srt": ".srt", "vtt": ".vtt", "json": ".json"}


@dataclass
class Transcript:
    """
    The transcript of a recording.

    Args:
        language (`str`): The given or detected language, as Whisper's code.
        adapter (`str`, *optional*): The adapter that was used; `None` for the base model.
        seconds (`float`): Length of the recording.
        segments (`list[dict]`): "start" and "end" in seconds, and "text" with the spaces around it.
    """

    language: str
    adapter: str | None
    seconds: float
    segments: list[dict[str, Any]]

    @property
    def text(self) -> str:
        """The whole text. Segments bring their own spaces, as not every script has spaces."""
        return "".join(segment["text"] for segment in self.segments).strip()


def format_transcript(transcript: Transcript, output_format: str, path: Path, task: str = "transcribe") -> str:
    """
    Format a transcript as the content of a file.

    Args:
        transcript ([`Transcript`]): The transcript.
        output_format (`str`): "text" (one line a segment), "srt", "vtt" or "json".
        path (`Path`): The recording, for JSON.
        task (`str`, *optional*, defaults to `"transcribe"`): For JSON.
    """
    segments = [{**segment, "text": segment["text"].strip()} for segment in transcript.segments]
    if output_format == "json":
        content = {
            "file": str(path),
            "seconds": round(transcript.seconds, 3),
            "language": transcript.language,
            "adapter": transcript.adapter,
            "task": task,
            "text": transcript.text,
            "segments": [
                {"start": round(segment["start"], 3), "end": round(segment["end"], 3), "text": segment["text"]}
                for segment in segments
            ],
        }
        return to_json(content)
    if output_format == "text":
        return "\n".join(segment["text"] for segment in segments) + "\n"
    cues = [_cue(number, segment, output_format) for number, segment in enumerate(segments, 1)]
    return "".join((["WEBVTT\n\n"] if output_format == "vtt" else []) + cues)


def _cue(number: int, segment: dict[str, Any], output_format: str) -> str:
    """
    One subtitle of SRT or WebVTT.

    It is written here, as pysubs2 turns a heard "\\N" into a new line. SRT knows no escapes: its text is as it was
    heard. A player of WebVTT shows `&lt;` as "<".
    """
    text = re.sub(r"\s*[\r\n]\s*", "\n", segment["text"])  # an empty line would end the subtitle
    if output_format == "vtt":
        text = html.escape(text, quote=False)
    times = " --> ".join(_time(segment[name], "." if output_format == "vtt" else ",") for name in ("start", "end"))
    return f"{number}\n{times}\n{text}\n\n"


def _time(seconds: float, separator: str) -> str:
    """Hours, minutes, seconds and milliseconds."""
    whole, milliseconds = divmod(round(1000 * seconds), 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}{separator}{milliseconds:03}"
