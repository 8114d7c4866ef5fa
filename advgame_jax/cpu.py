"""What a model computes, by kernels for CPUs: in float32 where they have AVX-512, in bfloat16 where they have AMX too.

XLA's own take twice as long and more, in many more steps. `cpp` has them in C++ against XLA's foreign function
interface (`jax.ffi`): the compiler that is here (`CXX`, else c++ or g++) compiles them once for each jaxlib, into the
user's cache (`XDG_CACHE_HOME`, else ~/.cache). Without a compiler, Linux or AVX-512, or with several devices, over
which XLA cannot split them, everything is XLA's. So are short rows of float32, and gradients, but for those of
bfloat16's products, which are products.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import math
import os
import pathlib
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

log = logging.getLogger(__name__)

_SOURCES = pathlib.Path(__file__).with_name("cpp")
_FLAGS = (
  "-O3 -std=c++17 -shared -fPIC -w -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mamx-tile -mamx-bf16"
)
_NEEDED = {"fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"}
_NEEDED_BY_NARROW = {"avx512_bf16", "amx_tile", "amx_bf16"}
_KERNELS = ("products", "added", "gated", "paged", "causal", "causal_slopes", "draw", "norm", "rotate", "write")
_SECONDS = 300  # at most, of compiling
_SHORT = 128  # numbers of a row
_TILE, _LANES, _MOST_HEAD = 32, 16, 256
GATES = ("silu", "gelu_tanh")  # activations that `gated` knows


class Pages(NamedTuple):
  """P pages of S tokens of one layer, and which of them each row reads: see `attention.Index`."""

  key_PKHS: jax.Array
  value_PKSH: jax.Array
  start_P: jax.Array
  end_P: jax.Array
  page_RJ: jax.Array  # int32, −1 where there is no more


def there(dtype: Any) -> bool:
  """Whether this process has one device, a CPU that the kernels for this dtype run on."""
  return jax.default_backend() == "cpu" and jax.device_count() == 1 and jnp.dtype(dtype) in loaded()


@functools.cache
def loaded() -> frozenset[Any]:
  """The dtypes whose kernels are known to XLA, compiled if need be."""
  nothing: frozenset[Any] = frozenset()
  if _NEEDED - _processor():
    return nothing
  compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or ""]
  if not compiler[0]:
    log.info("no C++ compiler is here: all is left to XLA, which generates half as fast on this CPU")
    return nothing
  try:
    library = _library(compiler)
  except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # the second where nobody has a home
    lines = (getattr(error, "stderr", "") or str(error)).strip().splitlines() or [repr(error)]
    said = next((line for line in lines if "error" in line), lines[0])
    log.warning("the kernels for CPUs cannot be compiled, or loaded (%s): all is left to XLA", said)
    return nothing
  for name in _KERNELS:
    jax.ffi.register_ffi_target(_target(name), jax.ffi.pycapsule(getattr(library, _target(name))), platform="cpu")
  wide, narrow = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
  if _NEEDED_BY_NARROW - _processor():
    return frozenset({wide})
  if library.advgame_cpu_permits_tiles():
    log.info("Linux does not let this process use AMX: bfloat16 is left to XLA")
    return frozenset({wide})
  return frozenset({wide, narrow})


def _target(name: str) -> str:
  return f"advgame_cpu_{name}"


def _processor() -> set[str]:
  """What Linux says that this processor can do."""
  said = pathlib.Path("/proc/cpuinfo")
  lines = said.read_text().splitlines() if said.exists() else []
  return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def _place(compiler: Sequence[str]) -> pathlib.Path:
  """Of the library, in the user's cache."""
  made_of = "\0".join((jaxlib.__version__, *compiler, _FLAGS)).encode()
  sources = b"\0".join(path.read_bytes() for path in sorted(_SOURCES.iterdir()))
  name = hashlib.sha256(sources + made_of).hexdigest()[:16]
  folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "advgame_jax"
  return folder / f"kernels-{name}.so"


