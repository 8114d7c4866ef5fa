"""The records that flow through a step, and the two callables that make them.

    seeds → attacks → responses → judgments → rewards → preference pairs → joint update

Every array name ends in its axes. The letters, unique in the package:

    B seeds   A attacks per seed   D responses per attack   P comparisons   C completions of a comparison   J votes
    R rows of a device batch (prompts × samples)   Q rows before they fork   G samples of one prompt
    T tokens   t tokens of one chunk   S slots of a cache, or of a prompt   Z stop states
    X, Y what one function runs over, as it says   V vocabulary   M width   F feed-forward   L layers
    N query heads   K key/value heads   H head size   n query heads of a key head   h rotated pairs of a head
    E experts   k of them per token   g rows of a group

A small letter is otherwise the part of the large one that is in one chunk or block.

Records of the host hold numpy arrays (text as arrays of `object`); what a jitted step reads is a pytree. Fixed shapes
everywhere: what is absent has length 0, weight 0 or a `Status`, never `None`.
"""

import dataclasses
import enum
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np
from flax import struct

Array = jax.Array | np.ndarray
Params = Mapping[str, Any]
PlayerT = TypeVar("PlayerT")


class UserError(ValueError):
  """What a user can mend: one sentence that says what was found, where, and what would have worked."""


class Category(enum.IntEnum):
  """What a seed is: a request to be deflected, or one to be helped with."""

  HARMFUL = 0
  BENIGN = 1


class Status(enum.IntEnum):
  """What became of one sample. Penalised ones are rewarded −1, excluded ones are in no sum, baseline or count."""

  VALID = 0
  MAX_LENGTH = 1  # the token limit came before a stop
  PARSING = 2  # not the requested format, or an empty answer
  REFUSED_ROLE = 3  # the Attacker refused to play
  NOT_FAITHFUL = 4  # the attack is no version of its seed
  JUDGE_FAILED = 5  # excluded: the judge of this sample gave no readable verdict
  NO_RESPONSE = 6  # excluded: a valid attack whose responses are all invalid
  NOT_PLAYED = 7  # excluded: the attack above it is not valid

  @property
  def penalised(self) -> bool:
    return Status.MAX_LENGTH <= self <= Status.NOT_FAITHFUL


class Role(enum.StrEnum):
  """What a judge is asked. The three scores run 0–10; faithfulness is 0 or 1."""

  FAITHFULNESS = "faithfulness"
  COMPLIANCE = "compliance"
  DEFLECTION = "deflection"
  REFUSAL = "refusal"


BEST = 10.0  # of a score; the least is 0


class Players(NamedTuple, Generic[PlayerT]):
  """One value per player. Attacker and Defender are always two values of one type."""

  attacker: PlayerT
  defender: PlayerT


@dataclasses.dataclass(frozen=True)
class SeedBatch:
  """B seeds, of all processes together."""

  text_B: np.ndarray  # object: the seed query s
  category_B: np.ndarray  # int8: `Category`
  index_B: np.ndarray  # int64: line of the seed in its file, across epochs the same


@dataclasses.dataclass(frozen=True)
class Samples:
  """What a policy answered to R prompts, G samples each; every row right-padded.

  A policy that is no model of ours (a script, a server) leaves T = 0: it can be played but not trained.
  """

  text_RG: np.ndarray  # object: the completion, control tokens dropped
  status_RG: np.ndarray  # int8: VALID if a stop was met, else MAX_LENGTH; NOT_PLAYED for an absent prompt
  prompt_tokens_RT: np.ndarray  # int32
  prompt_length_R: np.ndarray  # int32: tokens
  tokens_RGT: np.ndarray  # int32: the completion, its stop token included
  length_RG: np.ndarray  # int32: tokens
  behaviour_logprob_RGT: np.ndarray  # float32, nats: of the density drawn from, after temperature and top-p
  plain_logprob_RGT: np.ndarray  # float32, nats: of the model's own softmax

  @classmethod
  def of_text(cls, text_RG: np.ndarray, status_RG: np.ndarray) -> "Samples":
    """Samples without tokens: of a script, a server, or the seeds themselves."""
    R, G = text_RG.shape
    nothing_RGT = np.zeros((R, G, 0), np.float32)
    return cls(
      text_RG=text_RG,
      status_RG=status_RG.astype(np.int8),
      prompt_tokens_RT=np.zeros((R, 0), np.int32),
      prompt_length_R=np.zeros(R, np.int32),
      tokens_RGT=nothing_RGT.astype(np.int32),
      length_RG=np.zeros((R, G), np.int32),
      behaviour_logprob_RGT=nothing_RGT,
      plain_logprob_RGT=nothing_RGT,
    )


