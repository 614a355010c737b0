# The front door. `make help` says what each target is for; `make demo` and `make test` need nothing before them.

PROGRAMS := .venv/bin
JOBS ?= $(shell nproc)
AS_ROOT := $(if $(filter 0,$(shell id -u)),,sudo --preserve-env=CI,KEEP,SEED,PYTHONPYCACHEPREFIX)
MODULES := $(wildcard qcowfs/_*.pyx)
COMPILED_FROM := $(MODULES) $(wildcard qcowfs/*.pxd qcowfs/clib/*.pxd)
PYTHON_CODE := qcowfs tests demo bench tools

# What Cython makes is free of these warnings, so one of them is a mistake in a .pyx; in CI it is an error.
WARNINGS := -Wall -Wextra -Wconversion -Wsign-compare $(if $(CI),-Werror)
# setuptools says "experimental" of [tool.setuptools.ext-modules] at every call.
export PYTHONWARNINGS = ignore::UserWarning:setuptools.config.pyprojecttoml
# The tests start some thousand commands, and each of them would compile its 60 modules in 0.1 s: compiled code is kept,
# but not beside the source. Whatever the environment says.
export PYTHONDONTWRITEBYTECODE =
export PYTHONPYCACHEPREFIX = $(CURDIR)/build/bytecode

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# What a target needs is made in the order in which it stands there: without the packages nothing can be compiled. The
# steps themselves use all processors.
.NOTPARALLEL:

.PHONY: help
help:  ## say what each target is for
	@printf 'qcowfs: every snapshot in a qcow2 disk image, side by side and read-only: the disks, and the files inside\n\n'
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: setup-test  ## install what any target needs and this machine lacks, from Debian (as root, or with sudo)

SETUPS := setup-build setup-demo setup-test setup-bench
.PHONY: $(SETUPS)
$(SETUPS): setup-%:
	@tools/setup $*

.venv/complete: pyproject.toml tools/venv
	@CFLAGS="$(WARNINGS) $(CFLAGS)" tools/venv

.PHONY: build
build: setup-build .venv/complete build/compiled  ## compile the Cython modules in place, those that changed

# Not cythonize: each of its processes reads pyproject.toml, builds all modules, and now and then copies one while another
# process does.
build/compiled: $(COMPILED_FROM) .venv/complete
	@mkdir -p build
	@CFLAGS="$(WARNINGS) $(CFLAGS)" DIST_EXTRA_CONFIG=$(CURDIR)/.venv/build.cfg $(PROGRAMS)/python \
		-c 'from setuptools import setup; setup()' --quiet build_ext --inplace --parallel $(JOBS)
	@touch $@

.PHONY: demo
demo: setup-demo build vm  ## the whole story on a real virtual machine, in about a minute; KEEP=1 leaves it mounted
	@PATH="$(CURDIR)/$(PROGRAMS):$$PATH" $(PROGRAMS)/python -m demo.story $(if $(KEEP),--keep)

.PHONY: test
test: setup-test build vm  ## every test: units, against QEMU, hostile images, real mounts, a real virtual machine
	$(AS_ROOT) $(PROGRAMS)/python -m pytest -n $(JOBS) --dist loadgroup $(TESTS)

.PHONY: quick
quick: setup-test build  ## the tests that take seconds and need no root
	$(PROGRAMS)/python -m pytest -n $(JOBS) -m "not slow" tests/unit tests/meta $(TESTS)

.PHONY: vm
vm: setup-demo .venv/complete  ## get the kernel that the tests' virtual machine boots (30 MB, once)
	@$(PROGRAMS)/python -m tests.support.bootimage

.PHONY: lint
lint: setup-test build types  ## style, formatting and types of Python and Cython, and the man pages' syntax
	$(PROGRAMS)/ruff check $(PYTHON_CODE)
	$(PROGRAMS)/ruff format --check $(PYTHON_CODE)
	PATH="$(CURDIR)/$(PROGRAMS):$$PATH" $(PROGRAMS)/cython-lint qcowfs  # it runs pycodestyle by name
	mandoc -T lint -W warning man/*.[178]

.PHONY: types
types: build  ## check the types alone
	$(PROGRAMS)/mypy

.PHONY: format
format: .venv/complete  ## put the Python code into the form that `make lint` wants
	$(PROGRAMS)/ruff check --fix $(PYTHON_CODE)
	$(PROGRAMS)/ruff format $(PYTHON_CODE)

.PHONY: annotate
annotate: setup-build .venv/complete  ## build/annotate/*.html: which lines of Cython call into Python, and are slow for it
	@tools/annotate

.PHONY: coverage
coverage: setup-test build vm  ## which lines the tests reach, in Python and in Cython (build/coverage/html)
	@$(AS_ROOT) tools/coverage $(TESTS)

.PHONY: sanitize
sanitize: setup-test build  ## the tests of our own threads under ThreadSanitizer, in a quarter of an hour
	@$(AS_ROOT) tools/sanitize $(TESTS)

.PHONY: bench
bench: setup-bench build  ## figures against other programs that show an image, as Markdown; BENCH='--help' says what can be chosen
	@$(AS_ROOT) $(PROGRAMS)/python -m bench $(BENCH)

.PHONY: man
man:  ## read the man pages without installing them
	@for page in man/*.[178]; do man -l "$$page"; done

.PHONY: completion
completion: build  ## write completion/, for bash, zsh and fish, from the command line's own parser
	@$(PROGRAMS)/python tools/completion.py

.PHONY: clean
clean:  ## remove everything that make made, but for what `make setup` installed
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	rm -f $(MODULES:.pyx=.c) qcowfs/_*.so
	find qcowfs tests demo bench -name __pycache__ -prune -exec rm -rf {} +
