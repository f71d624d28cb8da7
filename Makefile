# make install | demo | test | slow | lowest | wheel | mutants | sanitize | style | types | docs | clean

VENV := .venv
BIN := $(VENV)/bin
# The first interpreter that runs (a pyenv shim may not), is new enough, and can make an environment (Debian's may not).
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3 python; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)

.PHONY: install demo test slow lowest wheel mutants sanitize style types docs clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt setup.py $(wildcard kernels/cpu/*)
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 with venv found: install one (Debian: also python3-venv)," \
		"or run 'make $(MAKECMDGOALS) PYTHON=/path/to/python3.11'" >&2; exit 1; }
	@echo "installing into $(VENV) with $(PYTHON): some gigabytes, a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

demo: install
	$(BIN)/binaryformer demo --out demo

# Two workers of one thread each: most tests are too small for more.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

slow: install
	$(BIN)/python -m pytest -m slow --timeout 3000

# The lowest versions of what the package needs, in an environment of their own; warnings are those of old versions.
LOWEST := .venv-lowest
lowest:
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[demo,dicom]' -c constraints-lowest.txt \
		pytest pytest-timeout pytest-xdist
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 --dist worksteal -W default tests/test_cli.py tests/test_checkpoints.py \
		tests/modeling/test_networks.py tests/modeling/test_binarize.py tests/pipelines/test_vq_pipelines.py \
		tests/training/test_segmentation.py tests/data/test_shards.py

# The wheel of this platform, by way of the source archive: installed where no compiler is in reach, and tried.
wheel: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --timeout 3000 tests/release

# Plants faults into copies of the package; tests must see every one of them.
mutants: install
	$(BIN)/python tests/mutants.py

# The C++ test of the kernel, built with the compiler's address and undefined-behaviour sanitizers.
sanitize: install
	$(BIN)/python kernels/cpu/sanitize.py

style: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

# The site, in site/; a warning, such as a link that leads nowhere, is an error.
docs: install
	$(BIN)/python scripts/site/draw_figures.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(LOWEST) build dist site *.egg-info
