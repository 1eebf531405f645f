"""
Merges the two graphs of a decoder, of the prompt and of a further token, into one that shares their weights.

The result has the names and shapes that Optimum, transformers.js and onnx-asr read.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import numpy as np

from ..extras import require

_CACHE = r"(input\.|output\.)?past_key_values\.(self|cross)_attention_cache\.layers\.(\d+)\.(key|value)s"
_NAMES = {"decoder_input_ids": "input_ids", "encoder_outputs.last_hidden_state": "encoder_hidden_states"}
_SIDES = {"self": "decoder", "cross": "encoder"}


def merge_decoder(prefill: Any, decode: Any, heads: int, head_size: int) -> Any:
    """
    One graph from the two of transformers' exporter. They stand in the branches of an `If`.

    Inputs are `input_ids`, `encoder_hidden_states`, `past_key_values.N.decoder.key` and so on, and the boolean
    `use_cache_branch` [1]; outputs are `logits`, `present.N.decoder.key` and so on. With the cache, the outputs
    `present.N.encoder.*` are empty, as these parts of it do not change.

    Args:
        prefill (`onnx_ir.Model`): Reads the prompt and fills the cache. It is taken apart.
        decode (`onnx_ir.Model`): Reads one further token. It is taken apart.
        heads (`int`): Attention heads of the decoder.
        head_size (`int`): Values of a head.

    Returns:
        `onnx_ir.Model`: the merged graph.
    """
    ir = require("onnx_ir")
    for value in [value for model in (prefill, decode) for value in (*model.graph.inputs, *model.graph.outputs)]:
        value.name = _io_name(value.name)
    floats = next(value.type for value in prefill.graph.outputs if value.name == "logits")
    outputs = [value.name for value in prefill.graph.outputs if re.match(r"logits$|present\.", value.name)]
    given = {value.name: value for model in (decode, prefill) for value in model.graph.inputs}
    inputs = {
        name: ir.Value(name=name, type=value.type, shape=ir.Shape(_shape(name, heads, head_size)))
        for name, value in given.items()
    }
    for graph in (prefill.graph, decode.graph):
        _transpose_embeddings(graph, ir)
    weights: dict[Any, Any] = {}
    for kind, graph in (("prefill", prefill.graph), ("decode", decode.graph)):
        for value in list(graph.inputs):
            value.replace_all_uses_with(inputs[value.name])
        graph.inputs.clear()
        _share_weights(graph, weights)
        found = {value.name: value for value in graph.outputs}
        graph.outputs.clear()
        for name in outputs:
            if kind == "decode" and ".encoder." in name:
                empty = ir.tensor(np.zeros((0, heads, 1, head_size), dtype=floats.dtype.numpy()))
                graph.append(ir.node("Constant", [], attributes={"value": empty}))
                found[name] = graph[-1].outputs[0]
            graph.outputs.append(found[name])
        _prefix_names(graph, kind)
    flag = ir.Value(name="use_cache_branch", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([1]))
    branches = {"then_branch": decode.graph, "else_branch": prefill.graph}
    choose = ir.node("If", [flag], attributes=branches, num_outputs=len(outputs))
    for value, name in zip(choose.outputs, outputs, strict=True):
        value.name, value.type, value.shape = name, floats, ir.Shape(_shape(name, heads, head_size))
    merged = ir.Graph(
        [*inputs.values(), flag],
        choose.outputs,
        nodes=[choose],
        initializers=list(weights.values()),
        opset_imports=prefill.opset_imports,
        name="decoder",
    )
    return ir.Model(merged, ir_version=prefill.ir_version, producer_name="peft_clsr")


def _io_name(name: str) -> str:
    found = re.fullmatch(_CACHE, name)
    if found is None:
        return _NAMES.get(name, name)
    prefix, attention, layer, kind = found.groups()
    return f"{'past_key_values' if prefix == 'input.' else 'present'}.{layer}.{_SIDES[attention]}.{kind}"


def _shape(name: str, heads: int, head_size: int) -> list[int | str]:
    """The dimensions of an input or output. Those with a name may have any size."""
    if name == "input_ids":
        return ["batch", "tokens"]
    if name == "logits":
        return ["batch", "tokens", "vocabulary"]
    if name == "encoder_hidden_states":
        return ["batch", "positions", heads * head_size]
    return [f"{name}.batch", heads, f"{name}.length", head_size]  # an empty cache has a batch of 0


def _transpose_embeddings(graph: Any, ir: Any) -> None:
    """
    Store the embeddings, which are the weight of the output layer too, as that layer takes them.

    Otherwise each step would transpose them: 100 MB for whisper-base.
    """
    for node in [node for node in graph if node.op_type == "Transpose" and node.inputs[0].is_initializer()]:
        weight = node.inputs[0]
        values = np.ascontiguousarray(weight.const_value.numpy().T)
        flipped = ir.Value(name=f"{weight.name}.T", type=weight.type, shape=ir.Shape(values.shape))
        flipped.const_value = ir.tensor(values, name=flipped.name)
        graph.register_initializer(flipped)
        node.outputs[0].replace_all_uses_with(flipped)
        graph.remove(node, safe=True)
        for gather in [use.node for use in weight.uses() if use.node.op_type == "Gather"]:
            rows = ir.node("Gather", [flipped, gather.inputs[1]], attributes={"axis": 1})  # [width, batch, tokens]
            back = ir.node("Transpose", rows.outputs, attributes={"perm": [1, 2, 0]})
            graph.insert_before(gather, [rows, back])
            gather.outputs[0].replace_all_uses_with(back.outputs[0])
            graph.remove(gather, safe=True)


def _share_weights(graph: Any, weights: dict[Any, Any]) -> None:
    """Move the weights of a graph to `weights`, by their content."""
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        key = (tensor.dtype, tuple(tensor.shape), hashlib.sha256(tensor.tobytes()).hexdigest())
        del graph.initializers[name]
        if not value.uses():
            continue  # a weight of the encoder
        if key in weights:
            value.replace_all_uses_with(weights[key])
        else:
            value.name = f"weights.{len(weights)}" if re.match(r"val_\d", name) else f"{name}.{len(weights)}"
            weights[key] = value


def _prefix_names(graph: Any, prefix: str) -> None:
    """Make the names of nodes and values differ from those of the other branch."""
    graph.name = prefix
    for index, node in enumerate(graph):
        node.name = f"{prefix}/{node.name or index}"
        for value in node.outputs:
            value.name = f"{prefix}/{value.name or f'{index}.{value.index()}'}"
