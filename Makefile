# data -> models -> pseudo labels -> models -> out/EXP/submission.csv; `make` alone prints the commands and knobs.
#   make -j2 submit               whatever is missing, two jobs at once
#   make train FOLD=0 SCALE=512   one slice of the grid
#   make submit EXP=lr5 LR=5e-4   the same graph again, kept apart in out/lr5
MAKEFLAGS   += --no-builtin-rules --warn-undefined-variables
SHELL       := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# ---- knobs ------------------------------------------------------------------
DATA       ?= data
EXP        ?= main
MODELS     ?= fpn/tu-tf_efficientnet_lite0
SCALES     ?= 512
NFOLDS     ?= 5
FOLDS      ?= $(wordlist 1,$(NFOLDS),0 1 2 3 4 5 6 7 8 9)
ROUNDS     ?= 0
MODEL      ?= $(MODELS)
SCALE      ?= $(SCALES)
FOLD       ?= $(FOLDS)
ROUND      ?=
PAINT      ?= area
EPOCHS     ?= 40
BATCH      ?= 8
LR         ?= 2e-3
SEED       ?= 0
WEIGHTS    ?= imagenet
TTA        ?= flip
VOTE       ?= fit
A          ?=
B          ?=
IMAGE_ID   ?= id
TRAIN_ARGS ?=
INFER_ARGS ?=
PSEUDO_ARGS ?=
SUBMIT_ARGS ?=
SNAPSHOTS  ?= 0
TRIALS     ?= 20
ROWS       ?= all
GPUS       ?= 1
LAUNCH     ?=
DEVICE     ?= auto
PY         ?= .venv/bin/python
STRICT     ?=
about.DATA        := folder of the competition, with train.json and test.json
about.EXP         := name of the experiment; everything lands in out/EXP
about.MODELS      := DECODER/ENCODER, one or more; MODEL= picks some for train, score and runtimes
about.SCALES      := sides of the training image, multiples of 32; SCALE= picks
about.FOLDS       := folds to train, of NFOLDS; FOLD= picks
about.ROUNDS      := rounds of pseudo labels before the submission; worth it once the models are good
about.ROUND       := the one round of train (default 0), pseudo (1) or score (ROUNDS)
about.NFOLDS      := folds that the training images are split into
about.PAINT       := which object wins where they overlap: area (the smaller), id, order
about.EPOCHS      := of every run
about.BATCH       := images in a training step
about.LR          := peak learning rate
about.SEED        := of everything random
about.WEIGHTS     := of the encoder: imagenet (downloaded), none, or a file
about.TTA         := views averaged in prediction: none, flip, flip_rot, d4, or a list: identity,hflip,rot180
about.VOTE        := weights of the members that vote: fit (if that gains), equal, or given, 2,1
about.A           := experiment, or a round of one, that compare starts from
about.B           := what is compared with it
about.IMAGE_ID    := what names an image in the submission: id, file_name
about.TRAIN_ARGS  := more arguments for train.py, INFER_ARGS, PSEUDO_ARGS, SUBMIT_ARGS likewise: see python train.py --help
about.SNAPSHOTS   := epochs of a run that vote together; 0: its best one alone
about.TRIALS      := recipes that sweep tries
about.ROWS        := what bench measures: all, or some with commas between them
about.GPUS        := processes, each with a GPU, of one run; on a CPU as many processes
about.LAUNCH      := goes before every command that computes, such as srun --gpus=1
about.DEVICE      := auto takes an idle GPU, or the CPU
about.PY          := python to use; PY=python takes the current environment
about.STRICT      := 1: an edited script rebuilds what it made
KNOBS := DATA EXP MODELS MODEL SCALES SCALE FOLDS FOLD ROUNDS ROUND NFOLDS PAINT EPOCHS BATCH LR SEED WEIGHTS TTA VOTE A B \
         IMAGE_ID TRAIN_ARGS INFER_ARGS PSEUDO_ARGS SUBMIT_ARGS SNAPSHOTS TRIALS ROWS GPUS LAUNCH DEVICE PY STRICT
typos := $(foreach v,$(.VARIABLES),$(if $(findstring command line,$(origin $v)),$(filter-out $(KNOBS),$v)))
$(if $(strip $(typos)),$(error unknown knob: $(strip $(typos)); there are $(KNOBS)))
$(foreach v,$(filter-out ROUND A B %_ARGS LAUNCH STRICT,$(KNOBS)),$(if $(strip $($v)),,$(error $v is empty)))
$(if $(and $(filter pseudo,$(value MAKECMDGOALS)),$(filter 0,$(ROUND))),$(error ROUND=0 learns from no pseudo labels))
numbers := $(foreach v,GPUS TRIALS SNAPSHOTS,'$v=$(subst ','\'',$($v))')
wrong := $(shell for v in $(numbers); do [[ $$v =~ ^(SNAPSHOTS=0|[A-Z]+=[1-9][0-9]*)$$ ]] || echo "$$v"; done)
$(if $(strip $(wrong)),$(error $(wrong): not a whole number, from 1 or for SNAPSHOTS from 0))
$(foreach v,DATA EXP,$(if $(word 2,$($v)),$(error $v is '$($v)': make takes no path with a blank in it)))

