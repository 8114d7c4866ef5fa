"""The rotary position embedding in a config.json.

transformers 5 writes `rope_parameters`, of each kind of layer where they differ; before, `rope_theta` stood beside a
`rope_scaling`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from advgame_jax.architecture import Rope
from advgame_jax.types import UserError

Values = Mapping[str, Any]

# Their names of Llama 3.1's scaling, and ours.
LLAMA_3 = {
  "factor": "factor",
  "low_freq_factor": "low_frequency",
  "high_freq_factor": "high_frequency",
  "original_max_position_embeddings": "original_length",
}


def read(values: Values, allowed: Sequence[str], where: str, *, two_thetas: bool) -> tuple[Rope, Rope]:
  """Of layers that see everything, and of those with a window.

  Args:
    allowed: the rope types of this family.
    two_thetas: layers with a window have a base frequency of their own.

  Raises:
    UserError: a form that this model would compute otherwise; `where` is what errors call config.json.
  """
  parameters = values.get("rope_parameters") or {}
  if "full_attention" in parameters:
    parts = (parameters["full_attention"], parameters["sliding_attention"])
    full, local = (_rope(values, part, allowed, where) for part in parts)
    return full, local
  full = _rope(values, parameters or values.get("rope_scaling") or {}, allowed, where)
  return full, Rope(theta=values["rope_local_base_freq"]) if two_thetas else full


def _rope(values: Values, given: Values, allowed: Sequence[str], where: str) -> Rope:
  rope = {"rope_theta": values["rope_theta"], **given}
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind not in allowed:
    raise UserError(f"{where}: the rope type is {kind!r}; allowed: {', '.join(map(repr, allowed))}")
  fraction = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) or 1.0
  if "longrope" not in allowed and fraction != 1:
    raise UserError(f"{where}: partial_rotary_factor is {fraction!r}; allowed: 1")
  names = {
    "llama3": tuple(LLAMA_3),
    "linear": ("factor",),
    "longrope": ("short_factor",),
    "su": ("short_factor",),
  }
  if missing := [name for name in names.get(kind, ()) if name not in rope]:
    raise UserError(f"{where}: the {kind} rope lacks {', '.join(missing)}; allowed: all of {', '.join(names[kind])}")
  settings: dict[str, Any] = {"theta": float(rope["rope_theta"]), "fraction": float(fraction)}
  if kind == "linear":
    settings["factor"] = float(rope["factor"])
  elif kind == "llama3":
    settings |= {ours: rope[theirs] for theirs, ours in LLAMA_3.items()}
  elif kind in ("longrope", "su"):
    _check_longrope(values, rope, where)
    settings |= {"divisors": tuple(map(float, rope["short_factor"])), "amplitude": _amplitude(values, rope)}
  return Rope(**settings)


def _check_longrope(values: Values, rope: Values, where: str) -> None:
  head_size = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
  fraction = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) or 1.0
  pairs, given = int(head_size * fraction) // 2, rope["short_factor"]
  if not isinstance(given, list) or len(given) != pairs:
    raise UserError(f"{where}: short_factor is {given!r}; allowed: {pairs} numbers, one for each pair of dimensions")
  stretch = values.get("max_position_embeddings", 2048) / _original_length(values, rope)
  if rope.get("factor", stretch) != stretch:
    raise UserError(f"{where}: the {rope.get('rope_type')} rope has factor {rope['factor']!r}; allowed: {stretch:g}")


def _original_length(values: Values, rope: Values) -> int:
  """Phi-3's; what stands beside the rope is stronger than what stands in it."""
  return values["original_max_position_embeddings"] or rope["original_max_position_embeddings"]


def _amplitude(values: Values, rope: Values) -> float:
  """LongRoPE's factor of sine and cosine."""
  if rope.get("attention_factor"):
    return float(rope["attention_factor"])
  original = _original_length(values, rope)
  stretch = values.get("max_position_embeddings", 2048) / original
  return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0


def max_positions(values: Values) -> int:
  """Tokens of the longest row. Beyond LongRoPE's original length other divisors would hold; rows end before."""
  rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
  longest = values.get("max_position_embeddings", 2048)
  if "short_factor" in rope:
    return min(longest, _original_length(values, rope))
  return longest


def for_both(base: Values) -> dict[str, Any]:
  """transformers 5's `rope_parameters` as transformers 4 knows them, which 5 reads too."""
  parameters = base.get("rope_parameters")
  values = {name: value for name, value in base.items() if name != "rope_parameters"}
  if not parameters:
    return values
  if "full_attention" in parameters:
    values["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
    parameters = parameters["full_attention"]
  scaling = {name: value for name, value in parameters.items() if name not in ("rope_theta", "partial_rotary_factor")}
  values["rope_theta"] = parameters.get("rope_theta", base.get("rope_theta", 10_000.0))
  if "partial_rotary_factor" in parameters:
    values["partial_rotary_factor"] = parameters["partial_rotary_factor"]
  values["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
  return values
