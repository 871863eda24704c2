# Thin: every line is a command you can run yourself in an activated environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORES ?= 8

.PHONY: summary status test regression baseline lint bench lock clean
.DELETE_ON_ERROR:

summary: $(VENV)/installed
	$(BIN)/snakemake --cores $(CORES) --keep-going reports/summary.md

status: $(VENV)/installed
	$(BIN)/python -m reports.status results/default

# As many processes as cores, four at most (each has torch in memory); a file's tests in one, in the order of tests/conftest.py.
test: $(VENV)/installed
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

regression: $(VENV)/installed
	$(BIN)/snakemake --cores $(CORES) --configfile workflow/config/smoke.yaml -- regression

# After a change of numbers that is meant: look at what it prints, and commit the file with the reason.
baseline: $(VENV)/installed
	$(BIN)/python -m reports.regression tests/baselines/smoke.csv results/smoke --update

lint: $(VENV)/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow/rules

bench: $(VENV)/installed
	$(BIN)/snakemake -q --cores $(CORES) -- resources/models/smollm2-135m $(foreach t,calibration training tuning squad,resources/tokens/smollm2-135m/$(t).safetensors) $(foreach t,hellaswag arc_easy arc_challenge piqa winogrande boolq mmlu,resources/tasks/embedded/$(t))
	for file in $(filter-out %/rates.py %/table.py,$(wildcard tests/bench/[a-z]*.py)); do echo "== $$file"; $(BIN)/python -m tests.bench.$$(basename $$file .py) || exit 1; done
	$(BIN)/python -m tests.bench.table

# The stamp is written last, so an interrupted installation is repeated.
$(VENV)/installed: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.11")'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "venv is missing: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing from requirements.lock (about 1 GB, a few minutes; torch takes the longest)"
	$(BIN)/python -m pip install --progress-bar on --disable-pip-version-check -q -r requirements.lock
	touch $@

lock:
	rm -rf $(VENV).lock && $(PYTHON) -m venv $(VENV).lock
	$(VENV).lock/bin/python -m pip install -q torch==2.13.0 && $(VENV).lock/bin/python -m pip install -q '.[dev]'
	{ sed -n '/^#/p' requirements.lock; $(VENV).lock/bin/python -m pip freeze --exclude ptqat | sed 's/+cpu$$//'; } > requirements.lock.new
	mv requirements.lock.new requirements.lock && rm -rf $(VENV).lock build # what pip leaves of building '.'

clean:
	rm -rf results resources logs reports/summary reports/summary.* reports/regression.md .snakemake
