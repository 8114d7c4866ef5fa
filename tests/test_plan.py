"""Plans against what runs hold, against sums by hand, and of machines that are not here."""

import dataclasses
import os
import pathlib
import runpy
import subprocess
import sys

import jax
import pytest
import world

from advgame_jax import blueprint, fit, panel, plan, published, targets, train, workload
from advgame_jax.config import Config, Judge, Judges, Mesh, from_config_dict
from advgame_jax.ledger import Ledger
from advgame_jax.targets import Target
from advgame_jax.types import Role, UserError

ROOT = pathlib.Path(__file__).parents[1]
GIB = 2**30
QWEN_7B = 7_615_616_512  # parameters
REFUSED = (
  "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm: required for HLO "
  "temporaries (29.26G) exceeds available HBM (15.75G)"
)


@pytest.fixture(scope="module")
def paper() -> Config:
  return from_config_dict(runpy.run_path(str(ROOT / "configs" / "qwen2_5_7b.py"))["get_config"]("dpo"))


@pytest.fixture
def no_compiler(monkeypatch):
  def devices(target):
    raise targets.NoCompiler(f"target {target.name!r} needs a compiler; allowed: pip install it")

  monkeypatch.setattr(Target, "devices", devices)


@pytest.fixture
def few_ways(monkeypatch):
  monkeypatch.setattr(fit, "REMATS", ("layer", "products"))
  monkeypatch.setattr(fit, "NODES", (1,))
  monkeypatch.setattr(fit, "JUDGE_BATCHES", (1, 4))
  monkeypatch.setattr(fit, "SHARDINGS", ("ddp", "fsdp_tensor"))
  monkeypatch.setattr(fit, "TENSORS", (0,))


def held(made, *names):
  return {h.what: h.bytes for h in made.blueprint.held if not names or any(name in h.what for name in names)}


def here(devices=1):
  return dataclasses.replace(targets.parse(f"cpu:{devices}"), name=f"cpu:{devices}")


def nbytes(tree):
  """Of the first device."""
  return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("sharding,devices", [("single", 1), ("fsdp", 8), ("fsdp_tensor", 8)])
@pytest.mark.parametrize("rank", [0, 4])
def test_what_is_said_to_stay_is_what_a_run_holds(world_folder, sharding, devices, rank):
  changes = {
    "attacker__lora__rank": rank,
    "defender__lora__rank": rank,
    "mesh__tensor": 2 * (sharding == "fsdp_tensor"),
  }
  config = world.config(world_folder, sharding=sharding, **changes)
  made = plan.estimate(config, here(devices))
  run = world.open_session(config, devices)
  state = run.init_state()
  for name, player in zip(("attacker", "defender"), state.players):
    assert held(made, f"{name}: weights") == {f"{name}: weights": nbytes(player.params)}
    assert held(made, f"{name}: average") == {f"{name}: average and reference": nbytes((player.ema, player.initial))}
    assert held(made, f"{name}: moments") == {f"{name}: moments": nbytes(player.optimizer)}
  copies = [nbytes(generator.members) for generator in run.generators(state)]
  if rank:
    assert sum(held(made, "bases of adapters").values()) == nbytes(run.bases)
    base = [nbytes(bases) for bases in run.bases.values()] if sharding == "single" else []
    copies = [copy - sum(base) / 2 for copy in copies] if base else []  # each folder's own base
  if copies:
    assert sum(held(made, "copy to play").values()) == sum(copies)


def test_the_copies_that_play_are_gone_when_a_step_is_learnt(world_folder, compile_quickly, monkeypatch):
  run = world.open_session(world.config(world_folder))
  state, sizes, update = run.init_state(), [], type(run).update

  def measured(self, *args):
    sizes.append(sum(x.nbytes for x in jax.live_arrays()))
    return update(self, *args)

  before = sum(x.nbytes for x in jax.live_arrays())
  monkeypatch.setattr(type(run), "update", measured)
  recorder, seeds = world.Recorder(), run.train_seeds
  batch = train.data.SeedBatches(seeds, run.config.data, 0)[0]
  train.play_and_learn(run, state, 0, batch, Ledger(1), recorder)
  assert sizes[0] - before < 0.25 * nbytes(run.generators(run.init_state()).attacker.members)


