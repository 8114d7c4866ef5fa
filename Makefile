# `make quickstart` and `make test` set up their own environment in .venv; nothing else is needed but Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
WORLD ?= runs/world
SEED ?= 0
LOSS ?= dpo
RUN ?= runs/microworld

.PHONY: quickstart results test lint world clean

# The microworld from nothing: base players, the game, a report.
quickstart: world
	$(BIN)/python launch/run.py --config=configs/microworld.py:$(LOSS),$(WORLD) --workdir=$(RUN) \
		--config.seed=$(SEED)
	@echo "The report: $(RUN)/report.html"

world: $(WORLD)/attacker_base/config.json $(WORLD)/defender_base/config.json

$(WORLD)/defender/config.json: | .venv/.installed
	$(BIN)/python launch/microworld.py --out=$(WORLD) --seed=$(SEED)

# A supervised warm start on a stated mixture of behaviours: see advgame_jax/worldfiles.py.
$(WORLD)/%_base/config.json: $(WORLD)/defender/config.json
	$(BIN)/python launch/warmstart.py --model=$(WORLD)/$* --examples=$(WORLD)/$*.jsonl --out=$(WORLD)/$*_base \
		--steps=700 --batch=$(if $(filter attacker,$*),64,128) --row_tokens=64 \
		--learning_rate=$(if $(filter attacker,$*),1e-2,5e-3) --seed=$(SEED)

# The README's results: three losses, three seeds.
results: .venv/.installed
	$(BIN)/python benchmarks/microworld.py

test: .venv/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.installed: pyproject.toml setup.cfg
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

clean:
	rm -rf .venv runs build
