# data -> models -> pseudo labels -> models -> out/EXP/submission.csv
# `make` alone prints the commands and knobs.
#   make -j2 submit               whatever is missing, two jobs at once
#   make train FOLD=0 SCALE=512   one slice of the grid
#   make submit EXP=lr5 LR=5e-4   the same graph again, kept apart in out/lr5
#   make why                      what isn't up to date, and why
MAKEFLAGS   += --no-builtin-rules --warn-undefined-variables
SHELL       := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# ---- knobs ---------------------------------------------------------------------------------------
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
EXTRA      ?=
UNLABELLED ?=
PAINT      ?= area
ORIENTATION ?= shown
UNUSED     ?= keep
EPOCHS     ?= 40
BATCH      ?= 8
LR         ?= 4e-3
SEED       ?= 0
WEIGHTS    ?= imagenet
BUDGET     ?=
TTA        ?= flip
VOTE       ?= fit
METRIC     ?= v3
POST       ?= fit
EXPS       ?=
LADDER     ?= full
TRUTH      ?=
HOLDOUT    ?=
IMAGE_ID   ?= id
PHOTOS     ?=
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
PER_GPU    ?= 1
PY         ?= .venv/bin/python
CODE       ?=
about.DATA        := folder of the competition, with train.json and test.json
about.EXP         := name of the experiment; everything lands in out/EXP; lad/a, lad/b share runs
about.MODELS      := DECODER/ENCODER, one or more; MODEL= picks some for train, score and runtimes
about.SCALES      := sides of the training image, padded as encoders need; SCALE= picks
about.FOLDS       := folds to train, of NFOLDS; FOLD= picks; all: a run on all images besides
about.ROUNDS      := rounds of pseudo labels before the submission: once the models are good
about.ROUND       := the one round of train (default 0), pseudo (1) or score (ROUNDS)
about.NFOLDS      := folds that the training images are split into
about.EXTRA       := more COCO folders of the same classes, learnt from by every fold, held out by none
about.UNLABELLED  := folder of more photos for pseudo labels; the submission has none of them
about.PAINT       := which object wins where they overlap: area (the smaller), id, order
about.ORIENTATION := how photos are read that EXIF turns to the same size: shown (turned) or stored
about.UNUSED      := categories without annotations: keep them as classes, or drop them
about.EPOCHS      := of every run; ladder: "20 40", of trials, then of full-size and above
about.BUDGET      := time for all runs, 40m or 1h30m, which chooses EPOCHS and how many FOLDS
about.BATCH       := images in a training step
about.LR          := peak learning rate
about.SEED        := of everything random
about.WEIGHTS     := imagenet (downloaded), none, a file, or a folder with one for each encoder
about.TTA         := views averaged in prediction: none, flip, flip_rot, d4, or identity,hflip,...
about.VOTE        := weights of the members that vote: fit (if that gains), equal, or given, 2,1
about.METRIC      := v3, v2 or v1: chooses epochs (so another one trains anew), weights and steps
about.POST        := what may follow the vote: fit (all that gains), none, or least-share,minimum-area
about.EXPS        := experiments, or rounds of them, that compare puts side by side
about.LADDER      := the climb that ladder makes: full, or fast, 36 minutes on two cores for 400 photos
about.TRUTH       := annotated COCO file of the test photos, for scores; else test.json
about.HOLDOUT     := share of the labelled photos that holdout makes a test set of, 0.05 to 0.5
about.IMAGE_ID    := what names an image in the submission: id, file_name
about.PHOTOS      := folder that predict predicts all photos of, at any depth
about.TRAIN_ARGS  := more for train.py, see its --help; INFER_ARGS PSEUDO_ARGS SUBMIT_ARGS likewise
about.SNAPSHOTS   := epochs of a run that vote together; 0: its best one alone
about.TRIALS      := recipes that sweep tries
about.ROWS        := what bench measures: all, or some with commas between them
about.GPUS        := processes, each with a GPU, of one run; on a CPU as many processes
about.LAUNCH      := goes before every command that computes, such as srun --gpus=1
about.DEVICE      := auto takes an idle GPU, or the CPU
about.PER_GPU     := jobs of make -j that may share a GPU, 1 to 9
about.PY          := python to use; PY=python takes the current environment
about.CODE        := after an edit of a script: new makes anew what it made, keep keeps it
KNOBS := DATA EXP MODELS MODEL SCALES SCALE FOLDS FOLD ROUNDS ROUND NFOLDS EXTRA UNLABELLED PAINT \
    ORIENTATION UNUSED EPOCHS BUDGET BATCH LR SEED WEIGHTS TTA VOTE METRIC POST EXPS LADDER TRUTH HOLDOUT \
    IMAGE_ID PHOTOS TRAIN_ARGS INFER_ARGS PSEUDO_ARGS SUBMIT_ARGS SNAPSHOTS TRIALS ROWS GPUS LAUNCH \
    DEVICE PER_GPU PY CODE