# ---- the grid: a run is rROUND/DECODER/ENCODER/sSCALE/fFOLD -----------------
OUT    := out/$(EXP)
CACHE  := out/cache
digits := 0 1 2 3 4 5 6 7 8 9
upto    = $(if $(filter 0,$1),0,$(call upto,$(call prev,$1)) $1)
prev    = $(word $1,$(digits))
$(foreach r,$(ROUNDS) $(ROUND),$(if $(filter $r,$(digits)),,$(error ROUNDS and ROUND go from 0 to 9, not $r)))
$(if $(filter submit,$(value MAKECMDGOALS)),$(foreach v,MODEL SCALE FOLD ROUND,$(if $(filter command,$(word \
    1,$(origin $v))),$(error submit takes $vS, not $v))))
$(if $(filter compare,$(value MAKECMDGOALS)),$(foreach v,A B,$(if $(wildcard out/$($v)/r[0-9]/*/*/s*/f*/valid.json \
    out/$($v)/*/*/s*/f*/valid.json),,$(error $v=$($v): compare takes two experiments, or rounds, that have been scored: \
    A=main B=lr5, A=main/r0 B=main/r1; there is no out/$($v)/r*/*/*/s*/f*/valid.json))))
grid    = $(foreach r,$1,$(foreach m,$2,$(foreach s,$3,$(foreach f,$4,$(OUT)/r$r/$m/s$s/f$f))))
FINAL  := $(call grid,$(ROUNDS),$(MODELS),$(SCALES),$(FOLDS))
JSON   := $(firstword $(wildcard $(DATA)/train_all.json) $(DATA)/train.json) $(DATA)/test.json

# ---- stamps: remade only when their text changes, so a changed knob rebuilds what reads it
data         := --data $(DATA) --folds $(NFOLDS) --paint $(PAINT)
flags.data   := $(data) $(JSON)
flags.train  := --epochs $(EPOCHS) --batch $(BATCH) --lr $(LR) --seed $(SEED) --weights $(WEIGHTS) \
                --snapshots $(SNAPSHOTS) $(TRAIN_ARGS)
flags.infer  := --tta $(TTA) $(INFER_ARGS)
flags.pseudo := $(PSEUDO_ARGS) $(MODELS) $(SCALES)
flags.submit := --weights $(VOTE) --image-id $(IMAGE_ID) --batch $(BATCH) $(SUBMIT_ARGS) $(FINAL)
STAMPS := $(patsubst flags.%,$(OUT)/.flags/%,$(filter flags.%,$(.VARIABLES)))
text    = $(strip $(flags.$(notdir $1)))
.PHONY: $(foreach s,$(STAMPS),$(if $(findstring [$(call text,$s)],[$(file <$s)]),,$s))
$(STAMPS): ; @mkdir -p $(@D) && printf %s '$(subst ','\'',$(call text,$@))' >$@

# ---- graph: scripts are prerequisites only under STRICT=1 --------------------
SETUP := $(filter .venv/.installed,$(PY:.venv/bin/python=.venv/.installed))
code   = $(if $(STRICT),$1 common.py)
run    = $(LAUNCH) $(PY)
ranked = $(run)$(if $(filter-out 1,$(GPUS)), -m torch.distributed.run --standalone --nproc-per-node $(GPUS))
# as many threads as each process of the -j jobs has cores: more would only wait for each other
cores := $(shell nproc)
jobs   = $(or $(patsubst -j%,%,$(patsubst -j,-j$(cores),$(filter -j%,$(MAKEFLAGS)))),1)
export OMP_NUM_THREADS = $(shell n=$$(( $(cores) / $(jobs) / $(GPUS) )); echo $$(( n > 0 ? n : 1 )))

# photos are no prerequisites, being many and their names anything, but one that is newer than its check is checked again
newer  := $(shell find -L $(DATA) -type f ! -name '*.json' -cnewer $(OUT)/folds.csv -print -quit 2>/dev/null)
$(OUT)/folds.csv: $(JSON) $(OUT)/.flags/data $(if $(newer),again) | $(SETUP)
	$(run) train.py --check --exp $(OUT) --cache $(CACHE) $(data)
	@touch $@

