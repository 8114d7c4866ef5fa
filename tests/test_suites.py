"""Benchmarks: every published schema, column for column, every format, and what is wrong with a file."""

import csv
import dataclasses
import gc
import json
import os
import subprocess
import sys

import pytest

from advgame_jax import suites
from advgame_jax.suites import Item
from advgame_jax.types import Category, UserError

HARMFUL, BENIGN = Category.HARMFUL, Category.BENIGN


@pytest.fixture
def file(tmp_path):
  """Writes rows (or text, or bytes) under a name, and returns the path."""

  def write(name, content, columns=""):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True, parents=True)
    if isinstance(content, bytes):
      path.write_bytes(content)
    elif isinstance(content, str):
      path.write_bytes(content.encode())
    elif columns:
      with path.open("w", encoding="utf-8", newline="") as out:
        csv.writer(out, delimiter="\t" if name.endswith("tsv") else ",").writerows([columns.split(" "), *content])
    elif name.endswith("jsonl"):
      path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    else:
      path.write_text(json.dumps(content, indent=4), encoding="utf-8")
    return str(path)

  return write


def parquet(path, rows):
  import pyarrow
  import pyarrow.parquet

  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  return str(path)


def plain(prompt, category, group="", id=""):
  return Item(prompt, category, group, prompt, id)


HARMBENCH = "Behavior FunctionalCategory SemanticCategory Tags ContextString BehaviorID"
JBB = "Index Goal Target Behavior Category Source"


def harmbench_rows():
  return [
    ["Pick a lock", "standard", "illegal", "", "", "pick_lock"],
    ["Sing the song", "copyright", "copyright", "lyrics, hash_check", "", "sing_song"],
    ["Go on as above", "contextual", "harmful", "context", "A locked door.\nA key.", "go_on"],
  ]


HARMBENCH_ITEMS = [
  plain("Pick a lock", HARMFUL, "illegal", "pick_lock"),
  plain("Sing the song", HARMFUL, "copyright", "sing_song"),
  plain("A locked door.\nA key.\n\n---\n\nGo on as above", HARMFUL, "harmful", "go_on"),
]


def test_harmbench_puts_the_context_before_the_behaviour(file):
  suite = suites.load(file("harmbench_behaviors_text_all.csv", harmbench_rows(), HARMBENCH))
  assert (suite.name, suite.items) == ("harmbench", HARMBENCH_ITEMS)


def test_attacks_of_harmbench_are_on_the_behaviours_of_the_file_beside_them(file):
  cases = file("test_cases.json", {"go_on": ["A door --- go on!!"], "pick_lock": ["Please pick it", "Pick, or else"]})
  behaviours = file("behaviours.csv", harmbench_rows(), HARMBENCH)
  attacks = [
    Item("A door --- go on!!", HARMFUL, "harmful", "A locked door.\nA key.\n\n---\n\nGo on as above", "go_on"),
    Item("Please pick it", HARMFUL, "illegal", "Pick a lock", "pick_lock"),
    Item("Pick, or else", HARMFUL, "illegal", "Pick a lock", "pick_lock"),
  ]
  for spec in (f"{cases}+{behaviours}", f"harmbench={behaviours}+{cases}", f"harmbench_attacks={cases}+{behaviours}"):
    suite = suites.load(spec)
    assert (suite.name, suite.items) == ("harmbench_attacks", attacks)
  alone = suites.load(f"harmbench={cases}").items
  assert [(item.behaviour, item.group) for item in alone] == [("go_on", ""), ("pick_lock", ""), ("pick_lock", "")]


def test_attacks_of_harmbench_need_their_behaviours(file):
  cases = file("test_cases.json", {"go_on": ["Go on"], "stay": ["Stay"]})
  behaviours = file("behaviours.csv", harmbench_rows(), HARMBENCH)
  with pytest.raises(UserError, match="no behaviour has the id 'stay'; allowed: the file of behaviours that were"):
    suites.load(f"{cases}+{behaviours}")
  with pytest.raises(UserError, match="which are no benchmark's: harmbench_attacks, the nearest, has 'test_case' too"):
    suites.load(f"harmbench_attacks={behaviours}")


def test_completions_of_harmbench_are_its_attacks(file):
  rows = {"pick_lock": [{"test_case": "Please", "generation": "No.", "label": 0}], "go_on": []}
  assert suites.load(file("results.json", rows)).items == [Item("Please", HARMFUL, "", "pick_lock", "pick_lock")]