# ---- knobs are checked first, all of them; the plan below checks what only scripts know ----------
given := $(foreach v,$(.VARIABLES),$(if $(findstring command line,$(origin $v)),$v))
typos := $(strip $(filter-out $(KNOBS),$(given)))
$(if $(typos),$(error unknown knob: $(typos); there are $(KNOBS)))
define newline


endef
set_by_user := $(foreach v,$(KNOBS),$(if $(filter file,$(origin $v)),,$v))
$(foreach v,$(set_by_user),$(if $(findstring $$,$(value $v)),$(error $v has a $$ in it)) \
    $(if $(findstring $(newline),$(value $v)),$(error $v has more than one line)))
wanted := $(value MAKECMDGOALS)
goals := $(filter train pseudo submit score,$(wanted))
$(if $(filter out/%,$(wanted)),$(error make takes commands, such as submit, not files: $(wanted)))
may_be_empty := ROUND EXTRA UNLABELLED BUDGET EXPS TRUTH HOLDOUT PHOTOS %_ARGS LAUNCH CODE
$(foreach v,$(filter-out $(may_be_empty),$(KNOBS)),$(if $(strip $($v)),,$(error $v is empty)))
quote  = '$(subst ','\'',$1)'
# only DATA and PHOTOS, which may be any path, are quoted where a shell reads them; other knobs have
# nothing that means anything to a shell
text         := [A-Za-z0-9 ._=+,:/@-]*
piece        := [A-Za-z0-9_=+-][A-Za-z0-9._=+-]*
legal.EXP    := $(piece)(/$(piece))*
legal.EXPS   := [ ]*($(legal.EXP)( +$(legal.EXP))*)?[ ]*
legal.CODE   := (new|keep)?
legal.BUDGET := ([0-9]+h)?([0-9]+m)?([0-9]+s)?
legal.METRIC := v[123]
legal.UNLABELLED := [A-Za-z0-9._=+,:/@-]*
legal.HOLDOUT := (0?[.][0-9]+)?
legal.NFOLDS := [2-9]|10
legal.ROUNDS := [0-9]
legal.ROUND  := [0-9]?
legal.PER_GPU := [1-9]
legal.SNAPSHOTS := 0|[1-9][0-9]*
$(foreach v,GPUS TRIALS EPOCHS BATCH,$(eval legal.$v := [1-9][0-9]*))
$(if $(filter ladder holdout climb,$(wanted)),$(eval legal.EPOCHS := [1-9][0-9]*( +[1-9][0-9]*)*))
legal   = $(if $(filter legal.$1,$(.VARIABLES)),$(legal.$1),$(text))
matches = p='$(call legal,$1)'; [[ $(call quote,$($1)) =~ ^($$p)$$ ]]
wrong  := $(strip $(shell $(foreach v,$(filter-out DATA PHOTOS,$(KNOBS)),\
    $(call matches,$v) || echo $(call quote,$v=$($v));)))
$(if $(wrong),$(error $(wrong) can not be: $(about.$(firstword $(subst =, ,$(wrong)))). Numbers are \
    whole, no part of EXP begins with a dot, and quotes and other signs that a shell knows have no \
    place in a knob but DATA and PHOTOS))
$(if $(filter cache cache/%,$(EXP)),$(error EXP=$(EXP): out/cache belongs to all experiments))
$(if $(filter pseudo,$(wanted)),\
    $(if $(filter 0,$(ROUND)),$(error ROUND=0 learns from no pseudo labels)))
