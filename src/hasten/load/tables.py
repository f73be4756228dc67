"""CSV, TSV and Parquet tables: numeric columns become one input (n, features), one column the labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hasten.core.data import Array
from hasten.core.errors import BackendMissing, DataRefused, HastenError, UsageError
from hasten.load.examples import Loaded, Naming, check_growth, check_room, checked, listed, roles

if TYPE_CHECKING:
    import pandas as pd

_MOST_COLUMNS, _LONGEST_HEADER = 100_000, 2**23
_BYTES_PER_CSV_BYTE = 4  # "0," becomes a float64


def read_table(path: Path, naming: Naming) -> Loaded:
    """The table in `path`; see `from_frame`."""
    pandas = _pandas()
    try:
        if path.suffix.lower() == ".parquet":
            frame = _read_parquet(path)
        else:
            _check_header(path)
            check_room(path.stat().st_size * _BYTES_PER_CSV_BYTE, f"{path}, read,")
            frame = pandas.read_csv(path, sep="\t" if path.suffix.lower() == ".tsv" else ",", low_memory=False)
    except HastenError:
        raise
    except Exception as why:  # pandas and pyarrow raise anything on a damaged file
        told = (str(why).splitlines() or [type(why).__name__])[0]
        raise DataRefused(f"{path} must be a table with a row of column names: {told}") from why
    return from_frame(frame, naming, where=str(path))


def from_frame(frame: pd.DataFrame, naming: Naming, *, where: str) -> Loaded:
    """A table as a data set.

    Numeric and boolean columns are the features, in their order, as float32. The target column gives classes if it holds
    integers, booleans or text, values if it holds floats.

    Raises:
        UsageError: no target column can be told; the message names the columns.
        DataRefused: text or dates among the features, missing labels, a column without a name.
    """
    types = _pandas().api.types
    columns = [str(name) for name in frame.columns]
    frame = frame.set_axis(columns, axis=1)
    _check_columns(columns, where)
    features, target = roles(columns, naming, where=where)
    if target is None:
        raise UsageError(
            f"{where} has no column y, label or target; say with --target which column holds the labels: {listed(columns)}"
            f"{_semicolons(columns)}"
        )
    if frame.empty:
        raise DataRefused(f"{where} must hold examples, got column names alone")
    wordy = [name for name in features if not types.is_numeric_dtype(frame[name].dtype)]
    if wordy:
        raise DataRefused(f"{where}: features must be numbers, got text or dates in {listed(wordy)}; encode or drop them")
    matrix = frame[features].to_numpy(dtype=np.float32, na_value=np.nan)
    _check_filled(matrix, features, where)
    return checked(
        [matrix],
        _column(frame[target], where),
        groups=None if naming.group is None else _column(frame[naming.group], where),
        classes=naming.classes,
    )


def _semicolons(columns: Sequence[str]) -> str:
    return "; is it separated by semicolons? Commas or tabs are taken" if len(columns) == 1 and ";" in columns[0] else ""


def _check_header(path: Path) -> None:
    """From the first line alone: a table keeps an object for every column, however short."""
    with open(path, "rb") as file:
        names = file.readline(_LONGEST_HEADER)
    if len(names) == _LONGEST_HEADER or names.count(b",") + names.count(b"\t") > _MOST_COLUMNS:
        raise DataRefused(f"{path} must have at most {_MOST_COLUMNS} columns, got more; give it as .npz")


def _check_columns(columns: list[str], where: str) -> None:
    nameless = [name for name in columns if name.startswith("Unnamed: ") or not name]
    if nameless:
        raise DataRefused(
            f"{where}: every column must have a name, got {listed(nameless)}; a table saved with its row numbers "
            f"must be saved without them, or they would count as a feature"
        )
    if len(set(columns)) != len(columns):
        raise DataRefused(f"{where}: every column must have a name of its own, got {listed(columns)}")


def _check_filled(matrix: Array, features: list[str], where: str) -> None:
    wrong = ~np.isfinite(matrix)
    if wrong.any():
        rows = np.flatnonzero(wrong.any(axis=1))
        names = [name for name, bad in zip(features, np.any(wrong, axis=0), strict=True) if bad]
        raise DataRefused(
            f"{where}: features must be finite numbers, got empty, NaN or infinite cells in {listed(names)} "
            f"({len(rows)} of {len(matrix)} rows, the first is row {rows[0]}); remove or fill them"
        )


def _column(column: pd.Series, where: str) -> Array:
    """Integers and booleans as int64, floats as float64, anything else as text."""
    types = _pandas().api.types
    missing = np.flatnonzero(column.isna())
    if len(missing):
        raise DataRefused(
            f"{where}: column {column.name} must be filled, it is empty in {len(missing)} of {len(column)} rows, "
            f"the first is row {missing[0]}"
        )
    if types.is_bool_dtype(column.dtype) or types.is_integer_dtype(column.dtype):
        return np.asarray(column.to_numpy(dtype=np.int64))
    if types.is_float_dtype(column.dtype):
        return np.asarray(column.to_numpy(dtype=np.float64))
    return np.array([str(value) for value in column])


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        from pyarrow import parquet
    except ImportError as why:
        raise BackendMissing("reading Parquet needs pyarrow; pip install 'hasten[tables]'") from why
    facts = parquet.read_metadata(path)
    size = facts.num_rows * facts.num_columns * 8
    check_growth(size, path.stat().st_size, f"{path}, read,")
    check_room(size, f"{path}, read,")
    return parquet.read_table(path).to_pandas()


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as why:
        raise BackendMissing("reading tables needs pandas; pip install 'hasten[tables]'") from why
    return pandas