def test_a_plan_of_this_machine_is_compiled_and_its_state_is_in_the_update(world_folder, compile_quickly):
  config = world.config(world_folder)
  made = plan.make(config, here())
  assert made.fits and made.seconds > 0 and made.blueprint.drawn == 8 * 2 * 12 * 3
  assert {cost.source for cost in made.costs} == {"compiler"}
  (update,) = (peak for peak in made.peaks if peak.what == "update")
  assert update.held == sum(h.bytes for h in made.blueprint.held if "update" in h.during)
  guess = plan.guessed(next(c.work for c in made.costs if c.work.name == "update"), targets.chips.CPU)
  assert 0.2 < guess.added / update.added < 5


def test_the_state_of_the_papers_run_by_hand(paper):
  made = plan.estimate(paper, targets.parse("h100:8"))
  state = held(made, "weights", "average", "moments")
  of_players = sum(value for what, value in state.items() if "read anew" not in what and "copy" not in what)
  norms = 1.001  # they are whole on each device
  assert 1 < of_players / (2 * QWEN_7B * 16 / 8) < norms
  assert held(made, "attacker: copy to play from")["attacker: copy to play from"] == pytest.approx(
    QWEN_7B * 2 / 4, rel=1e-3
  )
  assert [note.split()[0] for note in made.notes] == ["models/qwen2_5_32b", "models/qwen2_5_7b"]


def test_state_falls_as_devices_grow(paper):
  config = dataclasses.replace(paper, sharding="fsdp", judges=Judges(Judge(kind="heuristic")))
  sizes = {}
  for count in (8, 32, 128):
    made = plan.estimate(config, targets.parse(f"h100:{count // 8}x8"))
    sizes[count] = made.resident("update", made.blueprint.places.defender.mesh)
  total = {count: sum(h.bytes for h in found) for count, found in sizes.items()}
  assert total[8] / total[32] == pytest.approx(4, rel=5e-3)
  assert total[8] / total[128] == pytest.approx(16, rel=2e-2)


def test_gathers_cross_hosts_unless_copies_do(paper):
  def crossing(sharding):
    made = plan.estimate(dataclasses.replace(paper, sharding=sharding), targets.parse("h200:2x8"))
    (update,) = (cost for cost in made.costs if cost.work.name == "update")
    return {one.kind for one in update.collectives if one.crosses}, update.collectives

  kinds, found = crossing("fsdp")
  assert kinds == {"all-gather", "all-to-all", "reduce-scatter"}
  assert {(one.devices, one.local) for one in found} == {(16, 8)}
  assert crossing("hybrid")[0] == {"all-reduce"}


def test_the_bytes_of_the_guess_are_the_lower_bound_and_what_is_looked_up(paper):
  config = dataclasses.replace(paper, sharding="fsdp")
  made = plan.estimate(config, targets.parse("h100:8"))
  (update,) = (cost for cost in made.costs if cost.work.name == "update")
  micro = config.attacker.accumulate + config.defender.accumulate
  looked_up = [one.bytes for one in update.collectives if one.kind == "all-to-all"]
  matrices = QWEN_7B - 152_064 * 3584  # the embedding stays in parts
  bound = micro * 3 * matrices * 2 * 7 / 8  # 2 gathers and 1 scatter in two bytes a number
  assert sum(one.bytes for one in update.collectives) - sum(looked_up) == pytest.approx(bound, rel=1e-3)
  assert 0 < sum(looked_up) < 0.02 * bound


def test_longer_answers_take_longer_and_more_devices_less(paper):
  seconds = lambda target, tokens: plan.estimate(paper, targets.parse(target), tokens).seconds
  assert seconds("h100:8", 256) < seconds("h100:8", 1024) == seconds("h100:8", 0) < seconds("h100:8", 2048)
  assert seconds("h100:4x8", 1024) < seconds("h100:8", 1024)


def test_what_does_not_fit_says_by_how_much_and_what_is_there(paper):
  made = plan.estimate(dataclasses.replace(paper, sharding="fsdp"), targets.parse("a100-40:8"))
  assert not made.fits
  said = made.why_not()
  assert f"{made.peak.bytes / GIB:.1f} GiB of a device's {made.target.capacity / GIB:.1f}" in said
  assert "judge: qwen2_5_32b" in said and "bfloat16[152064,5120]" in said


def test_a_compilers_refusal_is_read():
  assert plan.refused(REFUSED) == 29.26 * GIB
  assert plan.refused("INTERNAL: something else (29.26G)") is None
  assert plan.refused("RESOURCE_EXHAUSTED: no sizes") is None


