"""Any data → one checked set: arrays, tensors, torch data sets and loaders, `.npz`, tables, folders of images.

What becomes of the dtypes is told at the head of examples.py.
"""

from __future__ import annotations

import os
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tokenize import TokenError
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from hasten.core.data import Array, View
from hasten.core.errors import DataRefused, ModelRefused, OutOfResources, UsageError
from hasten.load.examples import Loaded, Naming, as_array, assemble, check_labels, check_room, checked, listed, room_bytes
from hasten.load.guards.archives import check_zip

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

__all__ = ["Loaded", "check_labels", "read"]

_PER_EXAMPLE_BYTES = 200
# What a damaged array raises; its header is Python source.
_BROKEN = (OSError, ValueError, EOFError, RuntimeError, MemoryError, OverflowError, TypeError, SyntaxError, TokenError)


def read(source: Any, *, target: str | None = None, group: str | None = None, classes: tuple[str, ...] | None = None) -> Loaded:
    """Reads a data set into memory and checks it.

    Args:
        source: one of
            a `View`, or what `read` returned before (handed back as it is);
            an array or tensor (inputs alone), or a tuple of them, (x, y) or (x1, x2, …, y), or (mapping of inputs, y);
            a mapping of names to arrays, a pandas DataFrame;
            a torch `Dataset` or `DataLoader` or any iterable, of x, (x, y), (x1, x2, …, y), mappings or (mapping, y);
            the path of an `.npz` or `.npy` file, a `.csv`, `.tsv` or `.parquet` table, or of a folder of images with one
            sub-folder per class.
        target: the name of the part that holds the labels. Without it, the one part called y, label, labels or target.
        group: the name of the part whose equal values belong together; it is no input.
        classes: the names of the classes in the order of their numbers. Give the `classes` of the first set when reading a
            second one that belongs to it, or the same name could mean two numbers. None sorts the names.

    Raises:
        UsageError: there is no such file, or no such part in it.
        DataRefused: the data cannot be used; see `examples.checked`.
        OutOfResources: it would fill the memory, as a file that unpacks to far more than it should or an endless iterable.

    >>> read((np.zeros((4, 2)), np.array([0, 1, 1, 0]))).view.inputs[0].dtype
    dtype('float32')
    """
    naming = Naming(target=target, group=group, classes=None if classes is None else tuple(classes))
    if isinstance(source, (Loaded, View)) and (target is not None or group is not None):
        raise UsageError("a View has no named parts: leave out `target` and `group`, and give groups as `Loaded(groups=…)`")
    if isinstance(source, Loaded):
        return source
    if isinstance(source, View):
        return checked(source.inputs, source.labels, classes=classes)
    if isinstance(source, (str, os.PathLike)):
        return _read_path(Path(source), naming)
    if isinstance(source, Mapping):
        return assemble(dict(source), naming, where="the mapping")
    if isinstance(source, tuple) or _is_array(source):
        return assemble(_parts(source), naming, where="the data")
    return _read_object(source, naming)


def _read_path(path: Path, naming: Naming) -> Loaded:
    if not path.exists():
        raise UsageError(f"no such file or folder: {path}")
    if path.is_dir():
        from hasten.load.images import read_folder

        return read_folder(path, naming)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return assemble(_read_npz(path), naming, where=str(path))
    if suffix == ".npy":
        return assemble({"x": _read_npy(path)}, naming, where=str(path))
    if suffix in (".csv", ".tsv", ".parquet"):
        from hasten.load.tables import read_table

        return read_table(path, naming)
    raise UsageError(f"expected .npz, .npy, .csv, .tsv, .parquet or a folder of images, got {path}")


def _read_object(source: Any, naming: Naming) -> Loaded:
    from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(source, pandas.DataFrame):
        from hasten.load.tables import from_frame

        return from_frame(source, naming, where="the table")
    if type(source) is TensorDataset:
        return assemble(_parts(source.tensors), naming, where="the data set")
    if isinstance(source, DataLoader):
        return _read_loader(source, naming)
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        return _collect(_by_index(source), naming, batched=False)
    if isinstance(source, Iterable) and not isinstance(source, (list, set, bytes)):
        return _collect(source, naming, batched=False)
    raise UsageError(f"expected a path, arrays, a tuple (x, y), a mapping, a torch Dataset or DataLoader, got {type(source).__name__}")