def test_a_test_case_with_a_picture_has_no_text(file):
  with pytest.raises(UserError, match="row 2: no text under 'test_case'"):
    suites.load(file("test_cases.json", {"a": ["words"], "b": [["picture.png", "words"]]}))


def test_wildjailbreak_is_asked_about_the_vanilla_request(file):
  train = file(
    "train.tsv",
    [
      ["open a door", "", "Sure", "vanilla_harmful"],
      ["paint a door", "", "Sure", "vanilla_benign"],
      ["open a door", 'You are a "smith":\topen it', "Sure", "adversarial_harmful"],
      ["paint a door", "You are a painter,\npaint", "Sure", "adversarial_benign"],
    ],
    "vanilla adversarial completion data_type",
  )
  suite = suites.load(train)
  assert suite.name == "wildjailbreak"
  assert suite.items == [
    plain("open a door", HARMFUL, "vanilla_harmful"),
    plain("paint a door", BENIGN, "vanilla_benign"),
    Item('You are a "smith":\topen it', HARMFUL, "adversarial_harmful", "open a door", ""),
    Item("You are a painter,\npaint", BENIGN, "adversarial_benign", "paint a door", ""),
  ]
  rows = [["Be a smith", 1, "adversarial_harmful"], ["Be a painter", 0, "adversarial_benign"]]
  assert suites.load(file("eval.tsv", rows, "adversarial label data_type")).items == [
    plain("Be a smith", HARMFUL, "adversarial_harmful"),
    plain("Be a painter", BENIGN, "adversarial_benign"),
  ]


def test_wildguard_leaves_out_what_its_annotators_left_open(tmp_path):
  row = lambda prompt, label: {
    "prompt": prompt,
    "adversarial": False,
    "response": None,
    "prompt_harm_label": label,
    "response_refusal_agreement": 3.0,
    "response_refusal_label": "refusal",
    "response_harm_label": None,
    "subcategory": "cyberattack" if label == "harmful" else "benign",
    "prompt_harm_agreement": 2.0,
    "response_harm_agreement": None,
  }
  rows = [row("open", "harmful"), row("perhaps", None), row("paint", "unharmful"), row("", "harmful")]
  suite = suites.load(parquet(tmp_path / "wildguard_test.parquet", rows))
  assert suite.name == "wildguard"
  assert suite.items == [plain("open", HARMFUL, "cyberattack"), plain("paint", BENIGN, "benign")]


def test_dan_has_prompts_questions_and_both(file, tmp_path):
  columns = "platform source prompt jailbreak created_at date community community_id previous_community_id"
  rows = [
    ["discord", "A server", "Be free,\nsay so", True, "2023-04-01 00:01:02", "2023-04-01", "free", 1.0, ""],
    ["website", "A page", "Write a poem", False, "", "2023-04-02", "", "", ""],
  ]
  expected = [plain("Be free,\nsay so", HARMFUL, "discord"), plain("Write a poem", BENIGN, "website")]
  suite = suites.load(file("jailbreak_prompts_2023_12_25.csv", rows, columns))
  assert (suite.name, suite.items) == ("dan_prompts", expected)
  records = [dict(zip(columns.split(), row[:4])) for row in rows]
  assert suites.load(parquet(tmp_path / "0000.parquet", records)).items == expected

  columns = "content_policy_id content_policy_name q_id question"
  questions = [[0, "Doors", 0, "How do locks open?"], [1, "Paint", 0, "How do I paint?"]]
  suite = suites.load(file("forbidden_question_set.csv", questions, columns))
  assert suite.name == "dan_questions"
  assert suite.items == [
    plain("How do locks open?", HARMFUL, "Doors", "0-0"),
    plain("How do I paint?", HARMFUL, "Paint", "1-0"),
  ]

  both = [[*questions[0], "Be free."], [*questions[1], "Be free. How do I paint?"]]
  suite = suites.load(file("with_prompts.csv", both, f"{columns} prompt"))
  assert suite.name == "dan_attacks"
  assert suite.items == [
    Item("Be free.\nHow do locks open?", HARMFUL, "Doors", "How do locks open?", "0-0"),
    Item("Be free. How do I paint?", HARMFUL, "Paint", "How do I paint?", "1-0"),
  ]


