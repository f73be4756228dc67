"""TensorFlow SavedModel folders: what operators they hold, read from the bytes. TensorFlow runs some of them when it loads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from hasten.core.errors import ModelRefused
from hasten.load.guards.places import plain_file

_MOST_FILES = 10_000
_MOST = 2**31 - 1
_MOST_NODES = 1_000_000
# SavedModel.meta_graphs=2 · MetaGraphDef.graph_def=2 · GraphDef.node=1, .library=2 · FunctionDefLibrary.function=1
# · FunctionDef.node_def=3 · NodeDef.op=2
_NODES = ((2, 2, 1, 2), (2, 2, 2, 1, 3, 2))
_REACHING = (
    "ReadFile", "WriteFile", "MatchingFiles", "PyFunc", "PyFuncStateless", "EagerPyFunc", "DynamicEnqueueTPUEmbedding", "Save",
    "SaveSlices", "TextLineReader", "TextLineReaderV2", "WholeFileReader", "WholeFileReaderV2", "TFRecordReader", "TFRecordReaderV2",
    "FixedLengthRecordReader", "FixedLengthRecordReaderV2", "IdentityReader", "LMDBReader", "TextLineDataset", "TFRecordDataset",
    "FixedLengthRecordDataset", "InitializeTableFromTextFile", "InitializeTableFromTextFileV2", "XlaLaunch", "RemoteCall",
    "RpcCall", "TryRpc", "Rpc", "DebugIdentity", "DebugIdentityV2", "PrintV2", "LoadLibrary", "CopyHost", "TensorArrayReadFile",
)  # fmt: skip


def check_saved_model(folder: Path) -> None:
    """Refuses a folder with links, and graphs with operators that read or write files, call Python or other machines.

    Raises:
        ModelRefused: naming the file or the operator; or the description is damaged.
    """
    count = 0
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            count += 1
            if (Path(place) / name).is_symlink() or count > _MOST_FILES:
                raise ModelRefused(
                    f"expected a folder of at most {_MOST_FILES} plain files, got {name[:100]!r}, a link or more: not opened"
                )
        for name in names:
            plain_file(Path(place), name)
    data = plain_file(folder, "saved_model.pb").read_bytes()
    if len(data) > _MOST:
        raise ModelRefused(f"saved_model.pb must be below 2 GB, got {len(data) / 1e9:.1f} GB")
    for path in _NODES:
        for number, found in enumerate(strings(memoryview(data), path)):
            operator = bytes(found).decode(errors="replace")
            if operator in _REACHING:
                raise ModelRefused(f"expected operators on tensors alone, got {operator}, which reaches out of the graph: not opened")
            if number > _MOST_NODES:
                raise ModelRefused(f"expected at most {_MOST_NODES} nodes, got more: not opened")


def strings(data: memoryview, path: tuple[int, ...]) -> Iterator[memoryview]:
    """The texts or messages at a path of field numbers in a protobuf message, in their order.

    Raises:
        ModelRefused: the message is damaged.
    """
    for number, value in _fields(data):
        if number == path[0] and len(path) == 1:
            yield value
        elif number == path[0]:
            yield from strings(value, path[1:])


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The fields that hold bytes, with their numbers."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            _, place = _varint(data, place)
            continue
        length = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            length, place = _varint(data, place)
        if length is None or place + length > len(data):
            raise ModelRefused("saved_model.pb is damaged: a field leads outside; save the model again")
        if kind == 2:
            yield key >> 3, data[place : place + length]
        place += length


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            break
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ModelRefused("saved_model.pb is damaged: a number does not end; save the model again")
