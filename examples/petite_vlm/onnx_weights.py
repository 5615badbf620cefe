"""Just enough of the ONNX file format to read its weights, so that the demo needs no ONNX package.

An ONNX file is one protocol-buffer message. Only these fields are read: ModelProto.graph (7), GraphProto.node (1) and
.initializer (5), NodeProto.input (1), .output (2), .op_type (4), TensorProto.dims (1), .data_type (2), .name (8),
.raw_data (9).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FLOAT32 = 1  # TensorProto.DataType


@dataclass(frozen=True)
class Node:
    """One operation of the graph, by the names of its values."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The (field number, value) pairs of one message; a value is an integer or the bytes of the field."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"not an ONNX file: wire type {wire} at byte {at}")
        if at + size > len(data):
            raise ValueError("the ONNX file is cut short")
        yield number, data[at : at + size]
        at += size


def _tensor(message: memoryview) -> tuple[str, np.ndarray | None]:
    """Name and float32 value of a TensorProto; None for a tensor of another type."""
    name, kind, raw = "", 0, None
    dims: list[int] = []
    for number, value in _fields(message):
        if number == 1 and isinstance(value, int):
            dims.append(value)
        elif number == 1:
            at = 0
            while at < len(value):  # packed integers
                dim, at = _varint(value, at)
                dims.append(dim)
        elif number == 2:
            kind = int(value)
        elif number == 8:
            name = bytes(value).decode()
        elif number == 9:
            raw = value
    if kind != FLOAT32 or raw is None:
        return name, None
    return name, np.frombuffer(raw, dtype="<f4").reshape(dims)


def read_onnx(path: Path) -> tuple[dict[str, np.ndarray], list[Node]]:
    """The float32 initialisers (views of the file's bytes) and the nodes of an ONNX file."""
    weights: dict[str, np.ndarray] = {}
    nodes: list[Node] = []
    for number, graph in _fields(memoryview(path.read_bytes())):
        if number != 7:
            continue
        for field, message in _fields(graph):
            if field == 5:
                name, value = _tensor(message)
                if value is not None:
                    weights[name] = value
            elif field == 1:
                parts = [(n, bytes(v).decode()) for n, v in _fields(message) if n in (1, 2, 4)]
                nodes.append(
                    Node(
                        op=next((v for n, v in parts if n == 4), ""),
                        inputs=tuple(v for n, v in parts if n == 1),
                        outputs=tuple(v for n, v in parts if n == 2),
                    )
                )
    return weights, nodes
