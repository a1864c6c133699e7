PYTHON ?= python3
BIN := .venv/bin
OUT ?= out/infilling
# On two shared cores one thread a process is steadier than two.
export OMP_NUM_THREADS ?= 1
# Modules are compiled once, not by every process that starts.
export PYTHONDONTWRITEBYTECODE :=

INSTALLED := .venv/.installed

.PHONY: .venv algorithms demo diffusion docs docs-links screenshots paper paper-pretrained smollm2 test test-pretrained test-slow tutorials uncertainty lint format bench bench-pretrained peers build clean

.venv: $(INSTALLED)

# A file of its own, written last: an installation that was cut off is done again.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,dev,docs]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/lmppl compare infilling --out $(OUT)

test: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist worksteal -q

test-slow: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist worksteal -q -m 'slow and not pretrained'

# Executes the tutorials whose code has changed, or these: make tutorials TUTORIALS="first_model trust"
TUTORIALS ?=
tutorials: $(INSTALLED)
	$(BIN)/python docs/execute.py $(TUTORIALS)

# A pretrained language model, fetched and converted once; prints where it is.
smollm2: $(INSTALLED)
	@$(BIN)/python -m lmppl.pretrained smollm2

# On the checkpoint of $LMPPL_SMOLLM2, else on the one that `make smollm2` makes.
test-pretrained: $(INSTALLED)
	@set -e; path=$$LMPPL_SMOLLM2; \
	test -n "$$path" || path=$$($(BIN)/python -m lmppl.pretrained smollm2); \
	test -f "$$path/config.json" || { echo "LMPPL_SMOLLM2=$$path: there is no checkpoint" >&2; exit 1; }; \
	LMPPL_SMOLLM2=$$path $(BIN)/pytest -q -m pretrained

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

algorithms: $(INSTALLED)
	$(BIN)/python -m benchmarks.algorithms

paper: $(INSTALLED)
	$(BIN)/python -m benchmarks.paper

diffusion: $(INSTALLED)
	$(BIN)/python -m benchmarks.diffusion

uncertainty: $(INSTALLED)
	$(BIN)/python -m benchmarks.uncertainty

# On the checkpoint of $LMPPL_SMOLLM2, else on the one that `make smollm2` makes, and the data in DATA; core-hours, and it
# goes on where it stopped. Some of it, or elsewhere: make paper-pretrained OPTIONS="--only random_number --device cuda"
DATA ?= ../shared/data
OPTIONS ?=
paper-pretrained: $(INSTALLED)
	@path=$$LMPPL_SMOLLM2; \
	test -n "$$path" || path=$$($(BIN)/python -m lmppl.pretrained smollm2) || exit 1; \
	$(BIN)/python -m benchmarks.paper_pretrained --lm "$$path" --data "$(DATA)" $(OPTIONS)

# All of them run, whatever one of them misses; then it is said which did, and make fails. The peers, which another
# machine may not have, fail nothing.
bench: $(INSTALLED)
	@mkdir -p out; missed=; for name in sampling passes step default_step scaling peers; do \
		echo "== $$name"; \
		$(BIN)/python -m benchmarks.$$name --out out/$$name.json || missed="$$missed $$name"; \
	done; \
	echo "== missed their aims or broke off:$${missed:- none}"; \
	test -z "$${missed% peers}"

# The same on the checkpoint of $LMPPL_SMOLLM2, else on the one that `make smollm2` makes; some 25 minutes on an idle core.
# One alone, or two: make bench-pretrained PRETRAINED="step passes".
PRETRAINED ?= sampling passes step default_step scaling peers
bench-pretrained: $(INSTALLED)
	@mkdir -p out/pretrained; path=$$LMPPL_SMOLLM2; \
	test -n "$$path" || path=$$($(BIN)/python -m lmppl.pretrained smollm2) || exit 1; \
	missed=; for name in $(PRETRAINED); do \
		echo "== $$name"; \
		$(BIN)/python -m benchmarks.$$name --checkpoint "$$path" --out out/pretrained/$$name.json || missed="$$missed $$name"; \
	done; \
	echo "== missed their goals or broke off:$${missed:- none}"; \
	test -z "$${missed% peers}"

# The site, into out/docs; every warning fails, a link between pages that leads nowhere too.
docs: $(INSTALLED)
	$(BIN)/sphinx-build --fresh-env --fail-on-warning --keep-going --quiet docs out/docs

# The links that leave the site; needs a network.
docs-links: $(INSTALLED)
	$(BIN)/sphinx-build --quiet -b linkcheck docs out/docs-links

screenshots: $(INSTALLED)
	$(BIN)/python docs/screenshots.py

peers: $(INSTALLED)
	mkdir -p out
	$(BIN)/python -m benchmarks.peers --out out/peers.json

build: $(INSTALLED)
	rm -rf build dist
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf .venv .venv-peers .venv-trl build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
