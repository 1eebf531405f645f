"""What a supported version of transformers or PEFT cannot do: marks that skip a test there, with the reason."""

import peft
import pytest
import transformers
from packaging.version import parse
from transformers.integrations.peft import MIN_PEFT_VERSION

transformers_own_adapters = pytest.mark.skipif(
    parse(peft.__version__) < parse(MIN_PEFT_VERSION),
    reason=f"the add_adapter and set_adapter of this transformers ask for PEFT {MIN_PEFT_VERSION}",
)
one_graph_in_training = pytest.mark.skipif(
    parse(transformers.__version__) < parse("5.23"),
    reason="transformers below 5.23 draws in Whisper's training whether to drop a layer, which breaks the graph",
)
adapters_on_the_disk = pytest.mark.skipif(
    parse(peft.__version__) < parse("0.21"),
    reason="PEFT 0.20 looks for the weights on the disk under model.model, where the base's names start with model",
)
