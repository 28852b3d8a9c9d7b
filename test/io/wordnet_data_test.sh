#!/bin/sh
# The ready-made WordNet records are what tools/make_wordnet_data.pl makes, and no question is on both sides.
#   wordnet_data_test.sh SOURCE_FOLDER
set -eu
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
"$1/tools/make_wordnet_data.pl" --out "$made" --train 2000 --validation 200
for file in train.jsonl validation.jsonl LICENSE; do
  cmp "$made/$file" "$1/configs/wordnet/$file"
done
cut -d'"' -f4-8 "$made/train.jsonl" | sort > "$made/train"
if cut -d'"' -f4-8 "$made/validation.jsonl" | grep -Fxf "$made/train"; then
  echo "these questions are on both sides" >&2
  exit 1
fi
cmp "$1/configs/wordnet/teacher/tokenizer.json" "$1/configs/wordnet/student/tokenizer.json"