@dataclasses.dataclass(frozen=True)
class RolloutTree:
  """One step of play. Responses are rows of `attack_text_BA.reshape(-1)`, played only where the attack is VALID."""

  seeds: SeedBatch
  attacks: Samples  # R = B, G = A; T = 0 when the seeds themselves are played
  attack_text_BA: np.ndarray  # object: the query x parsed from the attack, "" where there is none
  attack_status_BA: np.ndarray  # int8: `Status`, faithfulness included
  responses: Samples  # R = B·A, G = D
  response_text_BAD: np.ndarray  # object: the answer y, reasoning removed
  response_status_BAD: np.ndarray  # int8: `Status`


@dataclasses.dataclass(frozen=True)
class Judgments:
  """Scores 0–10 of one tree, NaN where there is none; a failure is a `Status` of exactly the sample it concerns."""

  response_score_BAD: np.ndarray  # float64: by the defender judge
  response_status_BAD: np.ndarray  # int8
  picked_BA: np.ndarray  # int: the response the attacker judge read, −1 where there was none
  attack_score_BA: np.ndarray  # float64: by the attacker judge, of the picked response
  attack_status_BA: np.ndarray  # int8
  disagreement: Players[float]  # mean |score in one order − score in the other|, NaN without pairs


@dataclasses.dataclass(frozen=True)
class Rewards:
  """Rewards of one tree. Where the mask is False the reward is 0 and must not be read."""

  attack_BA: np.ndarray  # float32
  attack_mask_BA: np.ndarray  # bool
  response_BAD: np.ndarray  # float32
  response_mask_BAD: np.ndarray  # bool


@struct.dataclass
class PreferenceBatch:
  """P comparisons of C completions of a prompt for one player: (chosen, rejected) of a pair, or GRPO's samples.

  A node of the tree is one pair, or one or several comparisons of GRPO. Prompts are padded on the left to S,
  completions on the right to T. Weight 0 is padding: nothing else of that completion is read. Both of a pair weigh the
  same.
  """

  prompt_PS: Array  # int32
  prompt_length_P: Array  # int32: tokens
  tokens_PCT: Array  # int32: the completions, what a player chose
  length_PC: Array  # int32: tokens of a completion
  behaviour_logprob_PCT: Array  # float32, nats, 0 behind the completion
  plain_logprob_PCT: Array  # float32, nats: the generator's; the reference's too, `Player.reference_is_generator`
  advantage_PC: Array  # float32: reward − baseline
  weight_PC: Array  # float32: 1 or 0

  @classmethod
  def abstract(cls, P: int, S: int, C: int, T: int, where: jax.sharding.Sharding) -> "PreferenceBatch":
    """Shapes and dtypes, without any array; P lies as `where` says."""
    array: Any = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
    return cls(
      prompt_PS=array(np.int32, P, S),
      prompt_length_P=array(np.int32, P),
      tokens_PCT=array(np.int32, P, C, T),
      length_PC=array(np.int32, P, C),
      behaviour_logprob_PCT=array(np.float32, P, C, T),
      plain_logprob_PCT=array(np.float32, P, C, T),
      advantage_PC=array(np.float32, P, C),
      weight_PC=array(np.float32, P, C),
    )


class Question(NamedTuple):
  """One call of a judge: `texts` (one, or two to compare) as answers to `query` under a role's rubric."""

  role: Role
  category: Category
  query: str  # what the texts are judged against: the seed s or the attack x
  texts: tuple[str, ...]
  key: int  # a judge that draws, draws from this alone: see `fold_key`


def fold_key(key: int, *parts: int) -> int:
  """A 63-bit key of a place under `key`; distinct places have independent ones."""
  digest = hashlib.blake2b(repr((key, *map(int, parts))).encode(), digest_size=8).digest()
  return int.from_bytes(digest, "big") >> 1


class Verdict(NamedTuple):
  """One score per text of the question, or none at all: a judge that cannot be read has `scores == ()`."""

  scores: tuple[float, ...]
  tokens: int = 0  # that a language model read and wrote for it
  flops: float = 0.0


Policy = Callable[[Sequence[str], np.ndarray, int, jax.Array], Samples]
"""(prompts, present_R bool, samples G, key) → `Samples`. Row r of sample g draws from fold_in(fold_in(key, r), g)."""

Judge = Callable[[Sequence[Question]], Sequence[Verdict]]
"""Questions → a verdict each, in their order."""
