"""Tables in files: CSV, TSV, JSON, JSON lines and parquet, told apart by their contents."""

import csv
import io
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from advgame_jax.types import UserError

Unnest = Callable[[Mapping[str, Any]], Iterable[Any]]


class Table(NamedTuple):
  """What a file holds."""

  path: str
  columns: list[str]
  rows: list[tuple[str, Mapping[str, Any]]]  # each after its place in the file


def read(path: str, unnest: Unnest = lambda whole: [whole]) -> Table:
  """A file of any format.

  Args:
    unnest: the rows of a JSON file that is one object.

  Raises:
    UserError: it cannot be read, holds nothing, or a row of it is none.
  """
  form = "CSV, TSV, JSON, JSON lines or parquet, in UTF-8"
  try:
    data = pathlib.Path(os.path.expanduser(path)).read_bytes()
    text = "" if data.startswith(_PARQUET) else data.decode("utf-8-sig")
  except OSError as error:
    raise UserError(f"{path!r} cannot be read: {error.strerror}; allowed: {form}") from None
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not UTF-8 at byte {error.start}; allowed: {form}") from None
  except ValueError as error:
    raise UserError(f"{path!r} cannot be read: {error}; allowed: {form}") from None
  if data.startswith(_PARQUET):
    rows = _parquet_rows(data, path)
  else:
    rows = _json_rows(text, path, unnest) if text.lstrip()[:1] in ("{", "[") else _csv_rows(text, path)
  if not rows:
    raise UserError(f"{path} is empty; allowed: one or more rows of {form}")
  return Table(path, list(dict.fromkeys(itertools.chain.from_iterable(row for _, row in rows))), rows)


_PARQUET = b"PAR1"
_END = "\0end of file"


def _csv_rows(text: str, path: str) -> list[tuple[str, Mapping[str, Any]]]:
  """Each row after its first line's number. Blank rows are left out; cells that a short row lacks are blank."""
  usual = csv.field_size_limit(len(text) + len(_END))
  try:
    head = next(filter(str.strip, _lines(text)), "")
    delimiter = max(",\t;", key=lambda character: len(next(csv.reader([head], delimiter=character), [])))
    # Where a quote is never closed, the end is swallowed like everything that follows the quote.
    reader = csv.reader(itertools.chain(_lines(text), [_END]), delimiter=delimiter)
    starts = (reader.line_num + 1 for _ in itertools.count())
    numbered = [(start, cells) for start, cells in zip(starts, reader) if any(map(str.strip, cells))]
  finally:
    csv.field_size_limit(usual)
  if numbered.pop()[1] != [_END]:
    raise UserError(f"{path}: a quoted text does not end; allowed: the whole file, as it was published")
  if not numbered:
    return []
  columns = [column.strip() for column in numbered[0][1]]
  for start, cells in numbered[1:]:
    if len(cells) > len(columns):
      raise UserError(f"{path}, line {start}: {len(cells)} cells; allowed: one for each of the {len(columns)} columns")
  blank = itertools.repeat("")
  return [(f"line {start}", dict(zip(columns, itertools.chain(cells, blank)))) for start, cells in numbered[1:]]


def _lines(text: str) -> Iterator[str]:
  """The lines with their ends, of any system, which quoted texts keep; `io.StringIO` takes four bytes a character."""
  return io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8", newline="")


def _json_rows(text: str, path: str, unnest: Unnest) -> list[tuple[str, Mapping[str, Any]]]:
  """The objects of a JSON list, of JSON lines, or of one object that holds them."""
  try:
    whole = json.loads(text)
  except (ValueError, RecursionError) as error:
    return _json_lines(text, path, error)
  rows = whole if isinstance(whole, list) else list(unnest(whole))
  for number, row in enumerate(rows, 1):
    if not isinstance(row, dict):
      raise UserError(f"{path}, row {number}: {short(row)} is not a JSON object; allowed: a list of objects")
  return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def _json_lines(text: str, path: str, error: Exception) -> list[tuple[str, Mapping[str, Any]]]:
  """Rows of JSON lines; if not even the first line is JSON, they are none, and the error is the whole file's."""
  rows: list[tuple[str, Mapping[str, Any]]] = []
  for number, line in enumerate(text.split("\n"), 1):  # a JSON string may hold other line ends
    if line.strip():
      try:
        row = json.loads(line)
      except (ValueError, RecursionError) as own:
        place, reason = (f"{path}, line {number}", own) if rows else (path, error)
        raise UserError(f"{place}: not JSON ({reason}); allowed: a list of objects, or an object a line") from None
      if not isinstance(row, dict):
        raise UserError(f"{path}, line {number}: not a JSON object; allowed: a list of objects, or an object a line")
      rows.append((f"line {number}", row))
  return rows


def _parquet_rows(data: bytes, path: str) -> list[tuple[str, Mapping[str, Any]]]:
  import pyarrow  # slow to load, and most benchmarks are no parquet
  import pyarrow.parquet

  try:
    rows = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data)).read().to_pylist()
  except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
    raise UserError(
      f"{path} is no parquet that can be read: {str(error).splitlines()[0]}; allowed: the whole file"
    ) from None
  return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def short(value: Any) -> str:
  """A value in an error's sentence."""
  return f"{value!r:.80}"
