# Sets up what it needs in .venv, then does the job. `make demo PYTHON=python3.12` chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint docs bench clean

# Interrupted, it goes on where it stopped; remove runs/demo and report/demo to begin again.
demo: $(INSTALLED)
	$(BIN)/python meta_train.py --preset paper --task digits_mlp --optimizer ds+gmn --out runs/demo --resume \
		--gmn.width 16 --gmn.set-layers 1 --gmn.product-width 16 \
		--initial-alpha 2 --initial-beta 2e-4 --checkpoint-every 50 \
		--stages truncated:400:3e-3:K=25:n=8:schedule=cosine,pes:60:1e-4:K=25:n=8
	$(BIN)/python eval.py --task digits_mlp --out report/demo --smoothing 10 \
		--optimizer "untrained=runs/demo/stages/0-start" \
		--optimizer "after truncated=runs/demo/stages/1-truncated" \
		--optimizer "after PES=runs/demo" \
		--optimizer default --optimizer default-pointwise

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist loadscope --durations 15

# mypy is shown the checkout as it is installed, where the folder tasks/ is gmn_lopt.tasks.
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/typed && mkdir -p build/typed/gmn_lopt
	@ln -s $(CURDIR)/gmn_lopt/* $(CURDIR)/tasks build/typed/gmn_lopt
	@ln -s $(addprefix $(CURDIR)/,bench examples tools eval.py meta_train.py) build/typed
	cd build/typed && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache
	$(BIN)/python -m pytest tests/test_imports.py

docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict --quiet

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
