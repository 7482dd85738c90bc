# `make help` lists what there is. Everything is installed into .venv/ inside this clone and nowhere else.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
PYTHON ?=
# Where a CPU build of torch is: an index, or a folder or page of wheels. Read where there is no GPU.
TORCH_INDEX ?=
ARGS ?=
NAMES ?=
READERS ?= 4.46.3 4.51.3 4.57.3
SERVERS ?= vllm sglang
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$(( n > 8 ? 8 : n )))

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# One thread a process: on a small machine several threads in each of several processes wait for each other and a test
# that takes 40 ms takes seconds. No hub: a test that needs the network would fail elsewhere, so it should fail here.
# Modules stay compiled, also where the environment says otherwise, as in many containers: hundreds of processes import.
TEST_ENV := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
# A test that hangs fails and is named, and the others go on. Not by faulthandler's timer: a fork inherits it as set, without
# the thread that would put it down, and a rank that sets its own then waits for ever.
LIMITS := --timeout=900

# On Linux PyPI's torch is the CUDA build, gigabytes that a machine without a GPU has no use for. The CPU build has the
# same version with a local suffix, which pip prefers and the step after this one keeps. uv knows where that build is;
# without uv, TORCH_INDEX says it. Where neither is within reach, as behind a mirror, PyPI's build is taken and works.
define CPU_TORCH
if command -v nvidia-smi >/dev/null || "$(BIN)/python" -c 'import torch' 2>/dev/null; then \
  true; \
elif [ -n "$(TORCH_INDEX)" ]; then \
  if [ -d "$(TORCH_INDEX)" ] || [[ "$(TORCH_INDEX)" == *.html ]]; then from=--find-links; else from=--extra-index-url; fi; \
  "$(BIN)/python" -m pip install --disable-pip-version-check -c constraints.txt "$$from" "$(TORCH_INDEX)" torch; \
elif command -v uv >/dev/null && \
  uv pip install --python "$(BIN)/python" --torch-backend cpu -c constraints.txt torch; then \
  true; \
else \
  echo "No GPU here, and no CPU build of torch was found: PyPI's build follows, which may be gigabytes of CUDA." >&2; \
  echo "To avoid that, install uv, or name an index of CPU builds: make setup TORCH_INDEX=URL" >&2; \
fi
endef

.PHONY: help setup demo test soak papermill browser playwright notebooks site readers servers integrations lint flash flash4 clean distclean

help:  ## Show this list
	@awk -F':.*## ' '/^[a-z0-9]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "  Options: PYTHON=/path/to/python3.12  TORCH_INDEX=URL_OF_CPU_BUILDS  JOBS=2  NAMES='01_rope_frequencies'  ARGS='--seed 1'"

setup: $(STAMP)  ## Create .venv/ and install everything (again only when pyproject.toml or constraints.txt changes)

$(STAMP): pyproject.toml constraints.txt
	@if ! "$(BIN)/python" -c '' 2>/dev/null; then \
	  found=""; \
	  for candidate in $(if $(PYTHON),"$(PYTHON)",python3 python3.12 python3.11); do \
	    if "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then \
	      found="$$candidate"; break; \
	    fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "Python 3.11 or 3.12 is needed; tried: $(or $(PYTHON),python3 python3.12 python3.11)." >&2; \
	    echo "Install one, or name it: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3.12" >&2; \
	    exit 1; \
	  fi; \
	  echo "Creating $(VENV) with $$("$$found" --version)"; \
	  "$$found" -m venv --clear "$(VENV)"; \
	fi
	@$(CPU_TORCH)
	"$(BIN)/python" -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch "$@"
	@echo "Installed into $(VENV)/. Next: make demo, or the course: source $(BIN)/activate && ultralong course start ~/ultralong-course"

demo: setup  ## Run the whole recipe in miniature; the result is runs/demo/report.html
	"$(BIN)/ultralong" demo $(ARGS)

test: setup lint  ## Lint, then run the tests and one notebook; soak and papermill run the others
	$(TEST_ENV) "$(BIN)/python" -m pytest $(LIMITS) -n $(JOBS) --dist worksteal -m "not soak and not browser and (canary or not notebooks)" $(ARGS)

soak: setup  ## Run the tests that repeat others for longer: runs killed again and again, more shapes, more processes
	$(TEST_ENV) "$(BIN)/python" -m pytest -n $(JOBS) --dist worksteal -m soak $(ARGS)

papermill: setup  ## Execute every notebook as a test: its checks, its bounds, its rules; nothing is written
	$(TEST_ENV) "$(BIN)/python" -m pytest $(LIMITS) -n $(JOBS) --dist worksteal -m notebooks $(ARGS)

browser: playwright  ## Open the course in a browser: JupyterLab, and the site; pictures in build/browser/
	$(TEST_ENV) "$(BIN)/python" -m pytest $(LIMITS) -n 0 tests/course/test_browser.py -m browser $(ARGS)

