"""Networks in ncnn's format, run by torch: a text of nodes (.param), and their weights one after another (.bin).

Only what super-resolution networks of residual dense blocks need: convolutions, sums, concatenations and enlarging by
repetition. ncnn's wiki has the format ("param and model file structure", "operation-param-weight-table").
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAGIC = "7767517"
HALF = 0x01306B47  # the tag before weights in float16; 0: float32
ARRAY = -23300  # keys of arrays are so much less than their number
LEAKY = 2  # the activation x if x > 0 else slope·x
ALIGNED = 4  # bytes that weights in float16 are filled up to


@dataclass(frozen=True)
class Node:
    """A line of a .param file; `values` by key, arrays as lists."""

    kind: str
    name: str
    inputs: list[str]
    outputs: list[str]
    values: dict[int, float | list[float]]


def read_nodes(text: str) -> list[Node]:
    """The nodes of a .param file, in the order of computation. Raises ValueError for text of another kind."""
    magic, _, *lines = text.strip().splitlines()
    if magic.strip() != MAGIC:
        raise ValueError(f"a .param file begins with {MAGIC}, not {magic[:20]!r}")
    return [_node(line.split()) for line in lines]


def _node(words: list[str]) -> Node:
    kind, name, before, after = words[0], words[1], int(words[2]), int(words[3])
    values = {}
    for word in words[4 + before + after :]:
        key, _, value = word.partition("=")
        if int(key) <= ARRAY:
            values[ARRAY - int(key)] = [float(one) for one in value.split(",")[1:]]  # the first is their count
        else:
            values[int(key)] = float(value)
    return Node(kind, name, words[4 : 4 + before], words[4 + before : 4 + before + after], values)


def read_convolutions(nodes: list[Node], data: bytes) -> dict[str, nn.Conv2d]:
    """The convolutions, by node name, with the weights of a .bin file.

    Raises ValueError for weights that are neither float16 nor float32, and where bytes are missing or left.
    """
    found, at = {}, 0
    for node in nodes:
        if node.kind != "Convolution":
            continue
        layer = _empty(node)
        tag = int(np.frombuffer(data, "<u4", 1, at)[0])
        if tag not in (0, HALF):
            raise ValueError(f"weights of {node.name} have the tag {tag:#x}; read are float16 and float32")
        kind, count = np.dtype("<f2" if tag else "<f4"), layer.weight.numel()
        weight = np.frombuffer(data, kind, count, at + 4).astype(np.float32)
        at += 4 + -(-count * kind.itemsize // ALIGNED) * ALIGNED
        layer.weight.data.copy_(torch.from_numpy(weight).view(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.data.copy_(torch.from_numpy(np.frombuffer(data, "<f4", len(layer.bias), at).copy()))
            at += 4 * len(layer.bias)
        found[node.name] = layer
    if at != len(data):
        raise ValueError(f"{len(data)} bytes of weights where {at} are described")
    return found


def _empty(node: Node) -> nn.Conv2d:
    outputs, taps, weights = (int(node.values[key]) for key in (0, 1, 6))
    given = {key: int(node.values.get(key, standard)) for key, standard in {2: 1, 3: 1, 4: 0, 5: 0, 9: 0}.items()}
    if given[9] not in (0, LEAKY):
        raise ValueError(f"{node.name} has the activation {given[9]}; run are 0 (none) and {LEAKY} (leaky)")
    options = dict(dilation=given[2], stride=given[3], padding=given[4], bias=bool(given[5]))
    return nn.Conv2d(weights // (outputs * taps**2), outputs, taps, **options)


def sources(nodes: list[Node]) -> dict[str, tuple[str, ...]]:
    """By convolution name, the tensors that its input consists of, one channel after another."""
    parts: dict[str, tuple[str, ...]] = {}
    for node in nodes:
        joined = tuple(part for name in node.inputs for part in parts.get(name, (name,)))
        if node.kind in ("Split", "Concat"):
            parts.update(dict.fromkeys(node.outputs, joined))
    return {node.name: parts.get(node.inputs[0], (node.inputs[0],)) for node in nodes if node.kind == "Convolution"}


class Network(nn.Module):
    """A network of ncnn; `layers` are its convolutions. Images are [B, 3, H, W], red first, from 0 to 1."""

    def __init__(self, nodes: list[Node], convolutions: dict[str, nn.Conv2d]):
        super().__init__()
        self.nodes, self.layers = nodes, nn.ModuleDict(convolutions)
        self.eval().requires_grad_(False)

    @classmethod
    def read(cls, path: Path) -> Network:
        """The network of PATH.param and PATH.bin."""
        nodes = read_nodes(path.with_suffix(".param").read_text())
        return cls(nodes, read_convolutions(nodes, path.with_suffix(".bin").read_bytes()))

    def forward(self, image: Tensor) -> SimpleNamespace:
        """The last node's output, returned as of a denoiser."""
        left = Counter(name for node in self.nodes for name in node.inputs)
        tensors: dict[str, Tensor] = {}
        for node in self.nodes:
            found = [image] if node.kind == "Input" else self._outputs(node, [tensors[name] for name in node.inputs])
            tensors.update(zip(node.outputs, found, strict=True))
            for name in node.inputs:  # what nobody needs any more goes
                left[name] -= 1
                if not left[name]:
                    del tensors[name]
        return SimpleNamespace(sample=tensors[self.nodes[-1].outputs[0]])

    def _outputs(self, node: Node, inputs: list[Tensor]) -> list[Tensor]:
        kind, values = node.kind, node.values
        if kind == "Convolution":
            found = self.layers[node.name](inputs[0])
            return [F.leaky_relu(found, values[10][0]) if values.get(9) == LEAKY else found]
        if kind == "Split":
            return inputs * len(node.outputs)
        if kind == "Concat" and not values.get(0):
            return [torch.cat(inputs, 1)]
        if kind == "Eltwise" and values.get(0) == 1:
            return [sum(factor * one for factor, one in zip(values[1], inputs, strict=True))]
        if kind == "BinaryOp" and not values.get(0):
            return [inputs[0] + inputs[1]]
        if kind == "Interp" and values.get(0) == 1:
            return [F.interpolate(inputs[0], scale_factor=(values[1], values[2]), mode="nearest")]
        raise ValueError(f"{node.name} is a {kind} {values}, which is not run")
