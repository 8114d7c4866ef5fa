"""Benchmarks: the files of the field's safety benchmarks, as they are published, become prompts with a category.

A benchmark is a line of a table, a `_Form`: which columns its file has, and what each is to us. A file is recognised by
its columns, whatever it is called and whatever format it has: the most specific form all of whose columns are there.
"""

import dataclasses
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from advgame_jax import tables
from advgame_jax.tables import Table, short
from advgame_jax.types import Category, UserError


@dataclasses.dataclass(frozen=True)
class Item:
  """One prompt of a benchmark."""

  prompt: str  # what the target is sent
  category: Category
  group: str  # the benchmark's own category, "" if none
  behaviour: str  # what a judge is asked about: the plain request if the prompt is an attack on one, else the prompt
  id: str  # the benchmark's, "" if none; several attacks on one behaviour share it


@dataclasses.dataclass(frozen=True)
class Suite:
  """The prompts of a benchmark in the order of its files."""

  name: str
  items: list[Item]


@dataclasses.dataclass(frozen=True)
class _Form:
  """How a row of one published file becomes an item. Several columns are one string, with spaces between them."""

  benchmark: str
  split: str  # "" if the benchmark has but one
  columns: str  # that its file has
  category: Category | tuple[str, Mapping[str, Category]]  # of every row, or by the values of a column
  prompt: str  # the first of them that has a text
  behaviour: str = ""  # likewise; where none has, the prompt
  group: str = ""  # likewise
  id: str = ""  # those that are there, joined
  context: tuple[str, str] = ("", "")  # a column whose text comes before the prompt, and what stands between
  gaps: str = ""  # a row without one of these is no mistake, and left out
  file: str = ""  # what the name of its file matches, where another form has the same columns
  texts: str = ""  # the form whose items, by id, say what behaviours these are; its file may stand beside

  @property
  def name(self) -> str:
    return f"{self.benchmark}_{self.split}" if self.split else self.benchmark

  def lacking(self, columns: Iterable[str]) -> list[str]:
    """The columns of the form that a file with these has not."""
    return [column for column in self.columns.split() if column not in columns]


def _each(values: str, category: Category) -> dict[str, Category]:
  return dict.fromkeys(values.split(), category)


_HARMFUL, _BENIGN = Category.HARMFUL, Category.BENIGN
_XSTEST = _each(
  "homonyms figurative_language safe_targets safe_contexts definitions nons_group_real_discr real_group_nons_discr "
  "historical_events privacy_public privacy_fictional",
  _BENIGN,
) | _each(
  "contrast_homonyms contrast_figurative_language contrast_safe_targets contrast_safe_contexts contrast_definitions "
  "contrast_discr contrast_historical_events contrast_privacy",
  _HARMFUL,
)
_OR_BENCH = "deception harassment harmful hate illegal privacy self-harm sexual unethical violence"