def _library(compiler: Sequence[str]) -> ctypes.CDLL:
  """Compiled if it is not in its place, or does not load from there, as from a home that machines share."""
  library = _place(compiler)
  with contextlib.suppress(OSError):
    return ctypes.CDLL(str(library))
  library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
  with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
    unfinished = pathlib.Path(scratch) / library.name
    source, headers = str(_SOURCES / "cpu.cc"), jax.ffi.include_dir()
    command = [*compiler, *_FLAGS.split(), "-isystem", headers, source, "-o", str(unfinished)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
    unfinished.replace(library)  # whole or not at all, whoever else compiles it
  return ctypes.CDLL(str(library))


def either(
  fits: bool, kernel: Callable[..., Any], plain: Callable[..., Any], slopes: Callable[..., Any] | None = None
) -> Callable[..., Any]:
  """The kernel, in programs for this CPU, if it fits; else what it stands for, whose gradients it has, in reverse only.

  Where there are gradients too the value is the kernel's if there is one of the gradients as well, or if the first
  argument is bfloat16: equal weights score alike whether they learn or not. Else, of float32, where nobody would see
  it, it is not, so that nothing is computed once more.

  Args:
    slopes: the kernel of the gradients: of the arguments and the value's slope those of the first arguments, in a
      sequence; the others' are the plain function's.
  """
  if not fits:
    return plain

  def chosen(*args: Any) -> Any:
    value = jax.custom_vjp(lambda *args: jax.lax.platform_dependent(*args, cpu=kernel, default=plain))

    def backward(args: Any, slope: jax.Array) -> Any:
      if not slopes:
        return jax.vjp(plain, *args)[1](slope)
      count = len(jax.eval_shape(slopes, *args, slope))
      of_first = lambda *args: jax.vjp(lambda *first: plain(*first, *args[count:-1]), *args[:count])[1](args[-1])
      of_kernel = lambda *args: tuple(slopes(*args))
      _, of_others = jax.vjp(lambda *others: plain(*args[:count], *others), *args[count:])
      return (*jax.lax.platform_dependent(*args, slope, cpu=of_kernel, default=of_first), *of_others(slope))

    if slopes or jax.tree.leaves(args)[0].dtype == jnp.bfloat16:
      value.defvjp(lambda *args: (value(*args), args), backward)
    else:
      value.defvjp(functools.partial(jax.vjp, plain), lambda back, slope: back(slope))
    return value(*args)

  return chosen


def multiplies(x_XI: Any, *matrices_OI: Any) -> bool:
  """Whether `multiply` takes these, all of one dtype."""
  whole = all(_whole(size, _TILE) for matrix_OI in matrices_OI for size in matrix_OI.shape)
  return whole and _alike(x_XI, *matrices_OI) and _takes(x_XI.dtype, matrices_OI[0].shape[1])


def multiply(x_XI: jax.Array, *matrices_OI: jax.Array, dtype: Any) -> Sequence[jax.Array]:
  """x · matrixᵀ → [X, O] of each matrix, sums in float32, rounded to `dtype`, x's or float32."""
  assert dtype in (x_XI.dtype, jnp.float32), dtype  # what is written would not fit
  results = [jax.ShapeDtypeStruct((len(x_XI), len(matrix_OI)), dtype) for matrix_OI in matrices_OI]
  return jax.ffi.ffi_call(_target("products"), results, vmap_method="sequential")(x_XI, *matrices_OI)


def added(x_XI: jax.Array, matrix_OI: jax.Array, plus_XO: jax.Array) -> jax.Array:
  """x · matrixᵀ + plus → [X, O], rounded once; of what `multiply` takes."""
  return _call("added", plus_XO)(x_XI, matrix_OI, plus_XO)


def gated(x_XI: jax.Array, gate_OI: jax.Array, up_OI: jax.Array, *, activation: str) -> jax.Array:
  """The activation of one product, of `GATES`, times the other → [X, O], rounded once; of what `multiply` takes."""
  like = jax.ShapeDtypeStruct((len(x_XI), len(gate_OI)), x_XI.dtype)
  return _call("gated", like)(x_XI, gate_OI, up_OI, gelu=np.bool_(activation == "gelu_tanh"))


def reads(query_RNH: Any, pools: Sequence[tuple[Any, Any]], *new: Any) -> bool:
  """Whether `paged` takes these queries, pools of keys [P, K, H, S] and values, of the queries' dtype or wide, and new
  keys and values.
  """
  dtypes = {getattr(x, "dtype", None) for pool in pools for x in pool}
  fits = _holds(dtypes, query_RNH.dtype) and all(_whole(key.shape[3], _LANES) for key, _ in pools)
  fits &= _alike(query_RNH, *new) and _head(query_RNH.shape[-1])
  return fits and _takes(query_RNH.dtype, math.prod(query_RNH.shape[1:]))


def paged(
  query_RNH: jax.Array,
  key_RKH: jax.Array,
  value_RKH: jax.Array,
  place_R: jax.Array,
  pools: Sequence[Pages],
  window: jax.Array,
  *,
  scale: float,
  softcap: float,
) -> jax.Array:
  """As `attention.paged` → [R, N, H]: a row reads its own pages, one after the other, softmax and sums in float32."""
  arrays = [x for pages in pools for x in pages]
  how = {"scale": np.float32(scale), "softcap": np.float32(softcap)}
  return _call("paged", query_RNH)(query_RNH, key_RKH, value_RKH, place_R, window, *arrays, **how)


def attends(query_RTNH: Any, *read: Any) -> bool:
  """Whether `causal` takes these queries, keys and values."""
  fits = _alike(query_RTNH, *read) and _head(query_RTNH.shape[-1])
  return fits and _takes(query_RTNH.dtype, math.prod(query_RTNH.shape[2:]))


def causal(
  query_RTNH: jax.Array,
  key_RTKH: jax.Array,
  value_RTKH: jax.Array,
  segment_RT: jax.Array | None,
  *,
  scale: float,
  softcap: float,
  window: int,
) -> jax.Array:
  """As `attention.causal` → [R, T, N, H]; values of packed rows are finite."""
  segment_RT, how = _segments(query_RTNH, segment_RT), _of_rule(scale, softcap, window)
  return _call("causal", query_RTNH)(query_RTNH, key_RTKH, value_RTKH, segment_RT, **how)


def causal_slopes(
  query_RTNH: jax.Array,
  key_RTKH: jax.Array,
  value_RTKH: jax.Array,
  segment_RT: jax.Array | None,
  slope_RTNH: jax.Array,
  *,
  scale: float,
  softcap: float,
  window: int,
) -> Sequence[jax.Array]:
  """Of `causal`'s slope those of queries, keys and values; sums in float32, of bfloat16 too."""
  results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query_RTNH, key_RTKH, value_RTKH)]
  call = jax.ffi.ffi_call(_target("causal_slopes"), results, vmap_method="sequential")
  segment_RT, how = _segments(query_RTNH, segment_RT), _of_rule(scale, softcap, window)
  return call(query_RTNH, key_RTKH, value_RTKH, segment_RT, slope_RTNH, **how)