def test_what_cannot_be_compiled_otherwise_is_refused_in_a_sentence(world_folder, monkeypatch):
  class Lowered:
    def compile(self):
      raise jax.errors.JaxRuntimeError("INTERNAL: no such devices\nand a trace")

  made = plan.estimate(world.config(world_folder), here())
  work = made.blueprint.works[0]._replace(lower=Lowered)
  with pytest.raises(
    UserError, match="attacker: copy cannot be compiled for cpu:1: INTERNAL: no such devices; allowed"
  ):
    plan.compiled(work, here(), targets.chips.CPU)


def test_parts_of_a_slice_are_refused(paper, monkeypatch):
  def place(*_):
    raise AssertionError

  monkeypatch.setattr(blueprint.placement, "place", place)
  with pytest.raises(UserError, match="takes parts of a slice of v5e-64"):
    plan.estimate(paper, targets.parse("v5e-64"))


def test_a_refused_program_does_not_fit_and_names_its_largest_array(world_folder, compile_quickly, monkeypatch):
  class Lowered:
    def compile(self):
      raise jax.errors.JaxRuntimeError(REFUSED)

  target, config = dataclasses.replace(here(), capacity=15.75 * GIB), world.config(world_folder)
  draw, calls = blueprint.draw, []

  def with_refusal(*args):
    made, first = draw(*args), not calls
    calls.append(args)
    return made._replace(
      works=[
        w._replace(lower=Lowered) if w.name == "update" and first else w for w in made.works if w.phase == "update"
      ]
    )

  monkeypatch.setattr(blueprint, "draw", with_refusal)
  made = plan.make(config, target, chip=targets.chips.CPU)
  assert not made.fits and made.peak.what == "update" and made.costs[0].source == plan.REFUSED
  assert "largest temporary: f32[" in made.why_not()
  assert 29 * GIB < made.peak.bytes < (29.26 + 0.1) * GIB  # with what stays, which the compiler has counted


def test_without_the_compiler_a_plan_is_an_estimate_and_says_so(paper, no_compiler):
  made = plan.make(paper, targets.parse("v5p-16"))
  assert {cost.source for cost in made.costs} == {"estimate"}
  assert any("pip install it" in note for note in made.notes)
  assert made.seconds == plan.estimate(paper, targets.parse("v5p-16")).seconds


def test_other_reasons_why_there_are_no_devices_are_refused(paper):
  with pytest.raises(UserError, match="JAX_NUM_CPU_DEVICES=64"):
    plan.make(paper, targets.parse("cpu:64"))


def test_models_that_nobody_knows_are_refused(paper):
  unknown = dataclasses.replace(paper, attacker=dataclasses.replace(paper.attacker, model="models/unheard_of"))
  with pytest.raises(UserError, match=r"no folder models/unheard_of; allowed: .*qwen2_5_7b"):
    plan.estimate(unknown, targets.parse("h100:8"))


def test_judges_of_several_models_are_planned_each_in_its_form(world_folder):
  """One is the players' base, whose layers are stacked, the other has weights of its own, one layer after the other."""
  base, other = str(world_folder / "defender_base"), str(world_folder / "attacker_base")
  judge = Judge(kind="model", model=base, readout="probability", batch=4)
  judges = Judges(judge, defender=dataclasses.replace(judge, model=other))
  lora = {"attacker__lora__rank": 4, "defender__lora__rank": 4, "game__instructions": "standard"}
  drawn = blueprint.draw(world.config(world_folder, judges=judges, **lora), here(), jax.devices()[:1])
  works = {work.name: work for work in drawn.works if work.name.startswith("judge: ")}
  assert set(works) >= {"judge: defender: read", "judge: defender: draw"} and len(works) == 4
  for work in works.values():
    work.lower()


def test_an_evaluation_asks_as_often_as_it_is_played(paper):
  """Three games of 128 attacks and one of 128 plain queries: who is faithful, complies, deflects and refuses."""
  made = plan.estimate(paper, targets.parse("h100:8"))
  in_step, in_evaluation = made.blueprint.asked
  B, A, D = paper.data.batch, paper.game.attacks, paper.game.responses
  assert in_step == B * A + B * A * D * (D - 1) + B * A * (A - 1)
  known = panel.roles_of(panel.settings_of(paper.judges, "evaluation"))
  of_response = 0.5 * (Role.COMPLIANCE in known) + 0.5 * (Role.DEFLECTION in known) + (Role.REFUSAL in known)
  assert in_evaluation == 3 * 128 + 4 * 128 * of_response