@pytest.fixture
def no_collection():
  """What the collector finalises at the greatest depth of calls fails there, whoever left it."""
  gc.disable()
  yield
  gc.enable()


@pytest.mark.parametrize(
  ("columns", "order"),
  [
    ("id prompt type label focus note", "iptlfn"),
    ("id_v1 id_v2 type prompt focus note", "-itpfn"),
    ("id type prompt focus note", "itpfn"),
    ("id type prompt completion annotation_1 annotation_2 agreement final_label", "itp-----"),
  ],
)
def test_xstest_with_labels_and_without(file, columns, order):
  rows = [
    {"i": "1", "p": "How do I kill time?", "t": "homonyms", "l": "safe", "f": "kill"},
    {"i": "v2-2", "p": "How do I kill a lock?", "t": "contrast_homonyms", "l": "unsafe", "f": "kill"},
    {"i": "3", "p": "Who is she?", "t": "privacy_fictional", "l": "safe"},
  ]
  suite = suites.load(file("xstest.csv", [[row.get(key, "") for key in order] for row in rows], columns))
  assert suite.name == "xstest"
  assert suite.items == [
    plain("How do I kill time?", BENIGN, "homonyms", "1"),
    plain("How do I kill a lock?", HARMFUL, "contrast_homonyms", "v2-2"),
    plain("Who is she?", BENIGN, "privacy_fictional", "3"),
  ]


@pytest.mark.parametrize(
  ("name", "suite", "category"),
  [
    ("or-bench-80k.csv", "or_bench_80k", BENIGN),
    ("or-bench-hard-1k.csv", "or_bench_hard_1k", BENIGN),
    ("or-bench-toxic.csv", "or_bench_toxic", HARMFUL),
  ],
)
def test_or_bench_is_told_by_the_name_of_the_file_or_by_the_user(file, name, suite, category):
  rows = [["Paint a door", "harmful"], ["Open a door", "self-harm"]]
  expected = [plain("Paint a door", category, "harmful"), plain("Open a door", category, "self-harm")]
  other = file("0000.csv", rows, "prompt category")
  for spec in (file(name, rows, "prompt category"), f"{suite}={other}"):
    loaded = suites.load(spec)
    assert (loaded.name, loaded.items) == (suite, expected)
  for spec in (other, f"or_bench={other}"):
    with pytest.raises(UserError, match=r"may be of or_bench_80k or or_bench_hard_1k or or_bench_toxic, whose columns"):
      suites.load(spec)


def test_seeds_are_no_or_bench_whose_categories_they_share(file):
  rows = [{"prompt": "Open", "category": "harmful", "id": 7}, {"prompt": "Also", "category": "harmful", "note": "x"}]
  for name in ("hard_toxic_seeds.jsonl", "seeds.json"):
    suite = suites.load(file(name, rows))
    assert (suite.name, suite.items) == ("seeds", [plain("Open", HARMFUL, id="7"), plain("Also", HARMFUL)])
  assert suites.load(file("or-bench-toxic.json", rows)).name == "or_bench_toxic"
  rows.append({"prompt": "Paint", "category": "benign", "label": 0, "source": "me", "type": "door"})
  assert suites.load(file("seeds.jsonl", rows)).items[-1] == plain("Paint", BENIGN)


def test_strongreject_and_advbench(file):
  rows = [["Doors", "custom", "Open a door"], ["Paint", "DAN", "Paint,\r\na lot"]]
  suite = suites.load(file("strongreject_dataset.csv", rows, "category source forbidden_prompt"))
  assert suite.name == "strongreject"
  assert suite.items == [plain("Open a door", HARMFUL, "Doors"), plain("Paint,\r\na lot", HARMFUL, "Paint")]
  suite = suites.load(file("harmful_behaviors.csv", [["Open a door", "Sure, here is a door"]], "goal target"))
  assert (suite.name, suite.items) == ("advbench", [plain("Open a door", HARMFUL)])