def _segments(query_RTNH: jax.Array, segment_RT: jax.Array | None) -> jax.Array:
  return jnp.zeros(query_RTNH.shape[:2], jnp.int32) if segment_RT is None else segment_RT


def _of_rule(scale: float, softcap: float, window: int) -> dict[str, Any]:
  window = window or np.iinfo(np.int32).max
  return {"scale": np.float32(scale), "softcap": np.float32(softcap), "window": np.int32(window)}


def draws(hidden_RM: Any, vocabulary: int) -> bool:
  """Whether `draw` takes the logits of such hidden states."""
  return _whole(vocabulary, _LANES) and _takes(hidden_RM.dtype, hidden_RM.shape[-1])


def draw(
  logits_RV: jax.Array, choice: Sequence[Any], uniform_R: jax.Array, live_R: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The token at a quantile of `scoring.behaviour_weight`, 0 of rows that are not live; its log-probabilities, nats, by
  that density and by all of the softmax.

  A row at a time, whose weights never leave the caches.
  """
  R, how = len(logits_RV), jnp.stack([jnp.asarray(x, jnp.float32) for x in choice])
  results = [jax.ShapeDtypeStruct((R,), dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32)]
  token_R, behaviour_R, plain_R = jax.ffi.ffi_call(_target("draw"), results)(logits_RV, how, uniform_R)
  return jnp.where(live_R, token_R, 0), behaviour_R, plain_R


def normalises(x: Any, scale: Any) -> bool:
  """Whether `norm` takes these."""
  return _alike(x, scale) and _whole(scale.size, _LANES) and _takes(x.dtype, scale.size)


def norm(x: jax.Array, scale: jax.Array, *, epsilon: float, offset: float) -> jax.Array:
  """As `model.rms_norm`."""
  how = {"epsilon": np.float32(epsilon), "offset": np.float32(offset)}
  return _call("norm", x)(x, scale, **how)


def rotates(x_RTNH: Any, pairs: int) -> bool:
  """Whether `rotate` takes these, of which so many pairs of numbers are turned."""
  return _whole(pairs, _LANES) and _takes(x_RTNH.dtype, math.prod(x_RTNH.shape[2:]))


def rotate(x_RTNH: jax.Array, cos_RT1h: jax.Array, sin_RT1h: jax.Array) -> jax.Array:
  """As `rotary.rotate`."""
  return _call("rotate", x_RTNH)(x_RTNH, cos_RT1h, sin_RT1h)


def writes(pool: Any, new: Any) -> bool:
  """Whether `write` takes these, whose layers are one by one: all of one dtype, or the pools wide."""
  dtypes, (token, *others) = {x.dtype for x in jax.tree.leaves(pool)}, jax.tree.leaves(new)
  fits = type(pool) is tuple and _alike(token, *others) and _holds(dtypes, token.dtype)
  fits = fits and all(_whole(key_PKHS.shape[2], _LANES) for key_PKHS, _ in pool)
  return fits and _takes(token.dtype, math.prod(token.shape[-2:]))


def write(pool: Any, new: Any, token_R: jax.Array, page_R: jax.Array, slot_R: jax.Array) -> Any:
  """All layers' pools, written into, with these of the new tokens, counted flat, in these slots of these pages; a page
  there is none of is written nowhere.
  """
  arrays, tree = jax.tree.flatten(pool)
  results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
  itself = {3 + place: place for place in range(len(arrays))}
  call = jax.ffi.ffi_call(_target("write"), results, input_output_aliases=itself)
  return jax.tree.unflatten(tree, call(token_R, page_R, slot_R, *arrays, *jax.tree.leaves(new)))


def _call(name: str, like: Any) -> Callable[..., Any]:
  """A kernel whose result is of this form."""
  return jax.ffi.ffi_call(_target(name), jax.ShapeDtypeStruct(like.shape, like.dtype), vmap_method="sequential")


def _head(size: int) -> bool:
  """Whether queries of this size are read."""
  return _whole(size, _TILE) and size <= _MOST_HEAD


def _alike(*arrays: Any) -> bool:
  """Whether these are of one dtype."""
  return len({x.dtype for x in arrays}) == 1


def _holds(dtypes: set[Any], dtype: Any) -> bool:
  """Whether pools of these dtypes hold tokens of this one."""
  return dtypes in ({dtype}, {jnp.dtype(jnp.float32)})


def _takes(dtype: Any, size: int) -> bool:
  """Whether rows of so many numbers are computed here. Short ones of float32 are XLA's: what the microworld's players
  learn does not depend on whether a compiler is here.
  """
  return (dtype == jnp.bfloat16 or (dtype == jnp.float32 and size > _SHORT)) and there(dtype)


def _whole(size: int, unit: int) -> bool:
  return size > 0 and size % unit == 0