$(if $(filter holdout,$(wanted)),\
    $(if $(HOLDOUT),,$(error HOLDOUT is empty: holdout takes a share, HOLDOUT=0.15)))
$(if $(and $(filter ladder,$(wanted)),$(word 2,$(wanted))),$(error ladder goes alone: $(wanted)))
$(if $(and $(filter ladder,$(wanted)),$(BUDGET)),\
    $(error BUDGET is for one submit: the rungs of the ladder have EPOCHS and FOLDS))
$(if $(and $(filter ladder,$(wanted)),$(HOLDOUT),$(TRUTH)),\
    $(error TRUTH is not of the photos that HOLDOUT holds out: give one of them))
$(if $(and $(filter ladder,$(wanted)),$(wildcard out/$(EXP)/r[0-9])),\
    $(error EXP=$(EXP) has runs and a report of its own: give the ladder another folder, EXP=climb))
$(if $(and $(goals),$(wildcard out/$(EXP)/rungs.tsv)),\
    $(error EXP=$(EXP) is a ladder with a report of its own: name another experiment))
$(if $(TRUTH),$(if $(shell test -f $(call quote,$(TRUTH)) && echo yes),,$(error TRUTH=$(TRUTH): no \
    such file)))
$(if $(filter predict,$(wanted)),$(if $(PHOTOS),,$(error PHOTOS is empty: predict takes a folder \
    of photos, PHOTOS=folder)))
$(foreach goal,$(filter submit ladder,$(wanted)),\
    $(foreach v,$(filter MODEL SCALE FOLD ROUND,$(given)),$(error $(goal) takes $vS, not $v)))
scored  = $(wildcard out/$1/r[0-9]/*/*/s*/f*/valid.json out/$1/*/*/s*/f*/valid.json)
no_score = $(strip $(foreach e,$(EXPS),$(if $(call scored,$e),,out/$e)))
$(if $(filter compare,$(wanted)),$(if $(word 2,$(EXPS)),,$(error EXPS=$(EXPS): compare takes two \
    or more experiments, or rounds, that have been scored: EXPS="main/r0 main/r1 lr5")) \
    $(if $(no_score),$(error EXPS=$(EXPS): compare takes experiments, or rounds, that \
    have been scored: no run has a valid.json in $(no_score))))

# ---- what the scripts are given ------------------------------------------------------------------
OUT    := out/$(EXP)
data   := --data $(call quote,$(DATA)) --cache out/cache
how_read := --paint $(PAINT) --orientation $(ORIENTATION) --unused $(UNUSED)
unlabelled := $(UNLABELLED:%=--unlabelled %)
more   := $(if $(EXTRA),--extra $(EXTRA)) $(unlabelled)
split  := --exp $(OUT) --folds $(NFOLDS) $(how_read) $(more)
train  = --epochs $(EPOCHS) --snapshots $(SNAPSHOTS) --batch $(BATCH) --lr $(LR) --seed $(SEED) \
    --weights $(WEIGHTS) --metric $(METRIC) $(TRAIN_ARGS)
infer  := --tta $(TTA) $(INFER_ARGS)
fitted := --weights $(VOTE) --metric $(METRIC) --post $(POST) --batch $(BATCH)
submit := $(fitted) --image-id $(IMAGE_ID) $(SUBMIT_ARGS)
truth  := $(if $(TRUTH),--truth $(call quote,$(TRUTH)))
code   := $(if $(CODE),--code $(CODE))
device := --device $(DEVICE) --per-gpu $(PER_GPU)
run    := $(strip $(LAUNCH) $(PY))
torchrun := -m torch.distributed.run --standalone --nproc-per-node $(GPUS)
ranked := $(run)$(if $(filter-out 1,$(GPUS)), $(torchrun))
# a run is rROUND/DECODER/ENCODER/sSCALE/fFOLD
runs    = $(foreach m,$2,$(foreach s,$3,$(foreach f,$4,$(OUT)/r$1/$m/s$s/f$f)))
# as many threads as each process of the -j jobs has cores: more would only wait for each other
cores  := $(shell nproc)
jobs    = $(or $(patsubst -j%,%,$(patsubst -j,-j$(cores),$(filter -j%,$(MAKEFLAGS)))),1)
export OMP_NUM_THREADS = $(shell n=$$(( $(cores) / $(jobs) / $(GPUS) )); echo $$(( n > 0 ? n : 1 )))
SETUP := $(filter .venv/.installed,$(PY:.venv/bin/python=.venv/.installed))
# as make compares: what is as old as requirements.txt is up to date
is_set_up = [ -e .venv/.installed ] && [ ! requirements.txt -nt .venv/.installed ]
first := $(if $(SETUP),$(shell $(is_set_up) || echo yes))
dry   := $(if $(findstring n,$(filter-out -%,$(firstword $(MAKEFLAGS)))),--dry)
grid  := $(data) --exp $(OUT) $(how_read) --nfolds $(NFOLDS) $(more) \
    --rounds $(ROUNDS) $(ROUND:%=--round %) --gpus $(GPUS) $(code) \
    --models '$(MODELS)' --scales '$(SCALES)' --pick-models '$(MODEL)' --pick-scales '$(SCALE)'

