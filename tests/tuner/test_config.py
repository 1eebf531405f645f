"""Bad input: each error names the value, and leaves everything as it was."""

from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from peft_clsr import CLSRConfig
from peft_clsr.cli.config_file import arguments_in_file
from peft_clsr.cli.train_options import ExpertArguments, expert_config, make_train_parser


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(4, 8)
        self.relu = nn.ReLU()
        self.lin1 = nn.Linear(8, 4)

    def forward(self, x):
        return self.lin1(self.relu(self.lin0(x)))


def test_defaults_are_those_of_the_command():
    config = CLSRConfig()
    assert config.language is None
    assert config.peft_type == "CLSR"
    assert config.max_audio_seconds is None
    assert (config.straight_through, config.expert_rank, config.init_weights) == (True, 32, True)
    assert config == CLSRConfig(**expert_config(ExpertArguments()))


# Of the paper's experts and gates. They stay, whatever the defaults become.
PAPER = {
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


def test_the_papers_settings_are_one_call_and_follow_no_default():
    @dataclass
    class Changed(CLSRConfig):
        gate_dim: int = 8
        gate_dropout: float = 0.0
        gate_noise: float = 1.0
        skip_gate_prob: float = 0.0
        gate_budget: float = 0.9
        budget_weight: float = 0.1
        expert_dropout: float = 0.0
        expert_rank: int | None = 64
        init_weights: bool = False
        straight_through: bool = True
        translate_with_shared_decoder: bool = False

    for config in (CLSRConfig.paper(language="ca"), Changed.paper("ca")):
        assert config.language == "ca"
        assert {name: getattr(config, name) for name in PAPER} == PAPER
    config = CLSRConfig.paper("ca-valencia", prompt_language="ca", expert_rank=32, gate_budget=0.75)
    assert (config.prompt_language, config.expert_rank, config.gate_budget, config.gate_noise) == ("ca", 32, 0.75, 5.0)
    with pytest.raises(TypeError, match="gate_nois"):
        CLSRConfig.paper("ca", gate_nois=1.0)


def test_every_setting_of_the_method_is_among_the_papers():
    """A new field belongs to the paper's settings, or to those that say what is trained, and where."""
    of_the_model = {"language", "prompt_language", "max_audio_seconds", "started_from", "modules_to_save"}
    of_the_model |= {"target_modules", "output_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
    own = {field.name for field in fields(CLSRConfig)} - {field.name for field in fields(PeftConfig)}
    assert own - of_the_model == set(PAPER)


def test_the_commands_file_has_the_papers_settings():
    path = Path(__file__).parents[2] / "examples" / "recipes" / "paper.yaml"
    parser = make_train_parser("peft-clsr train", everything=True)
    needed = ["--student", "s", "--dataset", "d", "--languages", "ca", "--output_dir", "o"]
    data, expert, _, training = parser.parse_args_into_dataclasses(needed + arguments_in_file(str(path), parser)[1])
    config = CLSRConfig(**expert_config(expert))
    assert {name: getattr(config, name) for name in PAPER} == PAPER
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert written.keys() >= PAPER.keys() - {"init_weights"}  # none is left to a default
    assert (training.kd_loss, training.kd_weight, training.ce_weight, training.temperature) == ("js", 2.0, 1.0, 1.0)
    assert (training.learning_rate, training.num_train_epochs, training.per_device_train_batch_size) == (1e-4, 10, 16)
    assert (training.warmup_steps, training.adam_beta2, training.label_smoothing_factor) == (0.1, 0.98, 0.1)
    assert not data.pack
    lora = yaml.safe_load(path.with_name("lora.yaml").read_text(encoding="utf-8"))
    shared = {name: value for name, value in lora.items() if not name.startswith("lora_")}
    assert shared == {name: written[name] for name in shared} and len(shared) == 7


@pytest.mark.parametrize("language", ["ca", "catalan", "Catalan", "uk", "yue", None])
def test_whisper_languages_are_accepted_by_code_and_by_name(language):
    CLSRConfig(language=language)


def test_an_unknown_language_is_named_with_the_nearest_one():
    with pytest.raises(ValueError, match="catalann") as error:
        CLSRConfig(language="catalann")
    assert "'catalan'" in str(error.value)


@pytest.mark.parametrize("language", ["xx", "", "ca,uk"])
def test_an_unknown_language_without_a_near_one_is_named(language):
    with pytest.raises(ValueError) as error:
        CLSRConfig(language=language)
    assert repr(language) in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gate_budget", -0.01),
        ("gate_budget", 1.01),
        ("gate_budget", float("nan")),
        ("gate_dropout", -0.1),
        ("gate_dropout", 1.0),
        ("skip_gate_prob", -0.1),
        ("skip_gate_prob", 1.0),
        ("expert_dropout", -0.1),
        ("expert_dropout", 1.0),
        ("expert_dropout", float("nan")),
        ("expert_rank", 0),
        ("expert_rank", -2),
        ("gate_dim", 0),
        ("gate_dim", -64),
        ("gate_noise", -1.0),
        ("budget_weight", -0.5),
        ("max_audio_seconds", 0),
        ("max_audio_seconds", -5.0),
        ("max_audio_seconds", float("nan")),
    ],
)
def test_a_value_out_of_range_is_named_with_its_field(field, value):
    with pytest.raises(ValueError) as error:
        CLSRConfig(**{field: value})
    assert field in str(error.value)
    assert str(value) in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gate_budget", 0.0),
        ("gate_budget", 1.0),
        ("gate_budget", 0),
        ("gate_budget", 1),
        ("gate_dropout", 0.0),
        ("skip_gate_prob", 0.99),
        ("expert_dropout", 0),
        ("expert_rank", 1),
        ("gate_dim", 1),
        ("gate_noise", 0.0),
        ("budget_weight", 0.0),
        ("max_audio_seconds", 0.02),
    ],
)
def test_the_ends_of_each_range_are_accepted(field, value):
    assert getattr(CLSRConfig(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"layers_pattern": "layers"}, "layers_to_transform"),
        ({"target_modules": r".*\.fc1", "output_modules": ["fc2"], "layers_to_transform": [0]}, "target_modules"),
        ({"target_modules": ["fc1"], "output_modules": r".*\.fc2", "layers_to_transform": [0]}, "output_modules"),
    ],
)
def test_a_choice_of_layers_that_would_be_ignored_is_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        CLSRConfig(**fields)


