# Each target works on a fresh clone: it needs Python 3.11 or newer and make, and puts everything else into .venv.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/demo
TWO := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo cifar10 test test-all bench lab lock site

demo: .venv/ready  ## train on 10,000 pictures of clothes (three minutes on two cores with bf16), then sample; the last line is the picture
	$(BIN)/diffnb train --preset clothes --run $(RUN)
	@$(BIN)/diffnb sample $(RUN) --guidance-scale 2 --sampler dpmpp_2m --steps 20 --out $(RUN)/samples.png

cifar10: .venv/ready  ## the same for CIFAR-10 in twenty minutes; DATA=FOLDER if you have it already
	$(BIN)/diffnb train --preset cifar10-20min --run runs/cifar10-20min $(if $(DATA),--data-root $(DATA))
	@$(BIN)/diffnb sample runs/cifar10-20min --guidance-scale 2 --sampler dpmpp_2m --steps 20 --out runs/cifar10-20min/samples.png

test: .venv/ready  ## before a commit: names, generated code, every notebook, and the tests that are not marked slow (ten minutes on two cores)
	$(BIN)/ruff check
	$(BIN)/python tests/sync.py
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --do_print --timing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -m "not slow" $(TWO)

test-all: .venv/ready  ## what `make test` left out: a browser, kills, ranks, damaged files, long parities, each bug of tests/mutants/catalogue.py put into its page
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -m slow -n 3 --dist loadfile --no-loadscope-reorder
	$(BIN)/python tests/mutants/run.py

bench: .venv/ready  ## speed beside diffusers and denoising-diffusion-pytorch (15 minutes on two idle cores): bench/results, images/scaling.png
	$(BIN)/python bench/train.py
	$(BIN)/python bench/sample.py
	$(BIN)/python bench/profile_step.py
	$(BIN)/python bench/scaling.py
	$(BIN)/python bench/table.py

lab: .venv/ready  ## read the course
	$(BIN)/jupyter lab nbs/index.ipynb

site: .venv/ready  ## the course as web pages, in _site/html: no network, neither to build nor to read
	$(BIN)/python site/build.py
	@echo "read it with: $(BIN)/python -m http.server --directory _site/html"

lock: .venv/ready  ## resolve requirements.lock again from settings.ini
	$(BIN)/uv pip compile setup.py --all-extras --universal --python-version 3.11 --no-header --upgrade -o requirements.lock

.venv/ready: requirements.lock settings.ini setup.py
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'diffnb needs Python 3.11 or newer; try: make PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@