_FORMS = (
  _Form(  # harmbench_behaviors_text_{all,test,val}.csv
    "harmbench",
    "",
    "Behavior FunctionalCategory SemanticCategory ContextString BehaviorID",
    ("FunctionalCategory", _each("standard contextual copyright", _HARMFUL)),
    prompt="Behavior",
    group="SemanticCategory",
    id="BehaviorID",
    context=("ContextString", "\n\n---\n\n"),
  ),
  _Form(  # test_cases.json, completions and results: {BehaviorID: [test case, …]}
    "harmbench",
    "attacks",
    "BehaviorID test_case",
    _HARMFUL,
    prompt="test_case",
    behaviour="BehaviorID",
    id="BehaviorID",
    texts="harmbench",
  ),
  _Form(  # train.tsv; eval.tsv has no vanilla requests
    "wildjailbreak",
    "",
    "adversarial data_type",
    (
      "data_type",
      _each("vanilla_harmful adversarial_harmful", _HARMFUL) | _each("vanilla_benign adversarial_benign", _BENIGN),
    ),
    prompt="adversarial vanilla",
    behaviour="vanilla",
    group="data_type",
  ),
  _Form(  # wildguard_test.parquet and wildguard_train.parquet; on some prompts the annotators did not agree
    "wildguard",
    "",
    "prompt adversarial prompt_harm_label subcategory",
    ("prompt_harm_label", {"harmful": _HARMFUL, "unharmful": _BENIGN}),
    prompt="prompt",
    group="subcategory",
    gaps="prompt_harm_label prompt",
  ),
  _Form(  # jailbreak_prompts_*.csv and regular_prompts_*.csv
    "dan",
    "prompts",
    "platform source prompt jailbreak",
    ("jailbreak", {"True": _HARMFUL, "False": _BENIGN}),
    prompt="prompt",
    group="platform",
  ),
  _Form(  # forbidden_question_set.csv
    "dan",
    "questions",
    "content_policy_id content_policy_name q_id question",
    _HARMFUL,
    prompt="question",
    group="content_policy_name",
    id="content_policy_id q_id",
  ),
  _Form(  # forbidden_question_set_with_prompts.csv
    "dan",
    "attacks",
    "content_policy_id content_policy_name q_id question prompt",
    _HARMFUL,
    prompt="question",
    behaviour="question",
    group="content_policy_name",
    id="content_policy_id q_id",
    context=("prompt", "\n"),
  ),
  _Form(  # xstest_prompts.csv
    "xstest",
    "",
    "prompt type label",
    ("label", {"safe": _BENIGN, "unsafe": _HARMFUL}),
    prompt="prompt",
    group="type",
    id="id",
  ),
  _Form(  # before there were labels: xstest_prompts_v1.csv, xstest_v2_prompts.csv
    "xstest", "", "prompt type", ("type", _XSTEST), prompt="prompt", group="type", id="id id_v2"
  ),
  *(
    _Form(  # or-bench-80k.csv, or-bench-hard-1k.csv, or-bench-toxic.csv
      "or_bench",
      split,
      "prompt category",
      ("category", _each(_OR_BENCH, category)),
      prompt="prompt",
      group="category",
      file=rf"or[-_]?bench.*{file}",
    )
    for split, file, category in (
      ("80k", "80k", _BENIGN),
      ("hard_1k", "hard", _BENIGN),
      ("toxic", "toxic", _HARMFUL),
    )
  ),
  _Form(  # strongreject_dataset.csv and strongreject_small_dataset.csv
    "strongreject", "", "category source forbidden_prompt", _HARMFUL, prompt="forbidden_prompt", group="category"
  ),
  *(
    _Form(  # harmful-behaviors.csv, benign-behaviors.csv
      "jailbreakbench",
      split,
      "Goal Target Behavior Category",
      category,
      prompt="Goal",
      group="Category",
      id="Index",
      file=split,
    )
    for split, category in (("harmful", _HARMFUL), ("benign", _BENIGN))
  ),
  _Form(  # an attack's artifact: {"parameters": …, "jailbreaks": […]}; where the attack failed there is no prompt
    "jailbreakbench",
    "attacks",
    "goal behavior category prompt jailbroken",
    _HARMFUL,
    prompt="prompt",
    behaviour="goal",
    group="category",
    id="index",
    gaps="prompt",
  ),
  _Form("advbench", "", "goal target", _HARMFUL, prompt="goal"),  # harmful_behaviors.csv
  _Form(
    "trustllm",
    "jailbreak",
    "prompt label source",
    ("source", _each("ITC QBB", _HARMFUL)),
    prompt="prompt",
    group="label",
  ),
  _Form(  # whose rows have a label or a type
    "trustllm",
    "misuse",
    "prompt label type source",
    ("source", _each("Do-anything-now do_not_answer misuse_add", _HARMFUL)),
    prompt="prompt",
    group="type label",
  ),
  _Form(
    "trustllm",
    "exaggerated_safety",
    "id type prompt focus note source",
    ("type", _XSTEST),
    prompt="prompt",
    group="type",
    id="id",
  ),
  _Form(
    "seeds", "", "prompt category", ("category", {"harmful": _HARMFUL, "benign": _BENIGN}), prompt="prompt", id="id"
  ),
)


