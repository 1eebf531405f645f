"""Methods, teachers and settings of the comparison."""

from __future__ import annotations

Candidate = tuple[float | None, int | None]  # learning rate and rank

ZERO_SHOT, FULL, LORA, CLSR, LOW_RANK = "zero-shot", "full", "lora", "clsr", "low-rank"
STRAIGHT = "straight"  # straight-through gates; its experts are low-rank, except in the group "rank"
ROUTED = (CLSR, LOW_RANK, STRAIGHT)
EXPERT, FULL_EXPERT = "expert", "full-expert"  # of the second round: experts of low rank and full size
EXPERTS = (*ROUTED, EXPERT, FULL_EXPERT)
METHODS = {
    ZERO_SHOT: "zero-shot",
    FULL: "full fine-tuning",
    LORA: "LoRA",
    CLSR: "CLSR",
    LOW_RANK: "low-rank CLSR",
    STRAIGHT: "CLSR, straight-through",
}
# The earlier demo (docs/explanation/demo.md): gates start on the expert, which is then a LoRA that learns to let go.
STARTS_ON_EXPERT = {
    "straight_through": True,
    "gate_noise": 0.0,
    "gate_budget": 1.0,
    "budget_weight": 0.1,
    "skip_gate_prob": 0.0,
    "expert_dropout": 0.05,
}
# Settings of a method that differ from the paper: gates are hard in training too, and experts are held back less.
METHOD_SETTINGS = {
    STRAIGHT: {"straight_through": True, "gate_budget": 0.75, "skip_gate_prob": 0.0, "expert_dropout": 0.05},
    EXPERT: STARTS_ON_EXPERT,
    FULL_EXPERT: STARTS_ON_EXPERT,
}
# Teachers: the student's base trained on all languages; the base unchanged at 30 s; or `runs.held_out_teacher`.
FINETUNED, BASE, HELD_OUT = "finetuned", "base", "held-out"
ALL_LANGUAGES = "all"  # the language of the run that trains the teacher
TUNING_LANGUAGES, TUNING_SEED = ("ro", "bg"), 0
STUDIED_LANGUAGE = "ro"  # single settings are changed in this language
# Learning rates and ranks that tuning tries.
CANDIDATES: dict[str, list[Candidate]] = {
    FULL: [(2e-5, None), (5e-5, None), (1e-4, None)],
    LORA: [(5e-4, 64), (1e-3, 64), (2e-3, 64), (4e-3, 64), (1e-3, 32), (2e-3, 32)],
    CLSR: [(1e-4, None), (2e-4, None), (5e-4, None)],
    LOW_RANK: [(1e-3, 64), (2e-3, 64), (4e-3, 64)],
    STRAIGHT: [(1e-3, 64), (2e-3, 64), (4e-3, 64)],
}
SPLITS = {"test": "in domain", "out_of_domain": "out of domain"}
GATE_SETTINGS = (
    "gate_budget",
    "budget_weight",
    "skip_gate_prob",
    "gate_noise",
    "expert_dropout",
    "straight_through",
)
TEACHER_SETTINGS = ("kd_loss", "kd_weight")
