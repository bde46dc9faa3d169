# Sets up what it needs in .venv, then does the job. `make demo PYTHON=python3.12` chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo experiments test fuzz kill interop lint docs bench clean

# Interrupted, it goes on where it stopped; remove runs/demo and report/demo to begin again.
demo: $(INSTALLED)
	$(BIN)/python meta_train.py --task digits_mlp --out runs/demo --resume
	$(BIN)/python eval.py --task digits_mlp --out report/demo --baseline adamw --baseline muon \
		--optimizer "meta-trained=runs/demo" --optimizer default --optimizer default:total_steps=500

# The quick settings; interrupted, they go on where they stopped. The full ones: docs/curvature.md, docs/inr_editing.md.
experiments: $(INSTALLED)
	$(BIN)/python -m experiments.curvature.train --quick
	$(BIN)/python -m experiments.curvature.report --out runs/curvature-quick
	$(BIN)/python -m experiments.inr_editing --out runs/inr_editing

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist loadscope --durations 15

# Ten thousand damaged files and senseless flags; interrupted, it goes on where it stopped.
fuzz: $(INSTALLED)
	PYTHONPATH=tests:. $(BIN)/python -m fuzz

# A thousand kills of meta-training runs; interrupted, it goes on where it stopped.
kill: $(INSTALLED)
	PYTHONPATH=tests:. $(BIN)/python -m fuzz.kills

# The tests of what stands beside learned_optimization, with the package itself, in an environment of its own. Of its own
# requirements one is on PyPI no more: --no-deps, and the others by name, in setup.cfg.
interop: build/interop/.installed
	build/interop/bin/python -m pytest tests/interop

build/interop/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv build/interop
	build/interop/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	build/interop/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,learned-optimization]'
	build/interop/bin/python -m pip install --quiet --disable-pip-version-check --no-deps learned_optimization==0.0.1
	@touch $@

# mypy is shown the checkout as it is installed, where the folder tasks/ is gmn_lopt.tasks.
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/typed && mkdir -p build/typed/gmn_lopt
	@ln -s $(CURDIR)/gmn_lopt/* $(CURDIR)/tasks build/typed/gmn_lopt
	@ln -s $(addprefix $(CURDIR)/,bench examples experiments tools gmn_commands.py eval.py meta_train.py) build/typed
	cd build/typed && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache
	$(BIN)/python -m pytest tests/test_imports.py

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(INSTALLED)
	$(BIN)/python -m bench.meta_step

clean:
	rm -rf .venv build site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(INSTALLED): setup.cfg pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
		|| { echo "gmn_lopt needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@
