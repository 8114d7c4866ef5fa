"""What a profile says, against made-up traces and a real one of the CPU."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.profiler import ProfileData
from test_page import HOSTILE, Parsed, fake_run

import advgame_jax
from advgame_jax import chips, metrics, page, peaks, profile, report, trace
from advgame_jax.ledger import WORKS, Ledger
from advgame_jax.profile import Facts, Profiler, Window
from advgame_jax.trace import Op, Span, Trace
from advgame_jax.types import UserError

FACTS = Facts(peaks.Peak(1e12, 1e11, "a chip"), 1, {"attacker generate": 1e6})

HLO = """HloModule jit_advance, is_scheduled=true

FileNames
1 "somewhere.py"

%fused (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  %m = f32[2]{0} multiply(%p, %p), metadata={op_name="jit(f)/generate/while/body/decode/mlp/mul" stack_frame_id=1}
  ROOT %tuple.3 = (f32[2]{0}) tuple(%m)
}

ENTRY %main.1 (x: f32[2]) -> f32[2] {
  %x = f32[2]{0:T(256)} parameter(0), metadata={op_name="params"}
  %while.1 = (s32[], f32[2]{0}, /*index=2*/f32[2]{0}) while(%x), condition=%c, body=%b, metadata={op_name="jit(f)/generate/while"}
  %fusion.2 = (f32[2]{0}) fusion(%x), kind=kLoop, calls=%fused
  %copy.4 = f32[2]{0} copy(%x)
  %pallas_call.7 = f32[2]{0} custom-call(%x), metadata={op_name="jit(f)/generate/while/body/decode/attention/read_pages/pallas_call"}
  ROOT %ar-start = f32[2]{0} all-reduce-start(%x), to_apply=%add, metadata={op_name="jit(f)/generate/while/body/draw/head/psum"}
}
"""  # noqa: E501


def op(name, start, end, device="CPU:0", module="jit_advance", program=1):
  return Op(device, module, program, name, start, end)


@pytest.mark.parametrize("text", ["", "3", "3:3", "5:4", "a:b", "-1:2", "1:2:3", "1.5:2", "٣:٤", "1:99999999999999"])
def test_what_names_no_steps_is_refused(text):
  with pytest.raises(UserError, match="allowed: START:STOP"):
    profile.parse_window(text, 10)


def test_a_window_ends_with_the_run_and_begins_before():
  assert profile.parse_window("3:5", 10) == Window(3, 5)
  assert profile.parse_window("3:50", 10) == Window(3, 10)
  with pytest.raises(UserError, match=r"below config\.steps = 10"):
    profile.parse_window("10:12", 10)


@pytest.mark.parametrize(
  "name, scope",
  [
    ("jit(advance)/generate/while/body/decode/attention/transpose", ("generate", "decode", "attention")),
    ("jit(joint_update)/update/cond/branch_1_fun/jvp(embed)/gather", ("update", "forward", "embed")),
    ("jit(u)/update/transpose(jvp())/while/body/checkpoint/mlp/dot", ("update", "backward", "mlp")),
    ("jit(u)/update/transpose(jvp(mlp))/dot", ("update", "backward", "mlp")),
    ("jit(u)/update/transpose(jvp())/checkpoint/rematted_computation/mlp/x", ("update", "recompute", "mlp")),
    ("state.players.attacker.optimizer[1][0].nu['layers']", ()),
    ("jit(f)/vmap(vmap(draw))/draw/add", ("draw",)),
    ("", ()),
  ],
)
def test_the_scope_of_a_name(name, scope):
  assert trace.scope_of(name) == scope


def test_a_program_is_read_from_its_text():
  name, program = trace.read_program(HLO)
  assert name == "jit_advance"
  assert program["while.1"] == (("generate",), "while")
  assert program["fusion.2"] == (("generate", "decode", "mlp"), "fusion")  # by what it is made of
  assert program["copy.4"] == ((), "copy")
  assert program["ar-start"] == (("generate", "draw", "head"), "all-reduce-start")
  assert program["fusion_2"] == program["fusion.2"]  # as its kernel is called
  assert program["read_pages"] == program["pallas_call.7"] == (("generate", "decode", "attention"), "custom-call")
  assert trace.read_program("no program") == ("", {})


def test_every_scope_is_in_the_source_and_the_other_way_round():
  source = "".join(path.read_text() for path in pathlib.Path(advgame_jax.__file__).parent.glob("*.py"))
  named = set(re.findall(r'named_scope\("(\w+)"\)', source))
  assert named | set(trace._DERIVED.values()) == set(trace.SCOPES)


def test_the_innermost_span_has_the_time():
  spans = [Span(0, 10, "other"), Span(2, 5, "judge"), Span(5, 6, "update"), Span(3, 4, "other"), Span(12, 13, "judge")]
  assert trace.innermost(spans) == [
    Span(0, 2, "other"),
    Span(2, 3, "judge"),
    Span(3, 4, "other"),
    Span(4, 5, "judge"),
    Span(5, 6, "update"),
    Span(6, 10, "other"),
    Span(12, 13, "judge"),
  ]


def attribute(ops, roles=()):
  return trace.attribute(Trace(ops, [list(spans) for spans in roles], []), [trace.read_program(HLO)])


def test_a_loop_has_the_time_that_nothing_else_had_and_what_runs_together_shares_it():
  ops = [op("while.1", 0, 100), op("copy.4", 10, 40), op("fusion.2", 30, 50), op("fusion.2", 90, 100)]
  ops.append(op("copy.4", 95, 95))
  found = {(each.op.name, each.op.start): each for each in attribute(ops)}
  nanoseconds = {at: round(each.seconds * 1e9) for at, each in found.items()}
  assert nanoseconds == {
    ("while.1", 0): 50, ("copy.4", 10): 25, ("fusion.2", 30): 15, ("fusion.2", 90): 10, ("copy.4", 95): 0
  }  # fmt: skip
  assert found["copy.4", 10].scope == ("generate",)  # of the loop it is in
  assert [each.leaf for each in found.values()] == [False, True, True, True, True]


def test_time_is_neither_lost_nor_counted_twice():
  random = np.random.default_rng(0)
  names = ("while.1", "copy.4", "fusion.2", "unknown.3", "call.7")
  for device_ops in (3, 50, 500):
    starts, lengths = random.uniform(0, 1e4, device_ops), random.exponential(300, device_ops)
    ops = [
      op(random.choice(names), a, a + length, random.choice(("CPU:0", "GPU:1")))
      for a, length in zip(starts, lengths)
    ]  # fmt: skip
    found = attribute(ops)
    assert sorted(each.op for each in found) == sorted(ops)
    assert min(each.seconds for each in found) >= 0
    assert sum(each.seconds for each in found) == pytest.approx(profile._busy(found))


def test_an_operation_is_its_role_s_of_the_time_and_of_two_its_scope_s():
  roles = [[Span(0, 10, "attacker generate"), Span(20, 30, "judge")], [Span(5, 30, "update")]]
  ops = [op("ar-start", 1, 3), op("ar-start", 6, 8), op("copy.4", 12, 14), op("ar-start", 40, 50)]
  for threads in (roles, roles[::-1]):
    found = attribute(ops, threads)
    assert [each.role for each in found] == ["attacker generate", "attacker generate", "update", ""]
    assert [each.collective for each in found] == [True, True, False, True]


def test_of_programs_of_one_name_the_one_that_ran_is_read():
  other = HLO.replace("%fusion.2", "%fusion.9").replace("/mlp/", "/attention/")
  ops = [op("fusion.9", 0, 1, program=7), op("fusion.2", 1, 2, program=8), op("fusion.2", 2, 3, module="jit_none")]
  for texts in ((HLO, other), (other, HLO)):
    found = trace.attribute(Trace(ops, [], []), list(map(trace.read_program, texts)))
    assert [each.scope[-1:] for each in found] == [("attention",), ("mlp",), ()]


def written(path, text):
  path.write_bytes(ProfileData.text_proto_to_serialized_xspace(text))
  return path


def metadata(**names):
  return "".join(
    f'{kind} {{ key: {number} value {{ id: {number} name: "{name}" }} }}\n'
    for kind, list_of_names in names.items()
    for number, name in enumerate(list_of_names, 1)
  )


def test_planes_of_a_gpu(tmp_path):
  events = metadata(event_metadata=["ampere_gemm", "MemcpyD2H"], stat_metadata=["hlo_op", "hlo_module", "program_id"])
  path = written(tmp_path / "x.pb", f"""planes {{ name: "/device:GPU:1" {events}
    lines {{ id: 1 name: "Stream #20(Compute)" timestamp_ns: 100 events {{ metadata_id: 1 offset_ps: 1000 duration_ps:
      5000 stats {{ metadata_id: 1 str_value: "while.1::fusion.2" }} stats {{ metadata_id: 2 str_value: "jit_advance" }}
      stats {{ metadata_id: 3 int64_value: 7 }} }} events {{ metadata_id: 2 offset_ps: 9000 duration_ps: 1000 }} }}
    lines {{ id: 2 name: "XLA Ops" events {{ metadata_id: 1 offset_ps: 1000 duration_ps: 5000 }} }} }}""")  # fmt: skip
  assert trace.read(path, WORKS).ops == [
    Op("GPU:1", "jit_advance", 7, "fusion.2", 101, 106),
    Op("GPU:1", "", 0, "MemcpyD2H", 109, 110),
  ]


def test_a_cuda_graph_s_kernels_are_known_by_their_names_or_by_what_came_before_them(tmp_path):
  names = ["fusion_2", "nvjet_sm90_tst_64x32", "read_pages__1", "ncclDevKernel_AllReduce_Sum"]
  events = metadata(event_metadata=names, stat_metadata=["hlo_op", "hlo_module", "program_id"])
  stats = """stats { metadata_id: 1 str_value: "command_buffer_1" } stats { metadata_id: 2 str_value: "jit_advance" }
    stats { metadata_id: 3 int64_value: 7 }"""
  ran = "".join(
    f"events {{ metadata_id: {i} offset_ps: {2000 * i} duration_ps: 1000 {stats} }}" for i in range(1, len(names) + 1)
  )
  path = written(
    tmp_path / "x.pb",
    f"""planes {{ name: "/device:GPU:0" {events} lines {{ id: 1 name: "Stream #14(Compute)" {ran} }} }}""",
  )
  traced = trace.read(path, WORKS)
  assert [op.name for op in traced.ops] == ["fusion_2", names[1], "read_pages", names[3]]
  mlp, attention = ("generate", "decode", "mlp"), ("generate", "decode", "attention")
  found = trace.attribute(traced, [trace.read_program(HLO)])
  assert [each.scope for each in found] == [mlp, mlp, attention, attention]
  assert [each.collective for each in found] == [False, False, False, True]


def test_planes_of_a_tpu(tmp_path):
  events = metadata(event_metadata=["%fusion.2 = f32[2]{0} fusion(%x)", "jit_advance(123)", "%copy.4 = f32[2] copy()"])
  path = written(tmp_path / "x.pb", f"""planes {{ name: "/device:TPU:0" {events}
    lines {{ id: 1 name: "XLA Ops" events {{ metadata_id: 1 offset_ps: 2000 duration_ps: 1000 }}
      events {{ metadata_id: 3 offset_ps: 90000 duration_ps: 1000 }} }}
    lines {{ id: 2 name: "XLA Modules" events {{ metadata_id: 2 offset_ps: 1000 duration_ps: 5000 }} }}
    lines {{ id: 3 name: "Steps" events {{ metadata_id: 2 offset_ps: 1000 duration_ps: 5000 }} }} }}""")  # fmt: skip
  assert trace.read(path, WORKS).ops == [
    Op("TPU:0", "jit_advance", 123, "fusion.2", 2, 3),
    Op("TPU:0", "", 0, "copy.4", 90, 91),  # in no program
  ]


def test_what_goes_on_in_other_threads_ends_when_it_ends(tmp_path):
  events = metadata(
    event_metadata=["copy.4", "end: copy.4"], stat_metadata=["hlo_op", "hlo_module", "program_id", "_p", "_c"]
  )
  path = written(tmp_path / "x.pb", f"""planes {{ name: "/host:CPU" {events}
    lines {{ id: 1 name: "a" events {{ metadata_id: 1 offset_ps: 1000 duration_ps: 2000 stats {{ metadata_id: 1
      str_value: "copy.4" }} stats {{ metadata_id: 2 str_value: "jit_advance" }} stats {{ metadata_id: 3 int64_value: 1
      }} stats {{ metadata_id: 4 int64_value: 77 }} }} }}
    lines {{ id: 2 name: "b" events {{ metadata_id: 2 offset_ps: 9000 duration_ps: 10 stats {{ metadata_id: 5
      int64_value: 77 }} }} }} }}""")  # fmt: skip
  assert trace.read(path, WORKS).ops == [op("copy.4", 1, 9)]


def test_idle_time_and_waiting_for_each_other():
  ops = [op("fusion.2", 0, 40), op("ar-start", 30, 60), op("fusion.2", 0, 20, "CPU:1"), op("copy.4", 200, 300)]
  traced = Trace(ops, [[Span(0, 100, "attacker generate")]], [Span(0, 100, "step")])
  ran = trace.attribute(traced, [trace.read_program(HLO)])
  spent = {"cost/tokens/attacker_generate": 5.0, "cost/flops/attacker_generate": 2e4}
  summary = profile.summarise(traced, ran, Window(3, 4), spent, FACTS)
  assert summary["devices"] == ["CPU:0", "CPU:1"]
  assert summary["busy"] == pytest.approx(80e-9) and summary["idle"] == pytest.approx(0.6)
  assert summary["collectives"]["seconds"] == pytest.approx(30e-9)
  assert summary["collectives"]["exposed"] == pytest.approx(20e-9)
  (role,) = summary["roles"]
  assert role["mfu"] == pytest.approx(2e4 / (100e-9 * 1e12)) and role["tokens_per_second"] == pytest.approx(5e7)
  assert sum(row["share"] for row in summary["scopes"]) == pytest.approx(1)
  (decode,) = summary["decode"]  # ar-start, in draw/head, ran once, on one of the devices
  assert decode["steps"] == 1 and decode["bytes_per_second"] == pytest.approx(1e6 / 60e-9)
  assert "| attacker generate | generate/draw/head |" in profile.as_markdown(summary)


def test_drawing_is_held_against_the_bandwidth_of_one_device():
  ops = [op(name, a, a + 50, f"GPU:{i}") for i in range(4) for name, a in (("fusion.2", 0), ("ar-start", 50))]
  traced = Trace(ops, [[Span(0, 100, "attacker generate")]], [Span(0, 100, "step")])
  facts = Facts(peaks.Peak(1e12, 8e13, "eight chips"), 8, {"attacker generate": 1e6})  # of which four are traced
  summary = profile.summarise(
    traced,
    trace.attribute(traced, [trace.read_program(HLO)]),
    Window(3, 4),
    {"cost/tokens/attacker_generate": 5.0},
    facts,
  )
  (decode,) = summary["decode"]
  assert decode["steps"] == 1 and decode["bytes_per_second"] == pytest.approx(1e13)
  assert decode["of_peak"] == pytest.approx(1.0)


def test_nothing_traced_makes_empty_tables():
  summary = profile.summarise(Trace([], [], []), [], Window(0, 1), {}, FACTS)
  assert summary["idle"] is None and summary["scopes"] == [] and summary["decode"] == []
  assert profile.as_markdown(summary)


def test_a_role_is_not_busy_for_longer_than_it_lasts():
  """A thread may write down late when something ended."""
  op = lambda start, end: trace.Op("CPU:0", "jit_advance", 1, "dot", start, end)
  step, role = trace.Span(0, 10e9, trace.STEP), trace.Span(1e9, 5e9, "attacker generate")
  traced = Trace([op(2e9, 3e9), op(2.5e9, 3e9), op(4e9, 5.5e9)], [[role]], [step])
  summary = profile.summarise(traced, trace.attribute(traced, []), Window(0, 1), {}, FACTS)
  (row,) = summary["roles"]
  assert row["busy"] == pytest.approx(2) and row["idle"] == pytest.approx(0.5)
  assert summary["busy"] == pytest.approx(2.5)


SIZE, PRODUCTS = 512, 64  # so many that the copy before them counts for nothing, whoever shares the machine


def player():
  """A program with scopes, compiled anew. It is gone with what is returned, and its names with it."""

  @jax.named_scope("generate")
  def advance(x, w):
    def body(x, _):
      with jax.named_scope("decode"), jax.named_scope("mlp"):
        return jnp.tanh(x @ w), None

    return jax.lax.scan(body, x, None, length=PRODUCTS)[0]

  return jax.jit(advance)


def play(profiler, ledger, steps):
  advance, x = player(), jnp.ones((SIZE, SIZE))
  for step in steps:
    profiler.at(step)
    with ledger.timed("other"), ledger.timed("attacker generate"):
      jax.block_until_ready(advance(x, x))
    ledger.add("attacker generate", 10, PRODUCTS * 2 * SIZE**3)


def test_a_profile_of_some_steps(tmp_path):
  ledger = Ledger(1)
  with Profiler(tmp_path, Window(1, 3), ledger, FACTS) as profiler:
    play(profiler, ledger, range(5))
  folder = tmp_path / "profile"
  names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
  session = "plugins/profile/steps_1_3/process_0"
  expected = {f"{session}.xplane.pb", f"{session}.trace.json.gz", "memory/process_0.prof", "summary.json", "summary.md"}
  assert {name for name in names if not name.startswith("hlo")} == expected
  assert any(re.fullmatch(r"hlo/process_0/\d+\.jit_advance\.txt", name) for name in names)
  summary = json.loads((folder / "summary.json").read_text())
  assert summary["steps"] == [1, 3]
  role, other = summary["roles"]
  assert (role["role"], other["role"]) == ("attacker generate", "other") and other["seconds"] < role["seconds"]
  assert role["tokens"] == 20 and role["flops"] == 2 * PRODUCTS * 2 * SIZE**3 and 0 < role["busy"] <= role["seconds"]
  scopes = {(row["role"], row["scope"]): row for row in summary["scopes"]}
  assert scopes["attacker generate", "generate/decode/mlp"]["share"] > 0.5
  assert scopes["attacker generate", "generate/decode/mlp"]["calls"] >= 2 * PRODUCTS
  traced = trace.read(folder / f"{session}.xplane.pb", WORKS)
  assert len(traced.steps) == 2


def test_programs_of_the_compilation_cache_have_scopes_too(tmp_path):
  names = ("dir", "min_compile_time_secs", "min_entry_size_bytes")
  settings = ["jax_compilation_cache_dir", *(f"jax_persistent_cache_{name}" for name in names[1:])]
  before = {name: jax.config.values[name] for name in settings}
  try:
    for name, value in zip(settings, (str(tmp_path / "cache"), 0.0, -1)):
      jax.config.update(name, value)
    for number in range(2):
      jax.clear_caches()
      compilation_cache.reset_cache()
      ledger = Ledger(1)
      with Profiler(tmp_path / str(number), Window(0, 2), ledger, FACTS) as profiler:
        play(profiler, ledger, range(3))
      summary = json.loads((tmp_path / str(number) / "profile" / "summary.json").read_text())
      assert any(row["scope"] == "generate/decode/mlp" for row in summary["scopes"])
  finally:
    for name, value in before.items():
      jax.config.update(name, value)


def test_a_run_that_is_stopped_within_the_window_keeps_the_steps_so_far(tmp_path):
  ledger = Ledger(1)
  with pytest.raises(KeyError), Profiler(tmp_path, Window(1, 9), ledger, FACTS) as profiler:
    play(profiler, ledger, range(3))
    raise KeyError
  assert json.loads((tmp_path / "profile/summary.json").read_text())["steps"] == [1, 3]


def test_a_run_that_goes_on_within_the_window_profiles_the_rest_and_one_behind_it_nothing(tmp_path):
  ledger = Ledger(1)
  with Profiler(tmp_path / "within", Window(1, 4), ledger, FACTS) as profiler:
    play(profiler, ledger, range(2, 6))
  assert json.loads((tmp_path / "within/profile/summary.json").read_text())["steps"] == [2, 4]
  for window in (Window(1, 2), None):
    with Profiler(tmp_path / "behind", window, ledger, FACTS) as profiler:
      play(profiler, ledger, range(2, 4))
  assert not (tmp_path / "behind").exists()


def test_the_same_window_again_leaves_one_profile(tmp_path):
  for _ in range(2):
    ledger = Ledger(1)
    with Profiler(tmp_path, Window(0, 1), ledger, FACTS) as profiler:
      play(profiler, ledger, range(2))
  assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1
  assert not list((tmp_path / "profile").glob(".*"))


def test_what_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
  ledger = Ledger(1)
  with Profiler(tmp_path, Window(0, 1), ledger, FACTS) as profiler:
    play(profiler, ledger, range(1))
    (tmp_path / "profile").mkdir(exist_ok=True)
    (tmp_path / "profile" / "plugins").write_text("in the way")
    play(profiler, ledger, range(1, 3))
  assert "could not be written" in caplog.text
  with Profiler(tmp_path / "next", Window(0, 1), ledger, FACTS) as profiler:  # the profiler is free again
    play(profiler, ledger, range(2))
  assert (tmp_path / "next/profile/summary.json").exists()


def test_settings_are_left_as_they_were(tmp_path):
  name = "jax_compilation_cache_include_metadata_in_key"
  jax.config.update(name, False)
  with Profiler(tmp_path, Window(3, 4), Ledger(1), FACTS):
    assert jax.config.values[name]
  assert not jax.config.values[name]


def test_a_profile_is_on_the_page(tmp_path):
  folder = fake_run(tmp_path / "run", 3)
  assert page.profiled({}) is None
  ledger = Ledger(1)
  with Profiler(folder, Window(0, 2), ledger, FACTS) as profiler:
    play(profiler, ledger, range(3))
  text = Parsed(page.render(folder)).text
  assert "Profile of steps 0 to 1" in text
  assert "generate/decode/mlp" in text


def test_a_hostile_summary_is_text_and_a_broken_one_is_nothing(tmp_path):
  folder = fake_run(tmp_path / "run", 3)
  (folder / "profile").mkdir()
  path = folder / "profile" / "summary.json"
  hostile = {"role": HOSTILE, "scope": HOSTILE, "seconds": HOSTILE, "share": [HOSTILE], "bytes_per_second": HOSTILE}
  tables = {name: [hostile, HOSTILE, None, 3] for name in ("roles", "scopes", "decode")}
  report.write_whole(path, [json.dumps({"steps": [0, 1], **tables, "peak": {"source": HOSTILE}, "devices": HOSTILE})])
  parsed = Parsed(page.render(folder))
  assert "Where the time went" in parsed.text
  assert not {"script", "img", "link"} & parsed.tags
  assert not any(name.startswith("on") for name, _ in parsed.attributes)
  for broken in ("", "[]", "{", '{"steps": 3}', '{"steps": ["a", null]}', '{"steps": [1]}', '"x"'):
    path.write_text(broken)
    assert page.profiled(page.read_config(path)) is None


def test_the_peak_of_a_known_chip_is_the_table_s_and_another_s_is_measured(monkeypatch):
  devices = tuple(jax.devices()[:1])
  measured = peaks.of_devices(devices, jnp.float32)
  assert measured.flops > 0 and measured.bandwidth is None and "measured" in measured.source
  assert peaks.of_devices(devices, jnp.float32) is measured  # once
  known = chips.find("NVIDIA H100 80GB HBM3")
  monkeypatch.setattr(chips, "find", lambda kind: known)
  peaks.of_devices.cache_clear()
  assert peaks.of_devices(devices, jnp.float32) == peaks.Peak(known.flops, known.bandwidth, known.name)
  peaks.of_devices.cache_clear()


def test_mfu_is_the_share_of_the_peak():
  before, after = ({}, {})
  for work in WORKS:
    name = work.replace(" ", "_")
    before |= {f"cost/seconds/{name}": 1.0, f"cost/flops/{name}": 5.0}
    after |= {f"cost/seconds/{name}": 3.0, f"cost/flops/{name}": 105.0}
  for name in ("tokens_generated", "tokens_trained"):
    before[f"cost/{name}"], after[f"cost/{name}"] = 0.0, 8.0
  rates = metrics.rates(before, after, peak=500.0)
  assert rates["mfu/generate"] == pytest.approx(200 / 4 / 500) and rates["mfu/update"] == pytest.approx(100 / 2 / 500)
