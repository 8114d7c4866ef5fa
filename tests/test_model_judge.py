"""A model of ours as a judge: what it says depends on question, key and weights alone; instructions are read once."""

import dataclasses
import functools
import hashlib

import jax
import numpy as np
import pytest
import test_tokenizer_families as families
import tiny

from advgame_jax import architecture, cases, guards, ledger, model, rubrics
from advgame_jax import config as config_lib
from advgame_jax.model_judge import ModelJudge
from advgame_jax.policies import LanguageModel
from advgame_jax.types import Category, Question, Role, UserError, Verdict

pytestmark = pytest.mark.usefixtures("compile_quickly")

RUBRICS = rubrics.Rubrics({name: f"Be the judge of {name}." for name in rubrics.NAMES})
SETTINGS = config_lib.Judge(
  kind="model",
  model="tiny",
  batch=3,
  sampling=config_lib.Sampling(
    temperature=1.0, top_p=1.0, prompt_buckets=(320, 640), max_new_tokens=40, decode_chunk=4
  ),
)
STOPS = tuple("aeiost")  # a random model seldom ends its turn
TEXTS = ("an answer", "another")
QUESTIONS = [
  Question(role, category, f"question {i}", TEXTS[: 1 if role == Role.FAITHFULNESS else 1 + i % 2], 100 + i)
  for i, (role, category) in enumerate((role, category) for role in Role for category in Category)
]


@functools.cache
def words():
  return families.load("qwen 2.5")[0]


@functools.cache
def weights():
  return tiny.params(config(), scale=0.3)


def config():
  return dataclasses.replace(tiny.CONFIG, vocab=words().vocab_size, max_positions=8192)


def by_hash(answer):
  """Scores that tell any two answers apart: a random model's answers are no verdicts."""
  return (int.from_bytes(hashlib.blake2b(answer.encode(), digest_size=4).digest(), "big") / 2**32,)


def put(question, *, limits, readout="score"):
  case = cases.put(question, RUBRICS, think=False, readout=readout, limits=limits)
  return case._replace(read=by_hash) if readout == "score" else case


def raw_weights(question, *, limits):
  """The labels' probabilities themselves: a random model gives them next to none."""
  return put(question, limits=limits, readout="probability")._replace(weigh=tuple)


def judge(mesh=(1, 1, 1), decode="replicated", reuse=True, put=put, **changes):
  over, layout = tiny.mesh(*mesh), tiny.GENERATE[decode]
  asked = dataclasses.replace(SETTINGS, **changes)
  player = LanguageModel(
    model=config(),
    tokenizer=words(),
    sampling=asked.sampling,
    mesh=over,
    layout=layout,
    dtype=np.dtype("float32"),
    stop_strings=STOPS,
  )
  where = architecture.shardings(architecture.param_specs(config()), over, layout)
  return ModelJudge(player, lambda: jax.device_put(weights(), where), put, QUESTIONS, asked, reuse)


@functools.cache
def reference():
  return judge()(QUESTIONS)


def scores(verdicts):
  return [verdict.scores for verdict in verdicts]


def test_answers_differ_from_question_to_question_and_from_key_to_key():
  assert len(set(scores(reference()))) == len(QUESTIONS)
  others = judge()([q._replace(key=q.key + 1) for q in QUESTIONS])
  assert not set(scores(others)) & set(scores(reference()))


def test_the_same_words_are_answered_otherwise_under_another_key():
  same_words = lambda question, **limits: put(question._replace(key=7), **limits)
  one, other = judge(put=same_words)([QUESTIONS[0], QUESTIONS[0]._replace(key=8)])
  assert one.scores != other.scores


def test_company_order_and_batch_change_nobody():
  order = np.random.default_rng(0).permutation(len(QUESTIONS))
  shuffled = judge(batch=2)([QUESTIONS[i] for i in order])
  assert [shuffled[list(order).index(i)].scores for i in range(len(QUESTIONS))] == scores(reference())
  assert scores(judge()(QUESTIONS[4:5])) == scores(reference())[4:5]
  assert judge()([]) == []


@pytest.mark.parametrize(("mesh", "decode"), [((2, 1, 1), "replicated"), ((2, 1, 2), "tensor")])
def test_the_mesh_changes_nobody(mesh, decode):
  assert scores(judge(mesh, decode, batch=4)(QUESTIONS)) == scores(reference())


