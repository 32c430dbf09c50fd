# make env    the environment, .venv: made once, brought up to date when pyproject.toml changes
# make demo   the demonstration
# make test   format, lint, types, import rules and the tests
# make test-models  equal answers with every kind of model: docs/models.md
# make test-versions  a smoke test on every vLLM that is claimed, each in an environment of its own
# make docs   the documentation's site, in out/site
# make clean  removes what was built, but not .venv

PYTHON ?= python3
BIN := .venv/bin

.PHONY: env demo test test-models test-versions lint docs clean

env: .venv/.stamp

.venv/.stamp: pyproject.toml scripts/make_env.py
	@$(PYTHON) scripts/make_env.py

demo: env
	$(BIN)/ragkv demo

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p ragkv
	$(BIN)/lint-imports

test: env lint
	$(BIN)/python -m pytest -m "not engine and not rig and not models" -n 2
	$(BIN)/python -m pytest -m engine
	$(BIN)/python -m pytest tests/rig -n 2 --dist loadscope
	$(BIN)/python -m pytest tests/models -k "gemma-3 and not gemma-3n or lfm-2-without"

test-models: env
	$(BIN)/python -m pytest tests/models

test-versions: env
	$(BIN)/python scripts/test_versions.py

docs: env
	$(BIN)/python scripts/make_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf build dist out src/ragkv.egg-info
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name .git -prune -o -type d -name __pycache__ -exec rm -rf {} +
