"""Configuration of a CLSR adapter."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftType

from ..languages.tags import language_tag, prompt_code
from . import peft_type  # noqa: F401  adds PeftType.CLSR

# Settings of "Multilingual DistilWhisper". For those of a whole training see examples/recipes/paper.yaml.
_PAPER = {
    "gate_dim": 64,
    "gate_dropout": 0.1,
    "gate_noise": 5.0,
    "skip_gate_prob": 0.2,
    "gate_budget": 0.5,
    "budget_weight": 1.0,
    "expert_dropout": 0.3,
    "expert_rank": None,
    "init_weights": True,
    "straight_through": False,
    "translate_with_shared_decoder": True,
}


@dataclass
class CLSRConfig(PeftConfig):
    """
    Configuration of a [`CLSRModel`]: conditional language-specific routing, with one adapter for each language.

    A trainable expert stands beside each frozen feed-forward network (FFN), and a gate chooses between the two for
    each token (Ferraz et al., "Multilingual DistilWhisper", 2024; Zhang et al., "Share or Not?", ICLR 2021).

    The defaults are for some hundred recordings (docs/results/index.md). [`CLSRConfig.paper`] has the paper's.

    Args:
        language (`str`, *optional*):
            The language or dialect of the adapter, also one that Whisper does not know: a BCP 47 tag ("ca",
            "ca-valencia", "rw") or an English name, stored as the standard tag, see [`language_tag`].
        prompt_language (`str`, *optional*):
            The Whisper language whose token stands in the prompt, code or English name. By default Whisper's own for
            `language`, "ca" for "ca-valencia". Where Whisper has none, it must be given: one that sounds similar.
        target_modules (`list[str]` or `str`, *optional*):
            The FFN's input projections, matched by PEFT's rules: a list of names or suffixes, or one regular
            expression. If both this and `output_modules` are left out, the architecture decides. An FFN has one input
            projection, or two if it is gated (LLaMA, T5 v1.1).
        output_modules (`list[str]` or `str`, *optional*):
            The FFN's output projections, one for each FFN, in the same module as its input projections. Only
            elementwise operations (an activation, dropout, a product of the two inputs) may stand between them.
        gate_dim (`int`, *optional*, defaults to 64): Hidden size of the gate.
        gate_dropout (`float`, *optional*, defaults to 0.1): Dropout on the gate's input in training, in [0, 1).
        gate_noise (`float`, *optional*, defaults to 0.0):
            Standard deviation of the noise on the gate logit, at least 0. With `straight_through`, it falls linearly
            from this value to 0 in the first half of training; without, it rises from 0 to this value at the end.
            [`GateScheduleCallback`] (or `set_gate_progress`) updates it.
        skip_gate_prob (`float`, *optional*, defaults to 0.0):
            Probability, in [0, 1), that a module uses its shared FFN only, drawn for each module and training step.
            Its gate values count in the budget all the same.
        gate_budget (`float`, *optional*, defaults to 1.0): Target mean of the gate values, in [0, 1].
        budget_weight (`float`, *optional*, defaults to 1.0): Weight of the budget loss, at least 0.
        expert_dropout (`float`, *optional*, defaults to 0.0):
            Dropout on the expert's output in training, in [0, 1). For a low-rank expert, dropout on the input of its
            output projection.
        expert_rank (`int`, *optional*, defaults to 32):
            Rank of the expert's difference to the shared FFN: `shared(x) + B(A(x))` for each projection. `None` makes
            the expert a full copy of the FFN, with far more parameters.
        init_weights (`bool`, *optional*, defaults to `True`):
            Start the expert as a copy of the shared FFN, so that a fresh adapter changes nothing. `False` starts from
            random weights; discouraged.
        layers_to_transform (`list[int]` or `int`, *optional*): Only the layers of these indices.
        layers_pattern (`list[str]` or `str`, *optional*): Name of the list of layers, such as "layers".
        exclude_modules (`list[str]` or `str`, *optional*): Modules to leave out, matched like `target_modules`.
        modules_to_save (`list[str]`, *optional*): Further modules to train in full and save with the adapter.
        max_audio_seconds (`float`, *optional*):
            Audio context in seconds, a multiple of 0.02. A Whisper is cut to it when the adapter is added, and
            restored when the adapter is removed, so that a loaded adapter runs at the context of its training. All
            adapters on a model share one context. `set_audio_context` cuts the processor. By default the model's
            context is kept.
        straight_through (`bool`, *optional*, defaults to `True`):
            Makes gates 0 or 1 in training as in evaluation, with the gradient of their sigmoid (the straight-through
            estimator, Bengio et al., 2013). Each token is then trained on one path, the one that it takes in
            evaluation. `gate_noise` makes it try both at first. `False` trains tokens on blends of both paths, as the
            paper does.
        translate_with_shared_decoder (`bool`, *optional*, defaults to `False`):
            When a Whisper translates (`<|translate|>` in the prompt), only its encoder is routed. Its decoder takes
            the shared FFNs, as in the reference implementation. This holds in `generate`, and in training by
            [`DistillationTrainer`] or within [`CLSRModel.route_samples`] with labels.
        started_from (`str`, *optional*): The expert that this one started as a copy of. [`warm_start`] sets it.

    Raises:
        ValueError: a language is unknown, Whisper has none for `language` and no `prompt_language` is given, or a
            value is outside the range given above.
    """

    language: str | None = field(
        default=None, metadata={"help": "The language of the adapter: a language tag or English name."}
    )
    prompt_language: str | None = field(
        default=None, metadata={"help": "The Whisper language in the prompt; by default Whisper's own for language."}
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of the FFN's input projections, or a regular expression."}
    )
    output_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of the FFN's output projections, or a regular expression."}
    )
    gate_dim: int = field(default=64, metadata={"help": "Hidden size of the gate."})
    gate_dropout: float = field(default=0.1, metadata={"help": "Dropout on the gate's input in training, in [0, 1)."})
    gate_noise: float = field(
        default=0.0, metadata={"help": "Highest standard deviation of the noise on the gate logit."}
    )
    skip_gate_prob: float = field(
        default=0.0, metadata={"help": "Probability that a module uses its shared FFN only in a training step."}
    )
    gate_budget: float = field(default=1.0, metadata={"help": "Target mean of the gate values, in [0, 1]."})
    budget_weight: float = field(default=1.0, metadata={"help": "Weight of the budget loss, at least 0."})
    expert_dropout: float = field(default=0.0, metadata={"help": "Dropout on the expert's output, in [0, 1)."})
    expert_rank: int | None = field(
        default=32, metadata={"help": "Rank of the expert's difference to the shared FFN; None: a full copy."}
    )
    init_weights: bool = field(default=True, metadata={"help": "Start the expert as a copy of the shared FFN."})
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Only the layers of these indices."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers, used with layers_to_transform."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of modules to leave out, or a regular expression."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train in full and save with the adapter."}
    )
    max_audio_seconds: float | None = field(
        default=None, metadata={"help": "Audio context, in seconds, to which a Whisper is cut for the adapter."}
    )
    straight_through: bool = field(
        default=True, metadata={"help": "Gates are 0 or 1 in training too, with the gradient of their sigmoid."}
    )
    translate_with_shared_decoder: bool = field(
        default=False, metadata={"help": "The decoder takes the shared FFNs when a Whisper translates."}
    )
    started_from: str | None = field(
        default=None, metadata={"help": "The expert that this one started as a copy of; set by warm_start."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.CLSR
        if self.language is not None:
            self.language = language_tag(self.language)
            self.prompt_language = prompt_code(self.language, self.prompt_language)
        elif self.prompt_language is not None:
            raise ValueError(
                f"prompt_language is {self.prompt_language!r} but language is not given: name the language of the "
                "adapter, such as language='rw'"
            )
        for name in ("target_modules", "output_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern is {self.layers_pattern!r} but layers_to_transform is not given: give the indices of "
                "the layers, or leave both out"
            )
        for name in ("target_modules", "output_modules"):
            if isinstance(getattr(self, name), str) and self.layers_to_transform is not None:
                raise ValueError(
                    f"layers_to_transform is {self.layers_to_transform} and {name} is the regular expression "
                    f"{getattr(self, name)!r}, which layers_to_transform does not limit: give a list of names, or put "
                    "the layers into the expression"
                )
        self._check("gate_dim", self.gate_dim >= 1, "at least 1", "64 is the paper's")
        if self.expert_rank is not None:
            self._check("expert_rank", self.expert_rank >= 1, "at least 1", "None makes a full expert")
        if self.max_audio_seconds is not None:
            self._check(
                "max_audio_seconds", self.max_audio_seconds > 0, "above 0", "leave it out for the model's 30 s"
            )
        self._check(
            "gate_budget", 0 <= self.gate_budget <= 1, "in [0, 1]", "0.5 gives half of the tokens to the expert"
        )
        for name in ("gate_dropout", "skip_gate_prob", "expert_dropout"):
            self._check(name, 0 <= getattr(self, name) < 1, "a probability in [0, 1)", "0 turns it off")
        for name in ("gate_noise", "budget_weight"):
            self._check(name, getattr(self, name) >= 0, "at least 0", "0 turns it off")

    @classmethod
    def paper(cls, language: str | None = None, **overrides: Any) -> CLSRConfig:
        """
        The settings of "Multilingual DistilWhisper" (Ferraz et al., 2024), whatever the defaults are.

        Args:
            language (`str`, *optional*): As of the class.
            overrides: Further arguments of the class. They replace the paper's.

        Example:

        ```py
        >>> model = get_peft_model(whisper, CLSRConfig.paper(language="ca"), adapter_name="ca")
        ```
        """
        return cls(**{**_PAPER, "language": language, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """The fields, as they are saved. A relative path of the base model would mean nothing in another folder."""
        fields = super().to_dict()
        base = fields["base_model_name_or_path"]
        if base and os.path.isdir(base):
            fields["base_model_name_or_path"] = os.path.abspath(base)
        return fields

    def _check(self, name: str, holds: bool, expected: str, remedy: str) -> None:
        if not holds:  # NaN fails every comparison
            raise ValueError(f"{name} is {getattr(self, name)}, expected {expected}: {remedy}")