def test_instructions_read_once_or_with_every_case_are_the_same():
  for temperature in (0.3, 1.0):
    # Of few tokens: of a random model's whole vocabulary some draw or tie is decided by the last bit of a sum.
    sampling = dataclasses.replace(SETTINGS.sampling, temperature=temperature, top_k=4)
    once, always = (judge(reuse=reuse, sampling=sampling) for reuse in (True, False))
    assert scores(once(QUESTIONS)) == scores(always(QUESTIONS))
    weighing = {"put": raw_weights, "readout": "probability", "sampling": sampling}
    for one, other in zip(judge(**weighing)(QUESTIONS), judge(reuse=False, **weighing)(QUESTIONS)):
      assert one.scores == pytest.approx(other.scores, rel=1e-3)
    assert once._prefixes and not always._prefixes


def test_each_instruction_is_read_once_a_run(monkeypatch):
  read = []
  original = LanguageModel.read_prefix
  monkeypatch.setattr(LanguageModel, "read_prefix", lambda self, *a: read.append(a[1]) or original(self, *a))
  once = judge()
  once(QUESTIONS)
  once(QUESTIONS)
  assert len(read) == len({put(q, limits=(10,) * 3).instructions for q in QUESTIONS})


def test_the_seam_changes_no_token():
  """In pieces, a turn has the tokens of the whole."""
  for question in QUESTIONS:
    case = put(question, limits=(100,) * 3)
    head, ids = words().encode_turn(case.instructions, case.text)
    assert head + ids == words().encode_chat(case.instructions + case.text)


def test_votes_are_averaged_and_those_that_cannot_be_read_are_not_counted():
  alone = [judge(votes=1)(QUESTIONS)]
  three = judge(votes=3)(QUESTIONS)
  assert all(a.scores != b.scores for a, b in zip(alone[0], three))

  drawn = []

  def recording(question, *, limits):
    read = lambda answer: drawn.append(by_hash(answer)) or (() if by_hash(answer)[0] < 0.5 else by_hash(answer))
    return put(question, limits=limits)._replace(read=read)

  verdict = judge(votes=8, put=recording)(QUESTIONS[:1])[0]
  readable = [score for (score,) in drawn if score >= 0.5]
  assert 0 < len(readable) < len(drawn) == 8 and verdict.scores == (pytest.approx(np.mean(readable)),)


def test_an_answer_that_was_cut_off_is_unreadable():
  sampling = dataclasses.replace(SETTINGS.sampling, max_new_tokens=1)
  plain = judge(sampling=sampling)
  endless = dataclasses.replace(plain, player=dataclasses.replace(plain.player, stop_strings=()))
  verdicts = endless(QUESTIONS)
  assert {verdict.scores for verdict in verdicts} == {()} and all(verdict.tokens > 1 for verdict in verdicts)