def test_jailbreakbench_is_told_by_the_name_of_the_file_or_by_the_user(file):
  harmful = file("harmful-behaviors.csv", [[0, "Open it", "Sure", "Opening", "Doors", "Original"]], JBB)
  benign = file("benign-behaviors.csv", [[0, "Paint it", "Sure", "Painting", "Doors", "Original"]], JBB)
  opening, painting = plain("Open it", HARMFUL, "Doors", "0"), plain("Paint it", BENIGN, "Doors", "0")
  assert suites.load(harmful) == suites.Suite("jailbreakbench_harmful", [opening])
  assert suites.load(f"jailbreakbench={benign}") == suites.Suite("jailbreakbench_benign", [painting])
  assert suites.load(f"{harmful}+{benign}") == suites.Suite("jailbreakbench", [opening, painting])
  other = file("data.csv", [[0, "Paint it", "Sure", "Painting", "Doors", "Original"]], JBB)
  assert suites.load(f"jailbreakbench_benign={other}").items == [painting]
  with pytest.raises(
    UserError, match=r"allowed: its published name, or jailbreakbench_harmful=… or jailbreakbench_ben"
  ):
    suites.load(other)


def test_the_first_files_of_jailbreakbench_had_no_name_for_the_index(file):
  text = ",Goal,Target,Behavior,Category\n0,Open it,Sure,Opening,Doors\n"
  assert suites.load(file("harmful-behaviors.csv", text)).items == [plain("Open it", HARMFUL, "Doors")]


def test_artifacts_of_jailbreakbench_are_attacks_on_goals_and_failed_ones_are_left_out(file):
  row = {"index": 0, "goal": "Open it", "behavior": "Opening", "category": "Doors", "prompt": "Be a smith"}
  row |= {"response": "No.", "number_of_queries": None, "jailbroken": False}
  artifact = {"parameters": {"method": "PAIR"}, "jailbreaks": [row, row | {"index": 1, "prompt": None}]}
  suite = suites.load(file("vicuna-13b-v1.5.json", artifact))
  assert suite == suites.Suite("jailbreakbench_attacks", [Item("Be a smith", HARMFUL, "Doors", "Open it", "0")])
  artifact["jailbreaks"].pop(0)
  with pytest.raises(UserError, match="has no row with a prompt and a label"):
    suites.load(file("none.json", artifact))


def test_trustllm_has_three_files(file):
  rows = [{"prompt": "Open", "label": ["leetspeak"], "source": "ITC"}]
  suite = suites.load(file("jailbreak.json", rows))
  assert (suite.name, suite.items) == ("trustllm_jailbreak", [plain("Open", HARMFUL, "leetspeak")])
  rows = [
    {"prompt": "Open", "type": "Doors", "source": "Do-anything-now"},
    {"prompt": "Shut", "label": {"first_class": "Risks", "second_class": "Small"}, "source": "do_not_answer"},
    {"prompt": "Bar", "label": ["phishing"], "source": "misuse_add"},
  ]
  suite = suites.load(file("misuse.json", rows))
  assert suite.name == "trustllm_misuse"
  assert [(item.category, item.group) for item in suite.items] == [(0, "Doors"), (0, "Risks"), (0, "phishing")]
  row = {"id": "v2-1", "type": "homonyms", "prompt": "Kill time", "focus": "kill", "note": "None", "source": "xstest"}
  suite = suites.load(file("exaggerated_safety.json", [row, row | {"type": "contrast_homonyms"}]))
  assert suite.name == "trustllm_exaggerated_safety"
  assert [item.category for item in suite.items] == [BENIGN, HARMFUL]


SEEDS = [
  {"prompt": 'Open "it",\nnow\tor; "never"', "category": "harmful"},
  {"prompt": " Paint it — blue ", "category": "benign"},
]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.parquet", "semicolons", "misnamed.csv"])
def test_the_same_rows_in_every_format(file, tmp_path, name):
  cells = [list(row.values()) for row in SEEDS]
  if name.endswith("parquet"):
    path = parquet(tmp_path / name, SEEDS)
  elif name == "semicolons":
    quoted = ["".join(f'"{cell.replace(chr(34), chr(34) * 2)}";' for cell in row)[:-1] for row in cells]
    path = file(name, "\n".join(["prompt;category", *quoted]))
  elif name == "misnamed.csv":
    path = file(name, json.dumps(SEEDS))
  else:
    path = file(name, cells if "sv" in name else SEEDS, "prompt category" if "sv" in name else "")
  assert suites.load(path).items == [plain(SEEDS[0]["prompt"], HARMFUL), plain(SEEDS[1]["prompt"], BENIGN)]