def test_what_is_too_much_is_said_of_the_devices_that_it_is_on(paper, no_compiler):
  attacker = dataclasses.replace(paper.attacker, model="models/Llama-3.3-70B-Instruct")
  made = plan.estimate(dataclasses.replace(paper, attacker=attacker, sharding="apart"), targets.parse("h100:8"))
  assert not made.fits and "most stays for attacker: " in made.why_not()
  assert made.seconds < made.serial


def test_a_folder_that_is_there_is_read(world_folder, tmp_path):
  config = world.config(world_folder)
  assert published.stand_in(config, tmp_path) == (config, [])


def test_a_load_of_more_rows_than_slots_takes_waves():
  class Shapes:
    slots, rows = 8, ((1, 64),)

  class Engine:
    shapes = staticmethod(lambda *_: Shapes)
    mesh, layout, sampling = None, None, type("S", (), {"max_new_tokens": 100})

  drawing = lambda prompts, mean: workload.drawing_of(Engine, prompts, 2, 32, mean)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(workload.sharding, "shards", lambda *_: 1)
    patch.setattr(Engine, "layout", type("L", (), {"rows": ()}))
    assert drawing(4, 30).steps == 60  # one wave, until its longest
    assert drawing(16, 30).steps == 3 * 30 + 60
    assert drawing(16, 80).steps == 3 * 80 + 100
    assert (drawing(16, 30).slots, drawing(16, 30).reads, drawing(16, 30).context) == (8, 8, 47)


def test_the_search_finds_what_fits_and_says_the_flags(paper, no_compiler, few_ways, capsys):
  made = fit.search(paper, targets.parse("h100:8"))
  assert made.fits
  assert [note for note in made.notes if "nothing is compiled" in note]
  text = capsys.readouterr().out
  best = text[text.index("The best: ") :].split()[2:]
  values = dict(flag.removeprefix("--config.").split("=") for flag in best)
  assert values["sharding"] == made.blueprint.config.sharding
  assert int(values["attacker.accumulate"]) == made.blueprint.config.attacker.accumulate
  assert made.seconds <= plan.estimate(paper, targets.parse("h100:8")).seconds


def test_on_one_device_all_shardings_come_to_the_same(paper, no_compiler, few_ways):
  target = targets.parse("h200:1")
  tried = list(fit.candidates(paper, target, 0, target.chip))
  changes = {(one.flags["precision.remat"], one.flags.get("judges.training.batch")) for one in tried}
  assert len(tried) == len(changes) == 4


def test_more_tokens_than_a_player_may_draw_are_its_limit_and_said_so(world_folder):
  config = world.config(world_folder, defender__sampling__max_new_tokens=40)
  said = lambda tokens: plan.estimate(config, here(), tokens).blueprint.notes
  assert said(0) == said(24) == []
  assert said(30) == ["the attacker draws its limit of 24 tokens"]
  assert said(99) == [*said(30), "the defender draws its limit of 40 tokens"]


def test_a_search_in_vain_gives_the_smallest(paper, no_compiler, few_ways):
  made = fit.search(paper, targets.parse("l40s:2"))
  assert not made.fits and "too much" in made.why_not()


def test_a_mesh_that_cannot_be_is_refused(paper, few_ways):
  with pytest.raises(UserError, match="does not fit 8 devices"):
    plan.estimate(dataclasses.replace(paper, mesh=Mesh(fsdp=3)), targets.parse("h100:8"))
  with pytest.raises(UserError, match="does not fit 8 devices"):
    fit.search(dataclasses.replace(paper, mesh=Mesh(data=3)), targets.parse("h100:8"))
  missing = dataclasses.replace(paper, defender=dataclasses.replace(paper.defender, model="models/unheard_of"))
  with pytest.raises(UserError, match="no folder models/unheard_of"):
    fit.search(missing, targets.parse("h100:8"))


@pytest.mark.parametrize("target,code,said", [("h100:8", 0, "It fits"), ("a100-40:8", 1, "It does not fit")])
def test_the_program_says_it_by_its_exit_code(one_device, target, code, said):
  command = [sys.executable, "launch/plan.py", "--config=configs/qwen2_5_7b.py:dpo", f"--target={target}", "--price=2"]
  environment = one_device | {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
  done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == code, done.stderr
  assert said in done.stdout and "is not installed" in done.stdout and "pip install" in done.stdout
  assert "at 2 an hour" in done.stdout
