"""Converts experts of the reference implementation (naver/multilingual-distilwhisper-*) into PEFT adapters."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from ..languages.tags import language_code
from ..tuner.architectures import FFN_PROJECTIONS
from ..tuner.config import CLSRConfig

_KEY = re.compile(
    r"model\.(?P<side>encoder|decoder)\.layers\.(?P<layer>\d{1,4})\.ffn_clsr\."
    r"(?P<part>gate_in|gate_out|proj)\.(?P<language>[^.]+)\.(?P<rest>weight|bias|fc[12]\.(?:weight|bias))"
)
# The reference's names in an FFN, without the language, and ours.
_NAMES = {
    "gate_in.weight": "fc1.clsr_gate_in.weight",
    "gate_in.bias": "fc1.clsr_gate_in.bias",
    "gate_out.weight": "fc1.clsr_gate_out.weight",
    "proj.fc1.weight": "fc1.clsr_expert.weight",
    "proj.fc1.bias": "fc1.clsr_expert.bias",
    "proj.fc2.weight": "fc2.clsr_expert.weight",
    "proj.fc2.bias": "fc2.clsr_expert.bias",
}


def convert_naver_expert(
    path: str | Path,
    output_dir: str | Path,
    language: str | None = None,
    base_model_name_or_path: str = "openai/whisper-small",
) -> Path:
    """
    Convert an expert of the reference implementation of "Multilingual DistilWhisper" into an adapter's folder.

    The adapter has the original's logits. Neither the base model nor the network is needed. Half-precision weights
    keep their dtype (PEFT casts them to float32 on loading, see `autocast_adapter_dtype`). float64 becomes float32.

    Args:
        path (`str` or `Path`):
            A pickle such as `expert.catalan.bin`, for any size of Whisper. It is read with `weights_only=True`, so it
            runs no code.
        output_dir (`str` or `Path`):
            The folder to create, for [`~peft.PeftModel.from_pretrained`]. It is written completely or not at all.
        language (`str`, *optional*):
            A Whisper code or English name ("ca", "catalan"). By default, the file's language.
        base_model_name_or_path (`str`, *optional*, defaults to `"openai/whisper-small"`):
            The base model that the adapter's config names.

    Returns:
        `Path`: `output_dir`.

    Raises:
        FileNotFoundError: `path` is no file.
        FileExistsError: `output_dir` exists and is not an empty folder.
        ValueError: the file is no checkpoint of that kind, or has wrong keys, shapes or values.

    Example:

    ```py
    >>> from peft_clsr import convert_naver_expert
    >>> convert_naver_expert("expert.catalan.bin", "experts/ca")
    PosixPath('experts/ca')
    ```
    """
    path, output_dir = Path(path), Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(f"{output_dir} exists and is not an empty folder: give another one, or remove it")
    code, ffns = _ffns_in(_load(path), language, path)
    gate_dim = _check_ffns(ffns, path)

    tensors = {}
    for (side, layer), parts in ffns.items():
        for name, tensor in parts.items():
            dtype = torch.float32 if tensor.dtype == torch.float64 else tensor.dtype
            key = f"base_model.model.model.{side}.layers.{layer}.{_NAMES[name]}"
            tensors[key] = tensor.detach().to(dtype).clone(memory_format=torch.contiguous_format)
    inputs, outputs = FFN_PROJECTIONS["whisper"]
    config = CLSRConfig.paper(
        language=code,
        target_modules=list(inputs),
        output_modules=list(outputs),
        gate_dim=gate_dim,
        base_model_name_or_path=base_model_name_or_path,
        inference_mode=True,
    )
    base_class = {
        "base_model_class": "WhisperForConditionalGeneration",
        "parent_library": "transformers.models.whisper.modeling_whisper",
    }

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}.") as scratch:
        folder = Path(scratch, "adapter")  # with the usual permissions, unlike `scratch`
        config.save_pretrained(str(folder), auto_mapping_dict=base_class)
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        if output_dir.exists():
            output_dir.rmdir()  # it is empty, and Windows cannot rename onto it
        folder.rename(output_dir)
    return output_dir


def _load(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickle, by key."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the file may be anything, and so may the error
        raise ValueError(
            f"{path} cannot be read as a pickle of tensors alone ({type(error).__name__}); nothing in it was run. "
            "Expected an expert.<language>.bin of naver/multilingual-distilwhisper-*"
        ) from error
    if not isinstance(checkpoint, dict) or not checkpoint:
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, expected a dict of tensors by key")
    for key, tensor in checkpoint.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path} holds {key!r}: {type(tensor).__name__}, expected a tensor by its name")
        is_plain = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
        # An expanded tensor repeats its data: a small file could fill the memory.
        if not is_plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"tensor {key!r} in {path} is not a plain one with its own data: {tensor.layout}")
    return checkpoint


def _ffns_in(
    checkpoint: dict[str, torch.Tensor], language: str | None, path: Path
) -> tuple[str, dict[tuple[str, int], dict[str, torch.Tensor]]]:
    """The language's code, and the tensors of its FFNs: (side, layer) to a name in `_NAMES` to the tensor."""
    languages: dict[str, dict[tuple[str, int], dict[str, torch.Tensor]]] = {}
    for key, tensor in checkpoint.items():
        match = _KEY.fullmatch(key)
        name = f"{match['part']}.{match['rest']}" if match else None
        if name not in _NAMES:
            raise ValueError(
                f"key {key!r} in {path} is none of an expert, expected one such as "
                "'model.encoder.layers.0.ffn_clsr.proj.catalan.fc1.weight'"
            )
        ffn = (match["side"], int(match["layer"]))
        languages.setdefault(match["language"], {}).setdefault(ffn, {})[name] = tensor
    if language is None:
        if len(languages) > 1:
            raise ValueError(f"{path} holds the languages {sorted(languages)}: name one in `language`")
        language = next(iter(languages))
    code = language_code(language)
    name = LANGUAGES[code]
    if name not in languages:
        raise ValueError(
            f"{path} holds no {name!r} (language={language!r}) but {sorted(languages)}: name one of these"
        )
    return code, dict(sorted(languages[name].items()))


