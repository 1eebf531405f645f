"""The CLSR tuner of PEFT: configuration, gates, experts, routing of tokens. Nothing about data or training."""
