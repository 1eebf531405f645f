"""Transcripts as text, SRT, VTT and JSON."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..extras import require
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
    pysubs2 = require("pysubs2")
    subtitles = pysubs2.SSAFile()
    for segment in segments:
        text = html.escape(segment["text"], quote=False) if output_format == "vtt" else segment["text"]
        start, end = (round(1000 * segment[name]) for name in ("start", "end"))
        subtitles.append(pysubs2.SSAEvent(start=start, end=end, text=text))
    return subtitles.to_string(output_format, keep_ssa_tags=True)  # otherwise "{...}" in the text is lost
