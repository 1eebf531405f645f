"""Turns a routed Whisper into a plain one."""
