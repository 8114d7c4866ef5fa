"""Imports go downward only. The table below is the architecture: a module that is not in it has no place yet."""

import ast
import graphlib
import itertools
import pathlib

import pytest

import advgame_jax

PACKAGE = pathlib.Path(advgame_jax.__file__).parent
LEVELS = (
  "types settings config",
  "sharding hosts meeting cluster supervise large_pages tokenizer refusals prompts rewards preferences losses rounding "
  "optimizers paper offline diversity tables chips collectives targets roofline cpu",
  "architecture matrices layers lora blockwise kernels attention caches flash_decoding fork experts "
  "feed_forward rotary model scoring sampler slots drawn programs pools engine hf_rope hf_config hf_shards hf hf_gguf "
  "peft frozen placement",
  "policies game judges canary rubrics cases guards phrases drift model_judge endpoint server_judge heuristic "
  "microworld worldfiles state update",
  "data checkpoint ledger report plots charts trace peaks profile page suites attempts handover campaign_page",
  "command panel session workload held published blueprint plan plan_page fit evaluate metrics train warmstart export "
  "standalone",
  "speakers rest campaign rates findings casting redteam assess live chat completions serve",
)
# Within a level, only a module to the right may import one to its left.
CHAINS = (
  "types → settings → config",
  "refusals → prompts",
  "rounding → optimizers",
  "chips → targets",
  "meeting → cluster",
  "chips → roofline",
  "collectives → roofline",
  "architecture → rotary → model",
  "architecture → experts → feed_forward → model → scoring → sampler → programs → pools → engine",
  "layers → pools",
  "attention → sampler",
  "attention → slots → drawn → engine",
  "sampler → drawn",
  "kernels → engine",
  "architecture → engine",
  "matrices → experts",
  "matrices → feed_forward",
  "matrices → attention → model",
  "architecture → caches → model",
  "matrices → layers → caches → sampler",
  "attention → caches → programs",
  "matrices → lora → peft",
  "architecture → lora",
  "architecture → peft",
  "blockwise → kernels → attention → flash_decoding → model",
  "blockwise → flash_decoding",
  "matrices → flash_decoding",
  "caches → flash_decoding",
  "kernels → model",
  "architecture → layers → model",
  "layers → sampler",
  "layers → programs",
  "layers → engine",
  "layers → frozen",
  "fork → model",
  "fork → scoring",
  "architecture → hf_rope → hf_config → hf → hf_gguf",
  "architecture → hf_shards → hf",
  "hf → peft",
  "hf_config → peft",
  "hf → frozen",
  "matrices → frozen",
  "architecture → frozen",
  "architecture → placement",
  "rubrics → cases → guards",
  "cases → server_judge",
  "endpoint → server_judge",
  "cases → model_judge",
  "guards → model_judge",
  "policies → model_judge",
  "judges → canary",
  "panel → session → train",
  "panel → metrics",
  "panel → published → blueprint → plan → plan_page → fit",
  "session → blueprint",
  "workload → held → blueprint → plan",
  "microworld → worldfiles",
  "state → update",
  "plots → charts → page → campaign_page",
  "report → campaign_page",
  "charts → campaign_page",
  "attempts → campaign_page",
  "attempts → handover",
  "report → handover",
  "ledger → profile → page",
  "trace → profile",
  "peaks → profile",
  "report → profile",
  "ledger → page",
  "report → page",
  "session → evaluate → train",
  "session → metrics → train",
  "session → export → standalone",
  "session → standalone",
  "speakers → rest → casting",
  "speakers → campaign → rates → findings → casting → redteam",
  "speakers → casting",
  "campaign → casting",
  "campaign → redteam",
  "findings → redteam",
  "campaign → assess",
  "findings → assess",
  "rates → assess",
  "rates → redteam",
  "casting → assess",
  "live → chat → completions → serve",
  "live → serve",
  "chat → serve",
  "live → completions",
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names.split()}
ARROWS = [pair for chain in CHAINS for pair in itertools.combinations(chain.split(" → "), 2)]


def imports(source: str) -> set[str]:
  """Dotted names of what a file imports, anywhere in it: of modules, and of what is taken from them."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {name.name for name in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "a relative import"
      found |= {f"{node.module}.{name.name}" for name in node.names}
  return found


IMPORTS = {path.stem: imports(path.read_text()) for path in PACKAGE.glob("*.py")}
GRAPH = {
  module: {name.split(".")[1] for name in names if name.startswith("advgame_jax.")} for module, names in IMPORTS.items()
}


def test_every_module_has_one_place_and_no_place_is_empty():
  assert sorted(" ".join(LEVELS).split()) == sorted(GRAPH.keys() - {"__init__"})
  assert not list(PACKAGE.glob("*/**/*.py"))  # the package is flat


@pytest.mark.parametrize("module", sorted(LEVEL))
def test_a_module_imports_downward_only(module):
  wrong = {name for name in GRAPH[module] if LEVEL[name] >= LEVEL[module] and (name, module) not in ARROWS}
  assert not wrong, f"{module} may not import {sorted(wrong)}"


def test_every_arrow_joins_siblings_and_stands_for_an_import():
  for chain in CHAINS:
    for left, right in itertools.pairwise(chain.split(" → ")):
      assert LEVEL[left] == LEVEL[right], f"{left} → {right} is no sibling: its level says it already"
      assert left in GRAPH[right], f"{right} does not import {left}: take the arrow away"


def test_there_is_no_cycle():
  graphlib.TopologicalSorter(GRAPH).prepare()


def test_importing_the_package_loads_no_module_and_no_module_loads_a_program():
  assert not IMPORTS["__init__"]
  roots = {name.split(".")[0] for names in IMPORTS.values() for name in names}
  assert not roots & {"benchmarks", "configs", "launch", "tests"}