def test_what_spreadsheets_do_to_a_file_is_no_mistake(file):
  text = '\ufeff\r\n"goal" ,target\r\n\r\n"Open\r\nit",Sure\r\nPaint it\r\n,\r\n , \r\n\r\n'
  assert [item.prompt for item in suites.load(file("a.csv", text)).items] == ["Open\r\nit", "Paint it"]
  assert [item.prompt for item in suites.load(file("b.csv", "goal,target\rOpen it,Sure\r")).items] == ["Open it"]
  text = "\ufeff" + '{"prompt": "a\u2028b\\u0000", "category": "harmful"}\r\n\r\n' * 2
  assert suites.load(file("a.jsonl", text)).items == [plain("a\u2028b\0", HARMFUL)] * 2


def test_columns_of_a_data_frame_are_no_attacks(file):
  frame = {column: [row[column] for row in SEEDS] for column in SEEDS[0]}
  assert suites.load(file("a.json", frame)) == suites.load(file("b.json", SEEDS))
  frame["category"].pop()
  with pytest.raises(UserError, match="row 2: category is None"):
    suites.load(file("a.json", frame))


def test_fields_of_any_size(file):
  long, usual = "door " * 100_000, csv.field_size_limit()
  rows = [[long, "Sure"], [long.replace(" ", ",\n"), "Sure"]]
  assert [len(item.prompt) for item in suites.load(file("a.csv", rows, "goal target")).items] == [500_000, 600_000]
  with pytest.raises(UserError, match="and 99980 more"):
    suites.load(file("b.csv", ",".join(map(str, range(100_000))) + "\n1"))
  assert csv.field_size_limit() == usual


def test_a_label_may_be_a_number_or_in_capitals(file):
  rows = [{"prompt": "a", "category": " Harmful"}, {"prompt": "b", "category": "BENIGN"}]
  assert [item.category for item in suites.load(file("a.json", rows)).items] == [HARMFUL, BENIGN]


@pytest.mark.parametrize(
  ("name", "content", "sentence"),
  [
    ("empty.csv", "", "empty.csv is empty; allowed: one or more rows of CSV, TSV"),
    ("blank.csv", "\ufeff\n \n", "is empty"),
    ("header.csv", "goal,target\n\n", "is empty"),
    ("empty.json", "[]", "is empty"),
    ("latin.csv", b"goal,target\n\xe9,a\n", "latin.csv is not UTF-8 at byte 12"),
    ("wide.csv", "goal,target".encode("utf-16"), "is not UTF-8 at byte 0"),
    ("a.csv", "goal,target\na,b\n\n\n  ,b\n", "a.csv, line 5: no text under 'goal'; allowed in a file of advbench"),
    ("a.csv", 'goal,target\n"a\n\n",b\n,b\n', "line 5: no text under 'goal'"),
    ("a.csv", "goal,target\na,b\na,b,c\n", "line 3: 3 cells; allowed: one for each of the 2 columns"),
    ("a.csv", 'goal,target\na,b\n"c,d\ne,f\n', "a quoted text does not end; allowed: the whole file"),
    (
      "a.tsv",
      "adversarial\tvanilla\tdata_type\n\t\tvanilla_benign",
      "line 2: no text under 'adversarial' or 'vanilla'",
    ),
    (
      "a.tsv",
      "adversarial\tdata_type\na\tvanilla\n",
      "data_type is 'vanilla'; allowed in .* wildjailbreak: vanilla_harm",
    ),
    ("a.csv", "prompt,type,label\na,homonyms,safe\nb,homonyms,fine", "line 3: label is 'fine'; .*: safe, unsafe"),
    ("a.csv", "prompt,type\na,homonyms\nb,heteronyms", "line 3: type is 'heteronyms'; allowed in a file of xstest"),
    ("a.json", [{"prompt": "a", "label": ["x"], "source": "me"}], "source is 'me'; allowed .* trustllm: ITC, QBB"),
    ("a.jsonl", [SEEDS[0], {"prompt": "a", "category": "evil"}], "line 2: category is 'evil'; .*: harmful, benign"),
    ("a.jsonl", [SEEDS[0], {"prompt": "a"}], "line 2: category is None"),
    (
      "a.json",
      [{"prompt": "a", "category": "x" * 999}],
      "category is 'x{79}; allowed in a file of seeds: harmful, ben",
    ),
    ("a.json", [SEEDS[0], {"category": "benign"}], "a.json, row 2: no text under 'prompt'"),
    ("a.json", [SEEDS[0], "text"], "row 2: 'text' is not a JSON object; allowed: a list of objects"),
    ("a.json", '[{"prompt": "a",\n "category": ', r"a.json: not JSON \(Expecting value: line 2 column 14"),
    ("a.jsonl", '{"prompt": "a", "category": "benign"}\n{"prompt', r"a.jsonl, line 2: not JSON \(Unterminated string"),
    ("a.jsonl", '{"prompt": "a", "category": "benign"}\n[1]', r"line 2: not a JSON object"),
    ("deep.json", "[" * 200_000, "deep.json: not JSON"),
    ("a.parquet", b"PAR1 is how it begins", "a.parquet is no parquet that can be read: .*; allowed: the whole file"),
    (
      "a.csv",
      "text,harm\na,b\n",
      "columns 'text', 'harm', which are no benchmark's; allowed: files as published, of advb",
    ),
    (
      "a.csv",
      "category,source,forbidden\na,b,c\n",
      "a.csv has the columns 'category', 'source', 'forbidden', which are no benchmark's: strongreject, the nearest, "
      "has 'forbidden_prompt' too",
    ),
    ("a.csv", "target\na\n", "advbench, the nearest, has 'goal' too"),
    ("a.json", {"version": "1", "data": {}}, "columns 'version', 'data', which are no benchmark's"),
  ],
)
def test_a_file_that_is_none_is_refused_in_a_sentence(no_collection, file, name, content, sentence):
  with pytest.raises(UserError, match=sentence) as refused:
    suites.load(file(name, content))
  assert "; allowed" in str(refused.value) and "\n" not in str(refused.value)


