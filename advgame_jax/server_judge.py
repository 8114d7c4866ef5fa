"""A judge that is a language model behind an OpenAI-compatible server."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from advgame_jax import config as config_lib
from advgame_jax.cases import Case, Scores
from advgame_jax.endpoint import Endpoint, Pace, Reply, Request
from advgame_jax.prompts import THINK_END
from advgame_jax.types import Judge, Question, Verdict, fold_key

_TOP = 20  # tokens whose log-probabilities are asked for: the most that servers give


class Vote(NamedTuple):
  """One answer of the server, read."""

  scores: Scores = ()
  tokens: int = 0


def server_judge(settings: config_lib.Judge, put: Callable[[Question], Case], pace: Pace | None = None) -> Judge:
  """A judge that asks `settings.server` for `settings.votes` answers to each question and averages those it can read.

  The server draws vote j of a question from a seed made of (question.key, j).

  Args:
    settings: model, votes, readout, think, sampling (temperature, top_p, max_new_tokens) and server are read.
    put: a question in words.
    pace: when requests may start; by default, `server.requests_per_minute`.

  Raises:
    UserError: `server.url` is none. By the judge: as `Endpoint.ask`.
  """
  endpoint = Endpoint(settings.server, settings.model, "judge server", pace)
  J = settings.votes

  def judge(questions: Sequence[Question]) -> list[Verdict]:
    cases = [(put(question), question.key) for question in questions]
    replies = endpoint.ask([_request(settings, case, fold_key(key, j)) for case, key in cases for j in range(J)])
    rows = [replies[q * J : (q + 1) * J] for q in range(len(cases))]
    return [_verdict([_read(settings, case, reply) for reply in row]) for (case, _), row in zip(cases, rows)]

  return judge


def _request(settings: config_lib.Judge, case: Case, key: int) -> Request:
  sampling, probability = settings.sampling, settings.readout == "probability"
  return Request(
    case.instructions + case.text,
    seed=key >> 32,
    # With 1 and 1 the probabilities are the model's own, whether a server reports them before or after shaping.
    temperature=1.0 if probability else sampling.temperature,
    top_p=1.0 if probability else sampling.top_p,
    max_tokens=1 if probability else sampling.max_new_tokens,
    top_logprobs=_TOP if probability else 0,
  )


def _verdict(votes: Sequence[Vote]) -> Verdict:
  readable = [vote.scores for vote in votes if vote.scores]
  means = tuple(sum(scores) / len(readable) for scores in zip(*readable, strict=True))
  return Verdict(means, sum(vote.tokens for vote in votes))


def _read(settings: config_lib.Judge, case: Case, reply: Reply) -> Vote:
  if reply.failure or reply.cut:
    return Vote((), reply.total_tokens)
  if settings.readout == "probability":
    mass = [sum(p for token, p in reply.top if token in label) for label in case.labels]
    return Vote(case.weigh(mass) if sum(mass) > 0 else (), reply.total_tokens)
  apart = settings.think and reply.reasoning and THINK_END not in reply.text
  return Vote(case.read(THINK_END + reply.text if apart else reply.text), reply.total_tokens)