# ---- a budget chooses EPOCHS and FOLDS, once: out/EXP/budget.json remembers them -----------------
both := $(and $(BUDGET),$(filter EPOCHS,$(set_by_user)))
$(if $(both),$(error BUDGET chooses EPOCHS: give one of the two))
spend := $(and $(BUDGET),$(if $(first),,$(goals) $(filter why status,$(wanted))))
afford = $(shell $(PY) ensemble.py budget $(grid) --folds '$(FOLDS)' --pick-folds '$(FOLD)' \
    --train-args='$(train)' --infer-args='$(infer)' --budget $(BUDGET) \
    $(if $(filter why status,$(wanted)),--dry,$(dry)) \
    --device $(DEVICE) $(if $(filter FOLDS,$(set_by_user)),--keep-folds) || echo stop)
ifneq ($(strip $(spend)),)
chosen := $(afford)
$(if $(filter stop,$(chosen)),$(error nothing was started))
EPOCHS := $(firstword $(chosen))
FOLDS  := $(wordlist 2,11,$(chosen))
endif

# ---- the plan: a quick process compares what made each file with what would make it now ----------
# TODO is what it names; that is made and nothing else, and times play no part. A file waits for
# what it is made from.
grid  += --folds '$(FOLDS)' --pick-folds '$(FOLD)' --train-args='$(train)' \
    --infer-args='$(infer)' --pseudo-args='$(PSEUDO_ARGS)' --submit-args='$(submit)'
plan  := $(PY) ensemble.py plan $(grid)
ready := $(if $(first),,$(goals))
TODO  := $(if $(ready),$(shell $(plan) $(dry) --goals '$(goals)' || echo stop))
$(if $(filter stop,$(TODO)),$(error nothing was started))
.PHONY: $(TODO)
.SECONDEXPANSION:
part   = $(word $1,$(subst /, ,$(patsubst $(OUT)/%,%,$@)))

$(filter %/folds.csv,$(TODO)):
	$(run) train.py --check $(data) $(split)

labels = $(OUT)/$(call part,1)/pseudo/$(call part,5)/manifest.json
# a run on all images, fall, stops at the median of the epochs at which the folds were best
numbered := $(filter-out all,$(FOLDS))
of_folds = $(if $(filter fall,$(call part,5)),$(numbered:%=$(patsubst %/fall,%,$(@D))/f%/model.pt))
$(filter %/model.pt,$(TODO)): | $$(filter %/folds.csv $$(labels) $$(of_folds),$(TODO))
	$(ranked) train.py $(data) $(split) --round $(patsubst r%,%,$(call part,1)) \
	    --model $(call part,2)/$(call part,3) --scale $(patsubst s%,%,$(call part,4)) \
	    --fold $(patsubst f%,%,$(call part,5)) $(if $(of_folds),--of-folds $(numbered)) \
	    $(train) $(device) --replace $(code)

checkpoint := $(if $(filter 0,$(SNAPSHOTS)),model.pt,epoch-*.pt)
$(filter %/test.json,$(TODO)): | $$(filter $$(@D)/model.pt,$(TODO))
	$(ranked) infer.py $(data) $(infer) $(device) --replace $(code) \
	    --checkpoint $(@D)/$(checkpoint)