def _is_array(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return isinstance(value, np.ndarray) or (torch is not None and isinstance(value, torch.Tensor))


def _parts(item: Any) -> dict[str, Any]:
    """x → {x0}; (x, y) → {x0, y}; (x1, x2, y) → {x0, x1, y}; a mapping is one already, with its labels or beside them."""
    if isinstance(item, Mapping):
        return dict(item)
    if not isinstance(item, tuple):
        return {"x0": item}
    if not item:
        raise DataRefused("an example must hold at least an input, got an empty tuple")
    *inputs, label = item if len(item) > 1 else (*item, None)
    if len(inputs) == 1 and isinstance(inputs[0], Mapping):
        return {**inputs[0], **({} if label is None else {"y": label})}
    return {f"x{i}": x for i, x in enumerate(inputs)} | ({} if label is None else {"y": label})


def _by_index(dataset: Any) -> Iterator[Any]:
    """The examples of a map-style data set: as many as it says, or up to its IndexError where it does not say."""
    try:
        size = len(dataset)
    except TypeError:
        yield from dataset
        return
    for i in range(size):
        yield dataset[i]


def _read_loader(loader: DataLoader[Any], naming: Naming) -> Loaded:
    """The loader's batches. Where it only shuffles or drops the last batch, its data set is read whole and in order."""
    from torch.utils import data

    sampler, batches = loader.sampler, loader.batch_sampler
    shuffles = type(sampler) is data.RandomSampler and not sampler.replacement and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    if type(batches) is data.BatchSampler and (shuffles or type(sampler) is data.SequentialSampler):
        loader = data.DataLoader(loader.dataset, batch_size=loader.batch_size, collate_fn=loader.collate_fn, num_workers=loader.num_workers)
    note = ("the loader shuffles; its examples were read in the order of its data set",) if shuffles else ()
    return _collect(_of_loader(loader), naming, batched=batches is not None, notes=note)


def _of_loader(loader: Iterable[Any]) -> Iterator[Any]:
    """Its items. Collating makes lists of tuples, which this turns back; nothing is drawn before the first is asked for."""
    for item in loader:
        yield tuple(item) if isinstance(item, list) else item


def _collect(items: Iterable[Any], naming: Naming, *, batched: bool, notes: tuple[str, ...] = ()) -> Loaded:
    """Every example in memory, or OutOfResources. torch's random numbers are seeded for the time and put back after."""
    import torch

    columns: dict[str, list[Array]] = {}
    size, room, count = 0, room_bytes(), 0
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        for count, item in enumerate(_told(items), start=1):
            row = {name: _row(value, name, count - 1, batched) for name, value in _parts(item).items()}
            columns = columns or {name: [] for name in row}
            if row.keys() != columns.keys():
                raise DataRefused(f"example {count - 1} must hold {listed(list(columns))} like the first, got {listed(list(row))}")
            for name, array in row.items():
                columns[name].append(array)
                size += array.nbytes + _PER_EXAMPLE_BYTES
            if size > room:
                raise OutOfResources(
                    f"the data set must fit into {room / 1e9:.1f} GB, a third of the free memory, but had not ended after "
                    f"{count} items; if it is endless give a finite part of it (itertools.islice), else a smaller one"
                )
    if not columns:
        raise DataRefused("the data must hold examples, got an empty set")
    parts = {name: _joined(rows, name, batched) for name, rows in columns.items()}
    return assemble(parts, naming, where="the data set", notes=notes)


def _told(items: Iterable[Any]) -> Iterator[Any]:
    """The items; an exception of the user's code says which item it was."""
    iterator, count = iter(items), 0
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        except Exception as why:
            raise DataRefused(f"item {count} of the data set could not be read: {type(why).__name__}: {why}") from why
        yield item
        count += 1


def _row(value: Any, name: str, index: int, batched: bool) -> Array:
    """One example of a part, or one batch of them. A copy where a data set might reuse its buffer."""
    what = f"{name} of item {index}"
    return as_array(value, what) if batched else as_array(value, what, single=True)[None].copy()


def _joined(rows: list[Array], name: str, batched: bool) -> Array:
    odd = next((i for i, row in enumerate(rows) if row.shape[1:] != rows[0].shape[1:]), None)
    if odd is not None:
        unit = "item" if batched else "example"
        raise DataRefused(f"{name} must have one shape in all examples, got {rows[0].shape[1:]} and {rows[odd].shape[1:]} in {unit} {odd}")
    return np.concatenate(rows)


def _read_npy(path: Path) -> Array:
    try:
        with open(path, "rb") as file:
            _check_header(file, path.stat().st_size, path.name)
        return np.load(path, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
    except _BROKEN as why:
        raise DataRefused(f"{path} must be a NumPy array without objects: {why}") from why


def _read_npz(path: Path) -> dict[str, Array]:
    """The members in file order. Their sizes are looked up before anything is unpacked; nothing is ever unpickled."""
    try:
        with open(path, "rb") as file:
            members = check_zip(file, str(path))
            check_room(sum(member.file_size for member in members), f"{path}, unpacked,")
            archive = zipfile.ZipFile(file)
            names = [member.filename.removesuffix(".npy") for member in members]
            if len(set(names)) != len(names):
                raise DataRefused(f"{path} must hold each name once, got {listed(names)}")
            return {name: _read_member(archive, member) for name, member in zip(names, members, strict=True)}
    except (DataRefused, OutOfResources):
        raise
    except (ModelRefused, *_BROKEN, zipfile.BadZipFile, zlib.error) as why:
        raise DataRefused(f"{path} must be a whole .npz of arrays without objects: {why}") from why


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array:
    with archive.open(member) as file:
        _check_header(file, member.file_size, member.filename)
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _check_header(file: IO[bytes], size: int, name: str) -> None:
    """Holds the header of an array against the size of its file: a header alone can ask for any memory."""
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read_header is None:
        raise ValueError(f"{name} has the unknown version {version}")
    shape, _, dtype = read_header(file)
    body = size - file.tell()
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, which are never loaded")
    declared = dtype.itemsize
    for length in shape:
        declared *= length
    if declared != body or min(shape, default=0) < 0:
        raise ValueError(f"{name} declares {declared} bytes and holds {body}")
