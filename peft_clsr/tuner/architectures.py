"""The projections of the FFN in each known architecture. Add an architecture here."""

from __future__ import annotations

# Input and output projections of the FFN by `model_type`. Only elementwise operations may stand between them.
_FC = (("fc1",), ("fc2",))
_T5 = (("wi", "wi_0", "wi_1"), ("wo",))
_LLAMA = (("gate_proj", "up_proj"), ("down_proj",))
FFN_PROJECTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(("whisper", "bart", "mbart", "m2m_100", "opt", "speech_to_text"), _FC),
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"), _LLAMA),
}