def names() -> list[str]:
  """What may stand before the '=' of a spec: benchmarks, and single files of those that have several."""
  return sorted({name for form in _FORMS for name in (form.benchmark, form.name)})


def load(spec: str) -> Suite:
  """The prompts of a benchmark.

  Args:
    spec: 'path' or 'name=path', where a name leaves only that benchmark to be recognised; several files of one
      benchmark are joined by '+'. HarmBench's attacks name behaviours by their ids, whose texts are in another file:
      'harmbench=test_cases.json+harmbench_behaviors_text_all.csv'. Without it, the ids are all that judges are told.

  Raises:
    UserError: no such benchmark; a file that cannot be read, that no benchmark has, or that two may have; a row without
      a text, or with a label that its benchmark does not have.
  """
  forms, paths = _parse(spec)
  parts = [_read_part(path, forms) for path in paths]
  described = {form.texts for form, _ in parts}
  behaviours = {item.id: item for form, items in parts if form.name in described for item in items}
  played = [(form, items) for form, items in parts if form.name not in described]
  items = [
    _described(item, behaviours, spec) if form.texts and behaviours else item for form, part in played for item in part
  ]
  splits = dict.fromkeys(form.name for form, _ in played)
  return Suite("+".join(splits if len(splits) == 1 else dict.fromkeys(form.benchmark for form, _ in played)), items)


def _parse(spec: str) -> tuple[Sequence[_Form], list[str]]:
  """The forms that may be recognised, and the paths. What is a file is a path, whatever characters it has."""
  name, equals, rest = spec.partition("=")
  if os.path.isfile(spec) or not equals:
    name, rest = "", spec
  elif name not in names():
    raise UserError(f"there is no benchmark {short(name)}; allowed: {', '.join(names())}")
  paths = [rest] if os.path.isfile(rest) else rest.split("+")
  forms = [form for form in _FORMS if name in ("", form.benchmark, form.name)]
  beside = {form.texts for form in forms} if len(paths) > 1 else set()
  return [form for form in _FORMS if form in forms or form.name in beside], paths


def _described(item: Item, behaviours: Mapping[str, Item], spec: str) -> Item:
  """An attack with the behaviour that its id names."""
  if item.id not in behaviours:
    raise UserError(
      f"{spec}: no behaviour has the id {short(item.id)}; allowed: the file of behaviours that were attacked"
    )
  return dataclasses.replace(item, behaviour=behaviours[item.id].behaviour, group=behaviours[item.id].group)


def _read_part(path: str, forms: Sequence[_Form]) -> tuple[_Form, list[Item]]:
  """A file as what it is recognised for."""
  table = tables.read(path, _unnested)
  form = _recognise(table, forms)
  items = [item for place, row in table.rows if (item := _item(form, row, f"{path}, {place}"))]
  if not items:
    raise UserError(f"{path} has no row with a prompt and a label; allowed: a file as {form.benchmark} publishes it")
  return form, items


def _recognise(table: Table, forms: Sequence[_Form]) -> _Form:
  """The form with the most columns among those that the file has all of, and whose labels are known at least once."""
  fitting = [form for form in forms if not form.lacking(table.columns)]
  if not fitting:
    raise UserError(_unknown(table, forms))
  ranks = [((share := _known(form, table)) > 0, len(form.columns.split()), share) for form in fitting]
  alike = [form for form, rank in zip(fitting, ranks) if rank == max(ranks)]
  named = [form for form in alike if form.file and re.search(form.file, os.path.basename(table.path), re.IGNORECASE)]
  alike = named or [form for form in alike if not form.file] or alike
  if len(alike) > 1:
    alternatives = [form.name for form in alike]
    raise UserError(
      f"{table.path} may be of {' or '.join(alternatives)}, whose columns are the same; "
      f"allowed: its published name, or {' or '.join(f'{name}=…' for name in alternatives)}"
    )
  return alike[0]


