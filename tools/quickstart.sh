#!/bin/sh
# From a fresh Debian 12 to a distilled student: installs what is missing, builds, makes question/answer records from WordNet,
# trains a small teacher, distils it into a student on two MPI ranks, trains the same student without the teacher, compares.
# Everything it writes is in build/release and output/.
set -eu
cd "$(dirname "$0")/.."
[ -f CMakePresets.json ] || { echo "quickstart.sh: needs the source tree of distill: clone it and run tools/quickstart.sh there" >&2; exit 1; }
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_mpi_yield_when_idle=1
distill=build/release/apps/distill
started=$(date +%s)

title() { printf '\n== %s\n' "$*"; }

# Last value of a column of a metrics file.
last() {
  awk -F, -v name="$2" 'NR == 1 { for (i = 1; i <= NF; ++i) if ($i == name) at = i } NR > 1 && $at != "" { value = $at } END { print value }' "$1"
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
rm -rf output/wordnet-teacher output/wordnet-student output/wordnet-student-alone
"$distill" --config configs/wordnet_teacher.yaml

title "step 2 of 3: distillation (two MPI ranks: one student, one teacher)"
mpirun -np 2 --oversubscribe --bind-to none "$distill" --config configs/wordnet_distill.yaml

title "step 3 of 3: the same student without the teacher (same steps, same seed)"
"$distill" --config configs/wordnet_distill.yaml exp_name=wordnet-student-alone distill_loss_weight=0

title "result"
teacher=$(last output/logs/wordnet-teacher/metrics.csv student/val_loss)
with=$(last output/logs/wordnet-student/metrics.csv student/val_loss)
without=$(last output/logs/wordnet-student-alone/metrics.csv student/val_loss)
finished=$(date +%s)
echo "time: $((built - started)) s to install and build, $((finished - built)) s to train"
echo "student: output/wordnet-student/export (a Hugging Face folder); metrics: output/logs/wordnet-student/metrics.csv"
awk -v t="$teacher" -v w="$with" -v o="$without" 'BEGIN {
  printf "validation loss in nats per token: teacher %.4f, student with the teacher %.4f, without %.4f: ", t, w, o
  gain = o - w
  if (gain > 0) printf "the teacher gained %.4f (%.1f %% of perplexity)\n", gain, 100 * (1 - exp(-gain))
  else printf "the teacher cost %.4f\n", -gain }'
