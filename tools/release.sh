#!/usr/bin/env bash
# Builds the source distribution and the wheel of what is committed into dist/, checks them, installs
# each into an empty environment and runs every command there.
#
# One wheel serves all platforms: what is written in C++ is compiled on the user's machine, for its
# processor, when it is first used.
#
#   tools/release.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${1:-python3}")
dist=$PWD/dist
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

echo "== build"
mkdir "$scratch/source"
git archive HEAD | tar -x -C "$scratch/source"
"$python" -m venv "$scratch/build"
"$scratch/build/bin/pip" install --quiet build twine
rm -rf "$dist"
"$scratch/build/bin/python" -m build --outdir "$dist" "$scratch/source" >"$scratch/build.log" \
  || { tail -20 "$scratch/build.log"; exit 1; }
"$scratch/build/bin/twine" check --strict "$dist"/*

for file in "$dist"/*; do
  echo "== $(basename "$file") in an empty environment"
  "$python" -m venv --clear "$scratch/user"
  "$scratch/user/bin/pip" install --quiet "$file[report,sweep]"
  tools/every_command.sh "$scratch/user"
done
echo "== ready: $(cd "$dist" && echo *)"