def test_a_task_type_that_whisper_cannot_serve_is_refused(tiny_whisper):
    with pytest.raises(ValueError, match="SEQ_2_SEQ_LM.*task_type"):
        get_peft_model(tiny_whisper(), CLSRConfig(task_type="SEQ_2_SEQ_LM"))


@pytest.mark.parametrize("fields", [{"target_modules": ["lin0"]}, {"output_modules": ["lin1"]}])
def test_an_unknown_architecture_needs_both_projections(fields):
    with pytest.raises(ValueError, match="output_modules|target_modules"):
        get_peft_model(MLP(), CLSRConfig(**fields))


@pytest.mark.parametrize(
    ("targets", "outputs", "missing"),
    [
        (["encoder.layers.0.fc1"], ["encoder.layers.0.fc2", "encoder.layers.1.fc2"], r"layers\.1"),
        (["encoder.layers.0.fc1", "decoder.layers.1.fc1"], ["encoder.layers.0.fc2"], r"decoder\.layers\.1"),
    ],
)
def test_a_projection_without_its_partner_is_named(tiny_whisper, targets, outputs, missing):
    with pytest.raises(ValueError, match=missing):
        get_peft_model(tiny_whisper(), CLSRConfig(target_modules=targets, output_modules=outputs))


def test_no_module_matched_is_pefts_own_error(tiny_whisper):
    with pytest.raises(ValueError, match="Target modules .*nothing_like_this.* not found in the base model"):
        get_peft_model(
            tiny_whisper(), CLSRConfig(target_modules=["nothing_like_this"], output_modules=["nor_like_this"])
        )


def test_a_projection_that_is_not_linear_is_named(tiny_whisper):
    with pytest.raises((ValueError, TypeError), match="LayerNorm|layer_norm"):
        get_peft_model(
            tiny_whisper(),
            CLSRConfig(target_modules=["self_attn_layer_norm"], output_modules=["final_layer_norm"]),
        )


def test_two_active_adapters_are_refused_and_the_model_stays_as_it_was(tiny_whisper):
    model = get_peft_model(tiny_whisper(), CLSRConfig(language="ca"), adapter_name="ca")
    model.add_adapter("uk", CLSRConfig(language="be"))
    inputs = {"input_features": torch.randn(1, 80, 100), "decoder_input_ids": torch.tensor([[1, 2, 3]])}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "clsr_" in name:
                parameter.add_(torch.randn_like(parameter))
    model.eval()
    before = model(**inputs).logits
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    with pytest.raises(ValueError, match="ca.*uk"):
        model.base_model.set_adapter(["ca", "uk"])

    assert model.active_adapter == "ca"
    assert model.base_model.active_adapters == ["ca"]
    assert torch.equal(model(**inputs).logits, before)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trainable


@pytest.mark.parametrize("progress", [-0.01, 1.01])
def test_gate_progress_outside_zero_to_one_is_named(tiny_whisper, progress):
    model = get_peft_model(tiny_whisper(), CLSRConfig())
    with pytest.raises(ValueError, match=str(progress).replace(".", r"\.")):
        model.base_model.set_gate_progress(progress)


def test_budget_loss_before_any_forward_says_so(tiny_whisper):
    model = get_peft_model(tiny_whisper(), CLSRConfig())
    with pytest.raises(RuntimeError, match="forward"):
        model.base_model.budget_loss()


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_with_what_to_use_instead(tiny_whisper, method):
    model = get_peft_model(tiny_whisper(), CLSRConfig())
    with pytest.raises(ValueError, match="token") as error:
        getattr(model, method)()
    assert "unload" in str(error.value) or "save_pretrained" in str(error.value)


def test_the_config_survives_a_round_trip_through_its_file(tmp_path):
    fields = {"language": "ca", "gate_dim": 8, "expert_rank": 2, "gate_budget": 0.25, "max_audio_seconds": 2.5}
    config = CLSRConfig(**fields, output_modules=["fc2"])
    config.save_pretrained(tmp_path)
    again = CLSRConfig.from_pretrained(tmp_path)
    for field in (*fields, "peft_type", "skip_gate_prob"):
        assert getattr(again, field) == getattr(config, field)
    assert set(again.output_modules) == {"fc2"}


def test_loading_a_missing_adapter_leaves_the_base_untouched(tiny_whisper, tmp_path):
    base = tiny_whisper()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises((ValueError, OSError)):
        PeftModel.from_pretrained(base, str(tmp_path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