# A script that writes several files stands in the graph with the last of them; the others wait for it, and when one
# that is needed is gone the script runs again. (With grouped targets make -n would leave out what depends on them.)
again   = $(if $(filter-out $(wildcard $1),$1),again)
labels  = $(addprefix $(OUT)/r$1/pseudo/f$2/,labels.npy manifest.json index.csv)
valid   = $1/valid.npy $1/valid.json
stores  = $(if $(filter $1,$(FINAL)),$(call valid,$1) $1/test.npy $1/test.json,$(if $(filter \
          score,$(value MAKECMDGOALS)),$(call valid,$1)) $(addprefix $1/,$(if $(wildcard $1/test.npy),test.json)))
.PHONY: again

# $1 folder of the run, $2 round, $3 model, $4 scale, $5 fold
# precious: what is there is whole, and make would remove it when stopped between its last byte and the script's end
define one_run
$1/model.pt: $(OUT)/folds.csv $(OUT)/.flags/train $(if $(filter-out 0,$2),$(call labels,$2,$5)) \
             $(if $(filter $(SNAPSHOTS),0 $(words $(wildcard $1/epoch-*.pt))),,again) $(wildcard $(WEIGHTS)) \
             $(call code,train.py) | $(SETUP)
	$(if $(STRICT),rm -f $1/model.pt)
	$(ranked) train.py --exp $(OUT) --cache $(CACHE) $(data) --model $3 --scale $4 --fold $5 --round $2 \
	    $(flags.train) --device $(DEVICE) --replace
.PRECIOUS: $1/model.pt $1/test.npy
$1/valid.npy $1/valid.json $1/test.json: | $1/test.npy ;
$1/test.npy: $1/model.pt $(OUT)/.flags/infer $(call again,$(call stores,$1)) $(call code,infer.py) | $(SETUP)
	$(ranked) infer.py --data $(DATA) --cache $(CACHE) $(flags.infer) --checkpoint $1/$(if $(filter \
	    0,$(SNAPSHOTS)),model.pt,epoch-*.pt) --device $(DEVICE)
endef

# $1 round, $2 fold: the labels that this round learns from, by all models of the round before and the same fold
define pseudo
$(filter-out %/index.csv,$(call labels,$1,$2)): | $(OUT)/r$1/pseudo/f$2/index.csv ;
$(OUT)/r$1/pseudo/f$2/index.csv: $(call again,$(call labels,$1,$2)) \
    $(addsuffix /test.npy,$(call grid,$(call prev,$1),$(MODELS),$(SCALES),$2)) \
    $(OUT)/.flags/pseudo $(call code,pseudo_label.py) | $(SETUP)
	$(run) pseudo_label.py --data $(DATA) --cache $(CACHE) --exp $(OUT) --round $1 --fold $2 $(PSEUDO_ARGS) \
	    $$(patsubst %.npy,%.json,$$(filter %/test.npy,$$^))
endef

every := $(sort $(foreach r,$(ROUNDS) $(ROUND) 1,$(call upto,$r)))
$(foreach r,$(every),$(foreach m,$(sort $(MODELS) $(MODEL)),$(foreach s,$(sort $(SCALES) $(SCALE)),$(foreach \
    f,$(sort $(FOLDS) $(FOLD)),$(eval $(call one_run,$(OUT)/r$r/$m/s$s/f$f,$r,$m,$s,$f))))))
$(foreach r,$(filter-out 0,$(every)),$(foreach f,$(sort $(FOLDS) $(FOLD)),$(eval $(call pseudo,$r,$f))))
# stores of earlier rounds are large: once their labels are made they may be deleted, and none is missed
.SECONDARY: $(filter-out $(FINAL:=/test.npy),$(addsuffix /test.npy,$(call grid,$(every),$(MODELS),$(SCALES),$(FOLDS))))

# exit code 3: it stands, but there are test photos that can't be read, of which the lines above tell
# precious: it stands also when the report, which comes after it, fails or is interrupted
.PRECIOUS: $(OUT)/submission.csv
$(OUT)/submission.csv: $(foreach file,valid.npy valid.json test.npy test.json,$(FINAL:=/$(file))) \
                       $(OUT)/.flags/submit $(call code,ensemble.py) | $(SETUP)
	$(run) ensemble.py soft --data $(DATA) --cache $(CACHE) --out $@ \
	    --report $(OUT)/report.html $(flags.submit) || [ $$? = 3 ]
$(filter-out $(wildcard $(JSON)),$(JSON)):
	@echo 'no $@: DATA=$(DATA) must be the folder of the competition with train.json, test.json and the photos' >&2; exit 1

# two makes at once: the second waits for the first
.venv/.installed: requirements.txt
	@mkdir -p .venv; exec 9>.venv/.lock; flock -n 9 || { echo 'another make installs into .venv: waiting'; flock 9; }; \
	    if [ $@ -nt $< ]; then exit; fi; echo 'installing requirements.txt into .venv'; \
	    for p in python3 python3.11 python3.12 python3.13; do \
	    if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$p; break; fi; done; \
	    $${python:?no Python 3.11 or newer found} -m venv .venv; \
	    .venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt; touch $@