$(filter %/unlabelled.json,$(TODO)): | \
    $$(filter $$(@D)/model.pt $$(@D)/test.json,$(TODO))
	$(ranked) infer.py $(data) $(infer) $(device) --replace $(code) --split unlabelled \
	    $(unlabelled) --checkpoint $(@D)/$(checkpoint)

# the labels that a round learns from are by the models of the round before and the same fold
before = $(word $(patsubst r%,%,$(call part,1)),0 1 2 3 4 5 6 7 8)
# and, by --confident auto, of what the models of all folds predicted out of fold
before_of = $(call runs,$(before),$(MODELS),$(SCALES),$1)
makers = $(call before_of,$(patsubst f%,%,$(call part,3)))
gives_number := $(filter-out --confident=auto,\
    $(filter --confident=%,$(subst --confident ,--confident=,$(PSEUDO_ARGS))))
judges = $(if $(gives_number),,$(call before_of,$(numbered)))
$(filter %/manifest.json,$(TODO)): | \
    $$(filter $$(addsuffix /test.json,$$(makers) $$(judges)),$(TODO)) \
    $$(filter $$(addsuffix /unlabelled.json,$$(makers)),$(TODO))
	$(run) pseudo_label.py $(data) --exp $(OUT) --round $(patsubst r%,%,$(call part,1)) \
	    --fold $(patsubst f%,%,$(call part,3)) $(unlabelled) $(PSEUDO_ARGS) $(code) \
	    $(makers:=/test.json) \
	    $(if $(judges),--out-of-fold $(judges:=/valid.json)) $(truth)

# asked again whether its runs are up to date: another make may have changed them since
# exit code 3: the submission stands, but some test photos can't be read, as the lines above tell
$(filter %/submission.csv,$(TODO)): | $(filter-out %/submission.csv,$(TODO))
	@$(plan) --ready
	$(run) ensemble.py soft $(data) --out $@ --report $(OUT)/report.html $(submit) $(code) \
	    $(truth) $(call runs,$(ROUNDS),$(MODELS),$(SCALES),$(FOLDS)) || [ $$? = 3 ]

# two makes at once: the second waits for the first
.venv/.installed: requirements.txt
	@mkdir -p .venv; exec 9>.venv/.lock; \
	    flock -n 9 || { echo 'another make installs into .venv: waiting'; flock 9; }; \
	    if $(is_set_up); then exit; fi; echo 'installing requirements.txt into .venv'; \
	    for p in python3 python3.11 python3.12 python3.13; do \
	    if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	    then python=$$p; break; fi; done; \
	    $${python:?no Python 3.11 or newer found} -m venv .venv; \
	    .venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt; touch $@

# ---- commands ------------------------------------------------------------------------------------
.PHONY: help setup check train pseudo submit score predict why status compare holdout ladder \
    runtimes bench sweep demo test chaos test-gpu test-all lint clean
help: ## show this text
	@echo 'usage: make COMMAND [KNOB=VALUE ...]'
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo 'knobs, with their values now:'
	@printf '  %-11s %-30s %s\n' $(foreach k,$(KNOBS),$(if $(filter about.$k,$(.VARIABLES)),\
	    $k $(call quote,$($k)) '$(about.$k)'))
setup: .venv/.installed ## make .venv from requirements.txt, once; every command that needs it does
check: | $(SETUP) ## check the data and list all faults at once; out/EXP/data.html
	$(run) train.py --check $(data) $(split)
ifneq ($(first),)
setup_first := $(if $(filter undefined,$(origin AFTER_SETUP)),yes)
$(goals): $(if $(setup_first),.venv/.installed)
	@$(if $(setup_first),AFTER_SETUP=yes $(MAKE) --no-print-directory $@)
else
train: $(TODO) ## the models; narrow with MODEL= SCALE= FOLD= ROUND=
pseudo: $(TODO) ## pseudo labels for the test photos
submit: $(TODO) ## everything up to out/EXP/submission.csv and report.html
score: $(TODO) ## scores of members and vote, out of fold and by TRUTH; out/EXP/report.html
	@$(run) ensemble.py score $(data) $(fitted) --tables $(OUT)/report \
	    --report $(OUT)/report.html $(filter --mixed,$(SUBMIT_ARGS)) $(truth) \
	    $(call runs,$(or $(ROUND),$(ROUNDS)),$(MODEL),$(SCALE),$(FOLD))