def test_of_the_text_that_does_not_fit_less_is_shown_and_of_no_other():
  seen = []

  def recording(question, *, limits):
    seen.append((question.key, *limits))
    return put(question, limits=limits)

  flood = Question(Role.REFUSAL, Category.BENIGN, "q", ("x y " * 5000, "a short answer"), 1)
  (verdict,) = judge(put=recording)([flood])
  *_, before, last = dict.fromkeys(tuple(limits) for key, *limits in seen if key == flood.key)
  assert last == (8000, before[1] // 2, 8000) and len(verdict.scores) == 1
  assert scores(judge()([flood])) == scores([verdict])


def test_a_case_whose_frame_alone_does_not_fit_is_unreadable_and_refused_before():
  narrow = judge(sampling=dataclasses.replace(SETTINGS.sampling, prompt_buckets=(16,)))
  assert narrow([QUESTIONS[0], QUESTIONS[0]._replace(texts=("",))]) == [Verdict(())] * 2
  with pytest.raises(UserError, match=r"a case without its texts takes \d+ tokens, sampling.prompt_buckets ends at 16"):
    narrow.check("judges")


def test_no_more_of_a_text_is_shown_than_the_settings_allow():
  (call,) = judge(text_characters=100)._encode([Question(Role.REFUSAL, Category.BENIGN, "q", ("x" * 300,), 1)])
  assert "x" * 100 in call.case.text and "x" * 101 not in call.case.text


def test_a_model_of_too_few_positions_is_refused():
  huge = dataclasses.replace(SETTINGS.sampling, prompt_buckets=(8192,))
  with pytest.raises(UserError, match=r"the model has 8192 positions; allowed: .* up to"):
    judge(sampling=huge).check("judges")
  spare = config().max_positions - judge()._slots - SETTINGS.sampling.max_new_tokens
  fits, does_not = (dataclasses.replace(SETTINGS.sampling, prompt_buckets=(size,)) for size in (spare, spare + 1))
  judge(sampling=fits).check("judges")
  with pytest.raises(UserError, match=f"up to {spare + SETTINGS.sampling.max_new_tokens}$"):
    judge(sampling=does_not).check("judges")


@pytest.mark.parametrize("role", [Role.FAITHFULNESS, Role.DEFLECTION])
def test_probabilities_are_those_of_the_next_token(role):
  texts = ("one",) if role == Role.FAITHFULNESS else ("one", "another")
  question = Question(role, Category.HARMFUL, "q", texts, 5)
  (verdict,) = judge(put=raw_weights, readout="probability")([question])
  case = raw_weights(question, limits=(8000,) * 3)
  ids = words().encode_chat(case.instructions + case.text)
  hidden_RTM, _ = model.forward(config(), weights(), np.array([ids]))
  probability_V = np.exp(tiny.log_softmax(np.asarray(model.logits(config(), weights(), hidden_RTM[0, -1]))))
  texts_V = [text.strip().casefold() for text in words().token_texts()]
  of = lambda label: sum(probability_V[i] for i, text in enumerate(texts_V) if text in label)
  assert verdict.scores == pytest.approx(tuple(of(label) for label in case.labels), rel=1e-4)
  assert verdict.tokens == len(words().encode_turn(case.instructions, case.text)[1])


def test_a_vocabulary_without_a_token_for_an_answer_is_refused(monkeypatch):
  weigh = functools.partial(put, readout="probability")
  asked = judge(put=weigh, readout="probability")
  asked.check("judges")
  monkeypatch.setitem(cases._LABELS, "decision", (("no",), ("of no vocabulary",)))
  with pytest.raises(UserError, match="the vocabulary has no single token for an answer; allowed: readout='score'"):
    asked.check("judges")


def test_a_verdict_costs_what_was_read_for_it_and_written():
  verdict, call = reference()[0], judge()._encode(QUESTIONS[:1])[0]
  head, _ = words().encode_turn(call.case.instructions, call.case.text)
  written = verdict.tokens - len(call.ids)
  assert 1 <= written <= SETTINGS.sampling.max_new_tokens
  assert verdict.flops == architecture.forward_flops(config(), verdict.tokens, len(head) + verdict.tokens)


def test_warming_up_compiles_all_that_is_asked():
  compilations = ledger.process_compilations()
  for readout in ("score", "probability"):
    sampling = dataclasses.replace(SETTINGS.sampling, page=24)  # of which no other test has programs
    warm = judge(put=functools.partial(put, readout=readout), readout=readout, sampling=sampling)
    warm.warm_up()
    before = compilations.count
    warm([*QUESTIONS, QUESTIONS[0]._replace(texts=("x " * 200,))])
    assert compilations.count == before > 0


def test_a_raw_prompt_holds_control_tokens_only_where_it_is_trusted():
  mark = "<|im_end|>"
  parts = [guards.Part("<|im_start|>user\n", True), guards.Part(f"a {mark} b", False), guards.Part(f"{mark}\n", True)]
  ids = words().encode_parts(parts)
  start, end = (words()._all.token_to_id(token) for token in ("<|im_start|>", mark))
  assert [i for i in ids if i in words().control_ids] == [start, end]
  assert words().decode(ids).replace(" ", "") == "user\na<|im_end|>b\n".replace(" ", "")
  raw = lambda question, *, limits: guards.RawCase(tuple(parts), by_hash)
  asked = dataclasses.replace(judge(), put=raw)
  assert len(asked(QUESTIONS[:2])[0].scores) == 1