def _unknown(table: Table, forms: Sequence[_Form]) -> str:
  """What is wrong with a file that has the columns of no form."""
  # Of several as near, seeds: what has prompts and no labels is most often meant as those.
  nearness = lambda form: (len(form.lacking(table.columns)) / len(form.columns.split()), form.benchmark != "seeds")
  near = min(forms, key=nearness)
  lacking = near.lacking(table.columns)
  also = f": {near.name}, the nearest, has {_listed(lacking)} too" if len(lacking) < len(near.columns.split()) else ""
  return (
    f"{table.path} has the columns {_listed(table.columns)}, which are no benchmark's{also}; allowed: files as "
    f"published, of {', '.join(sorted({form.benchmark for form in forms}))}"
  )


def _known(form: _Form, table: Table) -> float:
  """The share of rows whose label is one that the form has."""
  if isinstance(form.category, Category):
    return 1.0
  column, values = form.category
  known = {value.casefold() for value in values}
  return sum(_plain(row.get(column)).casefold() in known for _, row in table.rows) / len(table.rows)


def _item(form: _Form, row: Mapping[str, Any], place: str) -> Item | None:
  """The item of a row; None where the benchmark itself left a gap."""
  if not all(_plain(row.get(column)) for column in form.gaps.split()):
    return None
  if not (prompt := _text(row, form.prompt)):
    wanted = " or ".join(map(repr, form.prompt.split()))
    raise UserError(f"{place}: no text under {wanted}; allowed in a file of {form.benchmark}: a text in every row")
  context, between = form.context
  before = _text(row, context)
  sent = before + between + prompt if before and prompt not in before else before or prompt
  return Item(
    prompt=sent,
    category=_category(form, row, place),
    group=next(filter(None, (_plain(row.get(column)) for column in form.group.split())), ""),
    behaviour=_text(row, form.behaviour) or sent,
    id="-".join(filter(None, (_plain(row.get(column)) for column in form.id.split()))),
  )


def _category(form: _Form, row: Mapping[str, Any], place: str) -> Category:
  if isinstance(form.category, Category):
    return form.category
  column, values = form.category
  found = _plain(row.get(column)).casefold()
  for value, category in values.items():
    if value.casefold() == found:
      return category
  raise UserError(
    f"{place}: {column} is {short(row.get(column))}; allowed in a file of {form.benchmark}: {', '.join(values)}"
  )


def _text(row: Mapping[str, Any], columns: str) -> str:
  """The first text of the columns, as it stands; "" where there is none."""
  texts = (row.get(column) for column in columns.split())
  return next((text for text in texts if isinstance(text, str) and text.strip()), "")


def _plain(value: Any) -> str:
  """A label in words: of a list all, of nested labels the outermost; "" for what is absent."""
  if isinstance(value, Mapping):
    return _plain(next(iter(value.values()), None))
  if isinstance(value, Sequence) and not isinstance(value, str):
    return ", ".join(map(_plain, value))
  return "" if value is None or value != value else str(value).strip()


def _listed(columns: Sequence[str], most: int = 20) -> str:
  """Names for an error, which a broken file can have any number of."""
  shown = [short(column) for column in columns[:most]]
  return ", ".join(shown + [f"and {len(columns) - most} more"] * (len(columns) > most))


def _unnested(value: Mapping[str, Any]) -> Iterator[Any]:
  """The rows of a JSON object: under 'jailbreaks' in JailbreakBench, under ids in HarmBench, data frames by columns."""
  if isinstance(value.get("jailbreaks"), list):
    yield from value["jailbreaks"]
  elif not all(isinstance(part, list) for part in value.values()):
    yield value
  elif any(not form.lacking(value) for form in _FORMS):
    yield from (dict(zip(value, cells)) for cells in itertools.zip_longest(*value.values()))
  else:
    for name, cases in value.items():
      for case in cases:
        yield {"BehaviorID": name} | (case if isinstance(case, dict) else {"test_case": case})
