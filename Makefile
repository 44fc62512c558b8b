# `make help` lists the targets. Works with GNU Make 3.81 (macOS) and newer.
#
#   PYTHON          the Python to build .venv with, 3.11 or newer; found by itself if not given
#   TORCH_INDEX     one more package index to look for PyTorch in, e.g. one with CPU or CUDA builds
#   LAB_ARGS        options for JupyterLab, e.g. --no-browser
#   PYTEST_ARGS     options for pytest, e.g. -x
#   BENCHMARK_ARGS  options for a benchmark, e.g. --n=100
#   VLMKIT_REPOSITORY  owner/name on GitHub, for the site's links to Colab and Binder

LAB_ARGS ?=
PYTEST_ARGS ?=
BENCHMARK_ARGS ?=

python := .venv/bin/python
# Tests use no hub, and no variables that a reader's shell may have set.
quietly := env -u VLMKIT_MODEL -u VLMKIT_STUDENT -u VLMKIT_SCORES -u MPLBACKEND HF_HUB_OFFLINE=1
pytest := $(quietly) $(python) -m pytest $(PYTEST_ARGS)
# A notebook runs in the kernel of this environment, and must print the outputs that it stores.
nbval := --nbval --nbval-current-env --nbval-cell-timeout=1800 notebooks
# Jupyter refuses to run as root, the usual user of a container, unless it is told to.
as_root := $(if $(filter 0,$(shell id -u)),--allow-root)

.DEFAULT_GOAL := help
.PHONY: help setup lab site times browser test test-all test-oldest test-newest lint format benchmark-pebble benchmark-cobble benchmark-recipe benchmark-connectors benchmark-loading benchmark-memory benchmark-sensitivity benchmark-damage benchmark-budgets benchmark-finetuning benchmark-lora-on-vqa benchmark-stages benchmark-gpu benchmark-several-gpus benchmark-class benchmark-skip-lists benchmark-quantizers solutions assignments slides releases clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | awk -F'|' '{printf "make %-22s %s\n", $$1, $$2}'

setup: ## create .venv and install into it; every target below begins with this
	@sh scripts/set_up.sh

lab: setup ## show the first result in the terminal, then open the course in JupyterLab
	$(python) -m vlmkit
	$(python) -m jupyterlab --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb \
	  $(as_root) $(LAB_ARGS)

site: setup ## build the course as a site into build/site, from the committed notebooks
	$(quietly) $(python) -m sphinx -c docs -d build/doctrees -E -W --keep-going -q -j auto . build/site
	@echo "The site is in build/site; its first page is build/site/index.html"

times: setup ## record how long Run All takes in each chapter; about fifteen minutes
	$(quietly) $(python) scripts/times.py

browser: setup ## install what the tests in a browser need, and Chromium if none is found
	$(python) -m pip install -q -c constraints.txt -e '.[browser]'
	-$(python) scripts/chromium.py --install

test: lint ## check style, run the tests, run the chapters and compare their outputs
	@$(quietly) $(python) scripts/run_tests.py $(PYTEST_ARGS)

test-all: lint browser ## the same with the slow tests, all chapters and the solutions
	$(pytest)
	$(pytest) $(nbval)

test-oldest: setup ## run the tests that depend on other packages with their oldest versions
	@TORCH_INDEX="$(TORCH_INDEX)" PYTEST_ARGS="$(PYTEST_ARGS)" sh scripts/test_versions.sh oldest

test-newest: setup ## the same with the newest versions
	@TORCH_INDEX="$(TORCH_INDEX)" PYTEST_ARGS="$(PYTEST_ARGS)" sh scripts/test_versions.sh newest

lint: setup ## check the style of code and notebooks, and print how long each chapter is
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	@$(python) scripts/style_report.py

format: setup ## change code and notebooks to that style
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

benchmark-pebble: setup ## measure the bundled model on questions that it has never seen
	$(quietly) $(python) benchmarks/pebble.py $(BENCHMARK_ARGS)

benchmark-cobble: setup ## measure cobble on photographs, handwriting, easy-VQA and drawings
	$(quietly) $(python) benchmarks/cobble.py $(BENCHMARK_ARGS)

benchmark-recipe: setup ## show the recorded grid of cobble's projectors; with a folder, train them
	$(quietly) $(python) benchmarks/recipe.py $(BENCHMARK_ARGS)

benchmark-connectors: setup ## train chapter 02's connectors for longer, and record their accuracy
	$(quietly) $(python) benchmarks/connectors.py $(BENCHMARK_ARGS)

benchmark-loading: setup ## time loading, and its memory, against transformers' own call
	$(quietly) $(python) benchmarks/loading.py $(BENCHMARK_ARGS)

benchmark-memory: setup ## compare predictions of memory, ours and others', with measured bytes
	$(quietly) $(python) benchmarks/memory.py $(BENCHMARK_ARGS)

benchmark-sensitivity: setup ## time a sweep of formats and scopes against a plain loop
	$(quietly) $(python) benchmarks/sensitivity.py $(BENCHMARK_ARGS)

benchmark-damage: setup ## record for chapter 05 what pebble, or cobble, loses in many formats
	$(quietly) $(python) benchmarks/damage.py $(BENCHMARK_ARGS)

benchmark-budgets: setup ## record for chapter 07 what layers lose, and planned and uniform formats
	$(quietly) $(python) benchmarks/budgets.py $(BENCHMARK_ARGS)

benchmark-lora-on-vqa: setup ## record for chapter 08 which component has to learn easy-VQA
	$(quietly) $(python) benchmarks/lora_on_vqa.py $(BENCHMARK_ARGS)

benchmark-stages: setup ## train chapter 10's recipes, each with a stage left out or changed
	$(quietly) $(python) benchmarks/stages.py $(BENCHMARK_ARGS)

benchmark-gpu: setup ## compare predictions with an NVIDIA GPU at full size; minutes, 25 GB of disk
	$(quietly) $(python) benchmarks/gpu.py $(BENCHMARK_ARGS)

benchmark-several-gpus: setup ## the same training on one GPU, on two, and split between two
	$(quietly) $(python) benchmarks/several_gpus.py $(BENCHMARK_ARGS)

benchmark-skip-lists: setup ## record what published skip lists protect in the catalog's models
	$(quietly) $(python) benchmarks/skip_lists.py $(BENCHMARK_ARGS)

benchmark-quantizers: setup ## record what tools say about checkpoints of eight quantizers, and the truth
	$(quietly) $(python) benchmarks/quantizers.py $(BENCHMARK_ARGS)

benchmark-finetuning: setup ## training steps per second, of a bare loop and an untuned Trainer too
	$(quietly) $(python) benchmarks/finetuning.py $(BENCHMARK_ARGS)

solutions: setup ## make notebooks/solutions/ from the chapters, and run them
	$(quietly) $(python) scripts/solutions.py

assignments: setup ## make the exercises as a course folder for nbgrader, in build/nbgrader
	$(python) scripts/assignments.py

slides: setup ## make slides from the chapters' figures and the quiz, in build/slides
	$(python) scripts/slides.py

releases: setup ## make the archives for students and for teachers, in build/releases
	$(python) scripts/releases.py

benchmark-class: setup ## memory and time of chapters, for a class that shares one machine
	$(quietly) $(python) benchmarks/class.py $(BENCHMARK_ARGS)

clean: ## remove .venv, caches and builds; the next call makes them again
	rm -rf .venv .venv-oldest .venv-newest .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} + -o -name .ipynb_checkpoints -prune -exec rm -rf {} +