# ---- commands ---------------------------------------------------------------
.PHONY: help setup check train pseudo submit score status compare runtimes bench sweep demo test chaos test-all lint clean
help: ## show this text
	@echo 'usage: make COMMAND [KNOB=VALUE ...]'
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo 'knobs, with their values now:'
	@printf '  %-10s %-30s %s\n' $(foreach k,$(filter-out MODEL SCALE FOLD INFER_ARGS PSEUDO_ARGS SUBMIT_ARGS,$(KNOBS)),\
	    $k '$(subst ','\'',$($k))' '$(about.$k)')
setup: .venv/.installed ## make .venv from requirements.txt, once; every command that needs it does
check: $(JSON) $(OUT)/.flags/data | $(SETUP) ## check the data and list all faults at once; out/EXP/data.html
	$(run) train.py --check --exp $(OUT) --cache $(CACHE) $(data)
train: $(addsuffix /model.pt,$(call grid,$(or $(ROUND),0),$(MODEL),$(SCALE),$(FOLD))) ## the models; narrow with MODEL= SCALE= FOLD= ROUND=
pseudo: $(foreach f,$(FOLD),$(OUT)/r$(or $(ROUND),1)/pseudo/f$f/index.csv) ## pseudo labels for the test photos
submit: $(OUT)/submission.csv ## everything up to out/EXP/submission.csv and report.html
score: $(addsuffix /valid.json,$(call grid,$(or $(ROUND),$(ROUNDS)),$(MODEL),$(SCALE),$(FOLD))) ## out-of-fold scores of members and vote, who adds what; out/EXP/report, report.html
	@$(run) ensemble.py score --data $(DATA) --cache $(CACHE) --batch $(BATCH) --weights $(VOTE) --tables $(OUT)/report \
	    --report $(OUT)/report.html $(^:/valid.json=)
status: | $(SETUP) ## which runs are done, how far the others are, and how long they will take
	@$(PY) ensemble.py status --epochs $(EPOCHS) $(call grid,$(call upto,$(or $(ROUND),$(ROUNDS))),$(MODEL),$(SCALE),$(FOLD))
compare: | $(SETUP) ## whether B beats A on the images that both held out: A=main B=lr5, A=main/r0 B=main/r1
	@$(run) ensemble.py compare --data $(DATA) --cache $(CACHE) out/$A out/$B
runtimes: | $(SETUP) ## speed, size and memory of every model and scale, in out/runtimes.csv; MODEL= SCALE= BATCH= DEVICE=
	$(run) tests/bench_runtimes.py --models $(MODEL) --scales $(SCALE) --batch $(BATCH) --device $(DEVICE) \
	    --out out/runtimes.csv
bench: | $(SETUP) ## time the public baselines' ways and ours in turn, on this machine; ROWS=; out/bench.jsonl keeps all
	$(run) tests/bench_speed.py --rows $(ROWS)
sweep: $(OUT)/folds.csv | $(SETUP) ## try TRIALS recipes from train.py's SEARCH_SPACE on the first MODEL, SCALE and FOLD
	$(run) tests/bench_sweep.py --trials $(TRIALS) -- --exp $(OUT) --cache $(CACHE) $(data) --model $(firstword \
	    $(MODEL)) --scale $(firstword $(SCALE)) --fold $(firstword $(FOLD)) --round $(or $(ROUND),0) $(flags.train) \
	    --device $(DEVICE)
demo: | $(SETUP) ## draw a small dataset and run the whole graph on it, in out/demo
	$(PY) tests/demo_data.py out/demo/data
	$(MAKE) --no-print-directory $(if $(filter -j%,$(MAKEFLAGS)),,-j2) submit DATA=out/demo/data EXP=demo PY=$(PY) \
	    WEIGHTS=none SCALES=128 MODELS='fpn/tu-tf_efficientnet_lite0 unet/tu-mobilenetv3_small_100' FOLDS='0 1' NFOLDS=2 \
	    ROUNDS=1 EPOCHS=6 BATCH=4 LR=3e-3 PSEUDO_ARGS='--confident 0.5 --max-unsure 0.5'
test: | $(SETUP) ## quick tests: unit, property and end to end
	$(PY) -m pytest -q -m 'not slow'
chaos: | $(SETUP) ## kill the whole graph at 30 random moments and compare what it ends in
	$(PY) -m pytest -q -s tests/test_chaos.py
test-all: | $(SETUP) ## all tests
	$(PY) -m pytest -q
lint: | $(SETUP) ## ruff
	$(PY) -m ruff check .
clean: ## remove out/EXP with all its models
	rm -rf $(OUT)