endif
predict: | $(SETUP) ## the photos in PHOTOS by the vote of out/EXP's submission; out/EXP/predicted/
	@$(run) infer.py --photos $(call quote,$(PHOTOS)) --vote $(OUT)/submission.vote.json \
	    --out $(OUT)/predicted --cache out/cache $(device) --replace $(code) || [ $$? = 3 ]
why: | $(SETUP) ## why submit would make what it would make: for each file what differs or is missing
	@$(plan) --dry --why
status: | $(SETUP) ## which runs are done, how long the others will take, what isn't up to date
	@$(PY) ensemble.py status $(grid) --dry
compare: | $(SETUP) ## what each of EXPS gains over the one before: EXPS="main/r0 main/r1 lr5"
	@$(run) ensemble.py compare $(data) $(truth) --tables out --picture out/compare.png \
	    $(filter --mixed,$(SUBMIT_ARGS)) $(addprefix out/,$(EXPS))
holdout: | $(SETUP) ## a DATA in out/EXP/data that tests on HOLDOUT=0.15 of the labelled photos
	@$(lock_climb); $(make_holdout)
make_holdout = $(run) ensemble.py holdout $(data) $(how_read) --share $(HOLDOUT) --out $(OUT)/data
# held until this shell, or the make that it becomes, ends
lock_climb = mkdir -p $(OUT); exec 7>> $(OUT)/.climb; flock -n 7 || { \
    echo '$(OUT): a make ladder climbs here: wait, or name another EXP' >&2; exit 2; }

# The ladder is a cumulative ablation: each rung is one make submit. make -n first looks at all of
# them; then make climb, a part of make ladder, makes those side by side whose recipes differ, so
# that they have no run in common.
not_asked := EXP DATA LADDER TRUTH HOLDOUT PY LAUNCH DEVICE PER_GPU CODE
asked    = --preset $(LADDER) \
    $(foreach v,$(filter-out $(not_asked),$(set_by_user)),$(call quote,$v=$($v)))
held_out = $(if $(dry),,$(HOLDOUT))
ladder_data = $(call quote,$(if $(held_out),$(OUT)/data,$(DATA)))
table    = --data $(ladder_data) --cache out/cache --exp $(OUT) $(how_read) --batch $(BATCH) \
    --image-id $(IMAGE_ID) $(truth) $(asked)
# $name and $knobs are variables of the shell
submit_rung = $(MAKE) --no-print-directory submit DATA=$(ladder_data) EXP=$(EXP)/$$name \
    "$${knobs[@]}"
read_knobs = IFS=$$'\t' read -ra knobs < <($1 | cut -f3-)
define check_and_climb
$(lock_climb); $(if $(held_out),$(make_holdout);) \
rungs=$$($(PY) ensemble.py rungs $(table)); \
while IFS= read -r rung <&8; do \
    name=$${rung%%$$'\t'*}; $(call read_knobs,echo "$$rung"); \
    $(submit_rung) -n > /dev/null || { echo "LADDER: $$name can't be made, see above" >&2; \
    exit 2; }; \
done 8<<< "$$rungs"; \
echo "$$rungs" > $(OUT)/.rungs; mv $(OUT)/.rungs $(OUT)/rungs.tsv; \
exec $(MAKE) --no-print-directory climb
endef
ladder: | $(SETUP) ## the climb, rung by rung, and what each is worth, in out/EXP/ladder.csv and .png
	+@$(if $(dry),$(PY) ensemble.py rungs $(table),$(check_and_climb))
	@$(run) ensemble.py ladder $(table)

