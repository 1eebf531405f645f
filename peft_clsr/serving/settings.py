"""What the command tells the parts of the service."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """
    The settings of a service. Ray brings them to all machines.

    Args:
        model (`str`): The base Whisper: Hub id or folder.
        name (`str`): The model's name for clients.
        created (`int`): When the service started, in seconds since 1970.
        device (`str`): As torch names it.
        dtype (`str`): "float32", "float16" or "bfloat16".
        threads (`int`): CPU threads of a replica.
        replicas (`int`): Copies of the model.
        batch_size (`int`): Recordings at a time, in a replica.
        max_experts (`int`): Experts that a replica keeps in memory.
        max_bytes (`int`): Size of a file.
        max_seconds (`float`): Length of a recording.
        max_queue (`int`): Requests that wait for a replica.
        key_hash (`str`, *optional*): SHA-256 of the API key, in hexadecimal. Ray gets the hash, not the key.
    """

    model: str
    name: str
    created: int
    device: str
    dtype: str
    threads: int
    replicas: int
    batch_size: int
    max_experts: int
    max_bytes: int
    max_seconds: float
    max_queue: int
    key_hash: str | None = None
