#!/bin/sh
# From a fresh Debian 12 to a distilled student: installs what is missing, builds, makes question/answer records from WordNet,
# trains a small teacher, distils it into a student on two MPI ranks (killed half-way and started again), trains the same
# student without the teacher, compares.
# Everything it writes is in build/release and output/.
set -eu
cd "$(dirname "$0")/.."
[ -f CMakePresets.json ] || { echo "quickstart.sh: needs the source tree of distill: clone it and run tools/quickstart.sh there" >&2; exit 1; }
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_mpi_yield_when_idle=1
distill=build/release/apps/distill
started=$(date +%s)
kill_after=250  # steps; lines of metrics come every 50, checkpoints every 100

title() { printf '\n== %s\n' "$*"; }

# Last value of a column of a metrics file, or its value at a step.
value() {
  awk -F, -v name="$2" -v step="${3-}" 'NR == 1 { for (i = 1; i <= NF; ++i) if ($i == name) at = i }
    NR > 1 && $at != "" && (step == "" || $1 == step) { value = $at } END { print value }' "$1"
}

# Step of the last line of a metrics file, 0 where there is none.
last_step() {
  step=$(value "$1" step 2>/dev/null || true)
  echo "${step:-0}"
}

# Step of the newest checkpoint of a run, 0 where there is none.
newest_checkpoint() {
  newest=0
  for folder in "$1"/checkpoints/step-*; do
    if [ -f "$folder/manifest.json" ]; then newest=${folder##*/step-}; fi
  done
  echo "$newest" | sed 's/^0*\([0-9]\)/\1/'
}

title "dependencies and build"
tools/install_dependencies.sh
cmake --preset release -DDISTILL_TESTS=OFF --log-level=WARNING
cmake --build --preset release -j "$(nproc)" --target distill
built=$(date +%s)

title "records: WordNet questions and answers"
mkdir -p output/wordnet
tools/make_wordnet_data.pl --out output/wordnet

title "step 1 of 3: a teacher from scratch (one rank, no teacher of its own)"
for name in teacher student student-alone; do rm -rf "output/wordnet-$name" "output/logs/wordnet-$name"; done
"$distill" --config configs/wordnet_teacher.yaml

title "step 2 of 3: distillation (two MPI ranks: one student, one teacher), killed after step $kill_after"
metrics=output/logs/wordnet-student/metrics.csv
mpirun -np 2 --oversubscribe --bind-to none "$distill" --config configs/wordnet_distill.yaml &
run=$!
until [ "$(last_step "$metrics")" -ge "$kill_after" ] || ! kill -0 "$run" 2>/dev/null; do sleep 0.1; done
# shellcheck disable=SC2046  # a list of ranks
kill -9 "$run" $(cat "/proc/$run/task/$run/children" 2>/dev/null) 2>/dev/null || true
code=0
wait "$run" 2>/dev/null || code=$?
case $code in
  0) echo "the run was over before it could be killed" ;;
  137) echo "killed with kill -9" ;;
  *) exit "$code" ;;
esac
seen=$(last_step "$metrics")
before=$(value "$metrics" train/loss "$seen")
resumed=$(newest_checkpoint output/wordnet-student)
title "step 2, the same command again: it goes on from the newest checkpoint, after step $resumed"
mpirun -np 2 --oversubscribe --bind-to none "$distill" --config configs/wordnet_distill.yaml

title "step 3 of 3: the same student without the teacher (same steps, same seed)"
"$distill" --config configs/wordnet_distill.yaml exp_name=wordnet-student-alone distill_loss_weight=0

title "result"
"$distill" metrics wordnet-student logging_dir=output/logs --plot train/loss
"$distill" inspect output/wordnet-student
teacher=$(value output/logs/wordnet-teacher/metrics.csv student/val_loss)
with=$(value "$metrics" student/val_loss)
without=$(value output/logs/wordnet-student-alone/metrics.csv student/val_loss)
finished=$(date +%s)
echo "time: $((built - started)) s to install and build, $((finished - built)) s to train"
echo "student: output/wordnet-student/export (a Hugging Face folder); metrics: $metrics"
after=$(value "$metrics" train/loss "$seen")
[ "$before" = "$after" ] || { echo "quickstart.sh: the loss of step $seen was $before, and $after after the resume" >&2; exit 1; }
echo "loss of step $seen: $before before the kill, and again in the run that went on after step $resumed: the same curve"
awk -v t="$teacher" -v w="$with" -v o="$without" 'BEGIN {
  printf "validation loss in nats per token: teacher %.4f, student with the teacher %.4f, without %.4f: ", t, w, o
  gain = o - w
  if (gain > 0) printf "the teacher gained %.4f (%.1f %% of perplexity)\n", gain, 100 * (1 - exp(-gain))
  else printf "the teacher cost %.4f\n", -gain }'
