"""
Time three ways to route a full expert in an ONNX graph: compute both paths, skip one by `If`, or gather tokens.

    python -m benchmarks.graph_paths

One FFN of whisper-base (or other sizes), for the encoder's 1,500 tokens and for one token of the decoder, with 0, 50
and 100 % of tokens sent to the expert. `both` is what `export_model` writes. `if` computes a path only if some token
takes it. `gather` computes each path for its tokens alone. Ratios are to `both`, within rounds in random order.
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from benchmarks.timing import format_ratio, ratio, time_steps

OPSET = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--inner", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    sessions = {kind: session(kind, arguments) for kind in ("both", "if", "gather")}
    generator = np.random.default_rng(0)
    print("| tokens | to the expert | both, ms | if | gather |\n|---|---|---|---|---|")
    for tokens, repeats in ((1500, 1), (1, 100)):
        x = generator.standard_normal((tokens, arguments.width), dtype=np.float32)
        for share in (0.0, 0.5, 1.0) if tokens > 1 else (0.0, 1.0):
            gate = np.arange(tokens) < share * tokens
            seconds = time_paths(sessions, x, gate, arguments.rounds, repeats)
            milliseconds = 1000 * float(np.median(seconds["both"])) / repeats
            ratios = " | ".join(format_ratio(ratio(seconds, kind, "both")) for kind in ("if", "gather"))
            print(f"| {tokens} | {share:.0%} | {milliseconds:.2f} | {ratios} |")


def time_paths(
    sessions: dict[str, Any], x: np.ndarray, gate: np.ndarray, rounds: int, repeats: int
) -> dict[str, list[float]]:
    """Seconds of `repeats` runs in each round, by kind. All kinds must give the same."""

    def run(kind: str) -> np.ndarray:
        for _ in range(repeats):
            y = sessions[kind].run(None, {"x": x, "gate": gate})[0]
        return y

    expected = run("both")
    for kind in sessions:
        np.testing.assert_allclose(run(kind), expected, atol=1e-4)
    return time_steps({kind: partial(run, kind) for kind in sessions}, rounds)


def session(kind: str, arguments: argparse.Namespace) -> onnxruntime.InferenceSession:
    """A graph of `x` float32 [tokens, width] and `gate` bool [tokens]."""
    graph = Builder(arguments.width, arguments.inner)
    output = getattr(graph, f"{kind}_paths")()
    output.name = "y"
    whole = ir.Graph(
        [graph.x, graph.gate],
        [output],
        nodes=graph.nodes,
        initializers=graph.weights,
        opset_imports={"": OPSET},
        name=kind,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    model = ir.to_proto(ir.Model(whole, ir_version=10)).SerializeToString()
    return onnxruntime.InferenceSession(model, options)


class Builder:
    """Nodes of one routed FFN."""

    def __init__(self, width: int, inner: int) -> None:
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []
        self.numbers = itertools.count()
        floats, bools = ir.TensorType(ir.DataType.FLOAT), ir.TensorType(ir.DataType.BOOL)
        self.x = ir.Value(name="x", type=floats, shape=ir.Shape(["tokens", width]))
        self.gate = ir.Value(name="gate", type=bools, shape=ir.Shape(["tokens"]))
        generator = np.random.default_rng(1)

        def weight(*shape: int) -> ir.Value:
            return self.constant(generator.standard_normal(shape, dtype=np.float32) / shape[0] ** 0.5)

        self.paths = {
            name: (weight(width, inner), weight(inner), weight(inner, width), weight(width))
            for name in ("shared", "expert")
        }

    def constant(self, array: np.ndarray) -> ir.Value:
        name = f"weight{len(self.weights)}"
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        self.weights.append(value)
        return value

    def add(self, op: str, *inputs: Any, nodes: list[ir.Node] | None = None, **attributes: Any) -> ir.Value:
        output = ir.Value(name=f"value{next(self.numbers)}")
        node = ir.node(op, inputs, attributes=attributes, outputs=[output])
        (self.nodes if nodes is None else nodes).append(node)
        return node.outputs[0]

    def ffn(self, x: ir.Value, path: str, nodes: list[ir.Node] | None = None) -> ir.Value:
        first, first_bias, second, second_bias = self.paths[path]
        hidden = self.add("Add", self.add("MatMul", x, first, nodes=nodes), first_bias, nodes=nodes)
        hidden = self.add("Gelu", hidden, nodes=nodes)
        return self.add("Add", self.add("MatMul", hidden, second, nodes=nodes), second_bias, nodes=nodes)

    def choose(self, shared: ir.Value, expert: ir.Value) -> ir.Value:
        return self.add("Where", self.add("Unsqueeze", self.gate, self.constant(np.array([1]))), expert, shared)

    def both_paths(self) -> ir.Value:
        return self.choose(self.ffn(self.x, "shared"), self.ffn(self.x, "expert"))

    def if_paths(self) -> ir.Value:
        numbers = self.add("Cast", self.gate, to=ir.DataType.FLOAT)
        found = []
        for path, op, everything in (("shared", "ReduceMin", 1.0), ("expert", "ReduceMax", 0.0)):
            bound = self.add(op, numbers, keepdims=0)
            unused = self.add("Equal", bound, self.constant(np.float32(everything)))
            computed: list[ir.Node] = []
            y = self.ffn(self.x, path, computed)
            passed: list[ir.Node] = []
            kept = self.add("Identity", self.x, nodes=passed)
            branches = [
                ir.Graph([], [out], nodes=nodes, name=f"{path}_{kind}")
                for kind, out, nodes in (("unused", kept, passed), ("computed", y, computed))
            ]
            found.append(self.add("If", unused, then_branch=branches[0], else_branch=branches[1]))
        return self.choose(*found)

    def gather_paths(self) -> ir.Value:
        y = self.add("Mul", self.x, self.constant(np.float32(0)))
        for path, mask in (("shared", self.add("Not", self.gate)), ("expert", self.gate)):
            rows = self.add("Transpose", self.add("NonZero", mask), perm=[1, 0])  # [tokens of the path, 1]
            y = self.add("ScatterND", y, rows, self.ffn(self.add("GatherND", self.x, rows), path))
        return y


if __name__ == "__main__":
    main()