# Chromium of this machine, where CHROMIUM names it or the path has it; otherwise playwright downloads its own once.
playwright: setup
	"$(BIN)/python" -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[browser]'
	[ -n "$${CHROMIUM:-}" ] || command -v chromium >/dev/null || "$(BIN)/python" -m playwright install --with-deps chromium

notebooks: setup  ## Execute notebooks/*.py and write the .ipynb beside each (NAMES= for some of them)
	$(TEST_ENV) "$(BIN)/python" -m ultralong.notebook_tools run $(NAMES)

site: setup  ## Build the course's pages and the reference in build/site (REPOSITORY=URL of a public copy: Colab, Binder)
	"$(BIN)/ultralong" course site build/site $(if $(REPOSITORY),--repository "$(REPOSITORY)" --revision "$(or $(REVISION),main)")

# Interpreters that read what this version writes as earlier releases of transformers do; torch is shared with $(VENV).
readers: setup  ## Make build/readers/: transformers 4.46, 4.51 and 4.57 for tests/checkpoints/test_readers.py
	for version in $(READERS); do \
	  place="build/readers/$$version"; \
	  "$(BIN)/python" -m venv --clear "$$place"; \
	  "$$place/bin/python" -m pip install --quiet --disable-pip-version-check "transformers==$$version"; \
	  "$(BIN)/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    > "$$("$$place/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"; \
	done

# Gigabytes each, with a torch of their own, and no GPU: only their reading of a config and their rotary table are asked.
# Without a GPU, SGLang's imports a module of vLLM, which needs nothing more.
servers: readers  ## Make build/servers/: vLLM and SGLang, and the whole table of readers, build/readers.json
	for server in $(SERVERS); do \
	  "$(BIN)/python" -m venv --clear "build/servers/$$server"; \
	  "build/servers/$$server/bin/python" -m pip install --quiet --no-cache-dir --disable-pip-version-check "$$server"; \
	done
	if [ -d build/servers/sglang ]; then \
	  build/servers/sglang/bin/python -m pip install --quiet --no-cache-dir --no-deps --disable-pip-version-check vllm; \
	fi
	$(TEST_ENV) "$(BIN)/ultralong" bench readers --pythons build/readers/*/bin/python --json build/readers.json \
	  $(foreach server,$(SERVERS),--$(server) build/servers/$(server)/bin/python)

# Other projects' own packages say what they read of ours, in an environment of their own: they ask for other versions of
# what $(VENV) has. The tests are those that are skipped without them; Slurm's need slurm-wlm, munge and root.
integrations: setup  ## Manifests, trackers and the job by SkyPilot's, Kubeflow's, W&B's, TensorBoard's and Slurm's own code
	"$(BIN)/python" -m venv --clear build/integrations
	build/integrations/bin/python -m pip install --quiet --disable-pip-version-check kubeflow-trainer-api skypilot tensorboard wandb
	"$(BIN)/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(build/integrations/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
	$(TEST_ENV) PYTHONPATH="$(CURDIR)" build/integrations/bin/python -m pytest $(LIMITS) -n 0 -rs \
	  tests/launch/test_manifests.py tests/launch/test_slurm.py tests/training/test_watch.py -k "not hang and not slow_rank"

lint: setup  ## Check style, formatting, types and shell scripts
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check --quiet ultralong tests
	"$(BIN)/mypy"
	"$(BIN)/shellcheck" .ci/run

flash4: setup  ## Install flash-attn 4 (Hopper, Blackwell): a wheel, nothing is built
	"$(BIN)/python" -m pip install -c constraints.txt "$$(sed -n 's/^#\(flash-attn-4==\)/\1/p' constraints.txt)"

# It imports torch while it builds, so torch has to be installed first and isolation has to be off; nvcc has to be of the
# CUDA version that torch was built with. A build takes long and much memory: MAX_JOBS limits both.
flash: setup  ## Build flash-attn 2 from source against the installed torch (needs nvcc)
	@"$(BIN)/python" -c 'import sys, torch; sys.exit(0 if torch.version.cuda else "The installed torch is a CPU build; flash-attn needs the CUDA build.")'
	@command -v nvcc >/dev/null || { echo "nvcc was not found. Install the CUDA toolkit of the version that torch.version.cuda prints." >&2; exit 1; }
	"$(BIN)/python" -m pip install ninja packaging psutil setuptools wheel
	MAX_JOBS="$${MAX_JOBS:-4}" "$(BIN)/python" -m pip install --no-build-isolation \
	  "$$(sed -n 's/^#\(flash-attn==\)/\1/p' constraints.txt)"

clean:  ## Remove caches and build products; runs/ and .venv/ stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find ultralong tests notebooks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## Remove .venv/ too
	rm -rf "$(VENV)"