def test_specs_that_name_nothing(file, tmp_path):
  with pytest.raises(UserError, match=r"no benchmark 'harmbrench'; allowed: advbench, dan, dan_attacks, .*, xstest"):
    suites.load("harmbrench=a.csv")
  with pytest.raises(UserError, match=r"nowhere\.csv' cannot be read: No such file"):
    suites.load(str(tmp_path / "nowhere.csv"))
  with pytest.raises(UserError, match="cannot be read: Is a directory"):
    suites.load(f"xstest={tmp_path}")
  for spec in ("", "xstest=", "a\0b", "x" * 5000, f"{file('a.csv', [['a', 'b']], 'goal target')}+"):
    with pytest.raises(UserError, match="cannot be read"):
      suites.load(spec)


def test_a_name_leaves_only_its_benchmark_to_be_recognised(file):
  path = file("a.csv", [["Paint", "homonyms", "harmful"]], "prompt type category")
  assert [suites.load(f"{name}={path}").name for name in ("seeds", "xstest")] == ["seeds", "xstest"]
  with pytest.raises(UserError, match=r"which are no benchmark's; allowed: .* of advbench$"):
    suites.load(f"advbench={path}")


def test_a_file_may_be_called_like_a_spec(file, monkeypatch, tmp_path):
  path = file("seeds=a+b.csv", [["Open", "Sure"]], "goal target")
  monkeypatch.chdir(tmp_path)
  for spec in ("seeds=a+b.csv", f"advbench={path}", f"advbench={os.path.basename(path)}"):
    assert suites.load(spec).name == "advbench"


def test_files_of_different_benchmarks_can_be_joined(file):
  paths = [file("a.csv", [["Open", "Sure"]], "goal target"), file("b.jsonl", SEEDS), file("c.jsonl", SEEDS[:1])]
  suite = suites.load("+".join(paths))
  assert (suite.name, len(suite.items)) == ("advbench+seeds", 4)


def test_every_form_is_well_made():
  for form in suites._FORMS:
    columns = form.columns.split()
    told = [] if isinstance(form.category, Category) else [form.category[0]]
    assert {*told, *form.prompt.split()[:1]} <= set(columns), form.name  # what a row cannot do without
    assert form.texts in ("", *(other.name for other in suites._FORMS))
    assert form.name in suites.names() and form.benchmark in suites.names()
  assert (
    dataclasses.is_dataclass(Item) and Item.__dataclass_params__.frozen and suites.Suite.__dataclass_params__.frozen
  )


def test_parquet_is_loaded_for_parquet_alone(file):
  path = file("a.csv", [["Open", "Sure"]], "goal target")
  code = f"import sys; from advgame_jax import suites; suites.load({path!r}); print('pyarrow' in sys.modules)"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "False"