# How long a rung took goes to cost.csv if it made anything or failed. make passes a signal only to
# this shell, and a shell hears of none while a command in the foreground runs: so the rung runs in
# the background, as a group of its own, which the signal is passed on to.
define make_rung
name=$*; folder=$(OUT)/$$name; cost=$$folder/cost.csv; failed=0; TIMEFORMAT=%R,%U,%S; LC_ALL=C; \
$(call read_knobs,$(rung_line)); \
mkdir -p $$folder; touch $$folder/.began; echo "== $$name $${knobs[*]}"; \
set -m; $(submit_rung) & pid=$$!; set +m; trap 'kill -- -$$pid' INT TERM HUP; \
{ time while wait $$pid || failed=$$?; kill -0 $$pid; do :; done; } 2> $$folder/.time; \
[ -e $$cost ] || echo seconds,user,system,knobs > $$cost; \
if [ $$failed != 0 ] || [ $$folder/submission.csv -nt $$folder/.began ]; then \
    echo "$$(tail -n 1 $$folder/.time),\"$${knobs[*]}\"" >> $$cost; fi; \
exit $$failed
endef
rung_line = awk -F '\t' '$$1 == "$*"' $(OUT)/rungs.tsv
ifneq ($(filter climb,$(wanted)),)
$(if $(filter 0,$(MAKELEVEL)),$(error climb is a part of make ladder))
rung_names := $(shell cut -f1 $(OUT)/rungs.tsv)
.PHONY: climb $(rung_names:%=rung/%)
climb: $(rung_names:%=rung/%)
$(rung_names:%=rung/%): rung/%: $$(addprefix rung/,$$(shell $$(rung_line) | cut -f2))
	+@$(make_rung)
endif
runtimes: | $(SETUP) ## speed, size and memory of models and scales, in out/runtimes.csv and .png
	@failed=0; $(foreach m,$(MODEL),$(foreach s,$(SCALE),$(run) train.py $(data) --exp $(OUT) \
	    --model $m --scale $s --batch $(BATCH) $(device) --runtimes out/runtimes.csv || \
	    failed=1;)) exit $$failed
bench: | $(SETUP) ## time public baselines' ways and ours in turn, here; ROWS=; out/bench.jsonl
	$(run) tests/bench_speed.py --rows $(ROWS)
sweep: | $(SETUP) ## try TRIALS recipes of train.py's SEARCH_SPACE on the first MODEL, SCALE, FOLD
	$(run) train.py --sweep $(TRIALS) $(data) $(split) --model $(firstword $(MODEL)) \
	    --scale $(firstword $(SCALE)) --fold $(firstword $(FOLD)) --round $(or $(ROUND),0) $(train) \
	    $(device) $(code)
demo: | $(SETUP) ## draw a small dataset and run the whole graph on it, in out/demo
	$(PY) tests/demo_data.py out/demo/data
	$(MAKE) --no-print-directory $(if $(filter -j%,$(MAKEFLAGS)),,-j2) submit DATA=out/demo/data \
	    EXP=demo PY=$(PY) MODELS='fpn-narrow/tu-tf_efficientnet_lite0 unet/tu-mobilenetv3_small_100' \
	    SCALES=128 FOLDS='0 1' NFOLDS=2 ROUNDS=1 WEIGHTS=none EPOCHS=6 BATCH=4 LR=3e-3 \
	    TRAIN_ARGS='--encoder-lr 1' \
	    PSEUDO_ARGS='--confident 0.5 --max-unsure 0.5'
# files of tests run side by side, one on each core; a worker takes 1.5 GB
each_core := -n auto --maxprocesses 8 --dist loadfile
test: | $(SETUP) ## quick tests: unit, property and end to end
	$(PY) -m pytest -q -m 'not slow' $(each_core)
chaos: | $(SETUP) ## kill the whole graph at 30 random moments and compare what it ends in
	$(PY) -m pytest -q -s tests/test_chaos.py
# a test that a signal can't end, since it waits for the GPU, ends the process after 100 s
test-gpu: | $(SETUP) ## the tests that need a GPU, in two minutes
	$(PY) -m pytest -v --tb=short --durations=15 -o faulthandler_timeout=100 \
	    -o faulthandler_exit_on_timeout=true -m gpu tests/test_gpu.py
test-all: | $(SETUP) ## all tests
	$(PY) -m pytest -q $(each_core)
lint: | $(SETUP) ## ruff
	$(PY) -m ruff check .
clean: ## remove out/EXP with all its models
	rm -rf $(OUT)