def _check_ffns(ffns: dict[tuple[str, int], dict[str, torch.Tensor]], path: Path) -> int:
    """The hidden size of the gates. Raises a `ValueError` if an FFN is missing, or has wrong shapes or values."""
    hidden_size, gate_dim, ffn_sizes = None, None, {}
    for side in ("encoder", "decoder"):
        layers = [layer for ffn_side, layer in ffns if ffn_side == side]
        if not layers or layers != list(range(len(layers))):
            raise ValueError(f"{path} has experts for the {side}'s layers {layers}, expected all from 0 on")
    for (side, layer), parts in ffns.items():
        where = f"model.{side}.layers.{layer}.ffn_clsr in {path}"
        missing = sorted(set(_NAMES) - set(parts))
        if missing:
            raise ValueError(f"{where} lacks {missing}: the file is not complete, get it again")
        sizes = parts["gate_in.weight"].shape, parts["proj.fc1.weight"].shape
        if any(len(size) != 2 for size in sizes):
            raise ValueError(
                f"{where} has a gate and an fc1 of the shapes {[list(s) for s in sizes]}, expected matrices"
            )
        if hidden_size is None:
            gate_dim, hidden_size = sizes[0]
        ffn_size = ffn_sizes.setdefault(side, sizes[1][0])
        expected = {
            "gate_in.weight": (gate_dim, hidden_size),
            "gate_in.bias": (gate_dim,),
            "gate_out.weight": (1, gate_dim),
            "proj.fc1.weight": (ffn_size, hidden_size),
            "proj.fc1.bias": (ffn_size,),
            "proj.fc2.weight": (hidden_size, ffn_size),
            "proj.fc2.bias": (hidden_size,),
        }
        for name, shape in expected.items():
            tensor = parts[name]
            if tensor.shape != shape:
                raise ValueError(
                    f"{name} of {where} has the shape {list(tensor.shape)}, expected {list(shape)} as in its other "
                    "layers and parts"
                )
            if not tensor.is_floating_point():
                raise ValueError(f"{name} of {where} is of type {tensor.dtype}, expected floating point")
            if not tensor.isfinite().all():
                raise ValueError(f"{name} of {where} has values that are NaN or infinite")
    return gate_dim
