"""Transcripts in the formats of OpenAI's interface."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse, PlainTextResponse, Response

from ..inference.subtitles import Transcript, format_transcript

# What OpenAI tells of a segment, and transcription here does not compute: null, so that clients find the name.
_UNKNOWN = dict.fromkeys(("seek", "tokens", "temperature", "avg_logprob", "compression_ratio", "no_speech_prob"))
FORMATS = ("json", "text", "srt", "vtt", "verbose_json")


def make_response(transcript: Transcript, response_format: str, task: str) -> Response:
    """
    Answer with a transcript.

    Args:
        transcript ([`Transcript`]): The transcript.
        response_format (`str`): One of `FORMATS`.
        task (`str`): "transcribe" or "translate".
    """
    if response_format == "text":
        return PlainTextResponse(transcript.text + "\n")
    if response_format in ("srt", "vtt"):
        return PlainTextResponse(format_transcript(transcript, response_format, Path()))
    content: dict[str, Any] = {"text": transcript.text}
    if response_format == "verbose_json":
        content = {
            "task": task,
            "language": transcript.language,
            "duration": round(transcript.seconds, 3),
            "text": transcript.text,
            "segments": [_segment(number, segment) for number, segment in enumerate(transcript.segments)],
            "adapter": transcript.adapter,
        }
    return JSONResponse(content | {"usage": {"type": "duration", "seconds": math.ceil(transcript.seconds)}})


def _segment(number: int, segment: dict[str, Any]) -> dict[str, Any]:
    times = {name: round(segment[name], 3) for name in ("start", "end")}
    return {"id": number, **times, "text": segment["text"], **_UNKNOWN}
