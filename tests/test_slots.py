"""The books of slots and pages: what is taken, by whom, and that nothing is taken twice."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from advgame_jax.slots import Part, Prompt, Shapes

SHAPES = Shapes(group=2, slots=6, page=3, prompt_pages=3, own_pages=4, rows=((1, 8), (1, 16)), packed=True)
event = st.one_of(
  st.tuples(st.just("admit"), st.integers(1, 9)),
  st.tuples(st.just("draw"), st.integers(1, 5)),
  st.tuples(st.just("leave"), st.integers(0, 5)),
  st.tuples(st.just("move"), st.just(0)),
  st.tuples(st.just("gather"), st.just(0)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(event, max_size=60))
def test_no_page_and_no_slot_has_two_owners(events):
  part, number = Part(SHAPES), 0
  for what, value in events:
    room = SHAPES.prompt_pools[-1] - part.prompt_pages.taken >= SHAPES.pages_of(value)
    if what == "admit" and len(part.free) >= SHAPES.group and room:
      part.admit(Prompt(number, [1] * value, limit=12))
      number += 1
    elif what == "draw":
      part.provide(value)
      for row in part.rows.values():
        row.count = min(row.count + value, row.prompt.limit)
    elif what == "leave" and part.rows:
      part.leave(sorted(part.rows)[value % len(part.rows)])
    elif what == "move":
      before = {slot: list(row.pages) for slot, row in part.rows.items()}
      order = part.own_pages.renumber([row.pages for row in part.rows.values()])
      assert all([order[page] for page in row.pages] == before[slot] for slot, row in part.rows.items())

    elif what == "gather":
      before = dict(part.rows)
      slots = part.gather(max(2, len(part.rows)))
      assert [part.rows[new] is before[old] for new, old in enumerate(slots)] == [True] * len(before)

    prompts = part.prompts
    of_prompts, own = (
      [page for pages in lists for page in pages]
      for lists in ([p.pages for p in prompts], [row.pages for row in part.rows.values()])
    )
    for pages, book, sizes in (
      (of_prompts, part.prompt_pages, SHAPES.prompt_pools),
      (own, part.own_pages, SHAPES.own_pools),
    ):
      assert len(set(pages)) == len(pages) == book.taken and max(pages, default=0) < sizes[-1]
    assert sorted([*part.free, *part.rows]) == list(range(part.slots))
    assert all(len(row.pages) >= SHAPES.pages_of(row.count) for row in part.rows.values())

    index = part.own_index(SHAPES.own_pools[-1], before=5)
    for slot, row in part.rows.items():
      assert index.entry_RJ[slot, : len(row.pages)].tolist() == row.pages
      assert (index.reader_PG[row.pages, 0] == slot).all()
      first = 5 + len(row.prompt.ids)
      assert index.start_P[row.pages].tolist() == [first + 3 * j for j in range(len(row.pages))]
    assert np.flatnonzero(index.start_P < index.end_P).tolist() == sorted(own)  # what nobody has is not read
    index = part.prompt_index(SHAPES.prompt_pools[-1], before=5)
    assert set(np.flatnonzero(index.start_P < index.end_P)) <= set(of_prompts)
    for slot, row in part.rows.items():
      entries = index.entry_RJ[slot][index.entry_RJ[slot] >= 0]
      assert (entries // 2).tolist() == row.prompt.pages
      assert (index.reader_PG.reshape(-1)[entries] == slot).all()
      assert (index.end_P[row.prompt.pages] == 5 + len(row.prompt.ids)).all()


def test_prompts_are_packed_in_order_and_into_the_least_shape():
  assert SHAPES.pack([5, 4, 3], (2, 8)) == [(0, 0), (1, 0), (0, 5)]
  assert SHAPES.pack([5, 4], (1, 8)) == [(0, 0)] and SHAPES.fits([8, 8]) and not SHAPES.fits([9, 8])
  assert SHAPES.fitting([[5, 3], [1]]) == (1, 8) and SHAPES.fitting([[5, 3], [9]]) == (1, 16)
  apart = SHAPES.__class__(**{**SHAPES.__dict__, "packed": False, "rows": ((3, 4), (1, 8))})
  assert apart.pack([4, 2, 1], (3, 4)) == [(0, 0), (1, 0), (2, 0)]
  assert apart.fitting([[2, 2]]) == (3, 4) and not apart.fits([5, 2])


def test_blank_indices_are_read_by_nobody():
  index = Part(SHAPES).prompt_index(9, before=0)
  assert (index.entry_RJ == -1).all() and index.reader_PG.shape == (9, 2) and np.all(index.end_P == 0)
