#!/usr/bin/env bash
# Builds the source distribution and the wheel of what is committed into dist/, checks them, installs
# each into an empty environment and uses it there, from prediction to a packed network of its own.
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
unset PYTHONPATH

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
  "$scratch/user/bin/pip" install --quiet "$file"
  mkdir "$scratch/work"
  (
    cd "$scratch/work"
    export PATH="$scratch/user/bin:$PATH" JAX_PLATFORMS=cpu
    shiftnet --version
    shiftnet | sed -n 's/^  \([a-z]*\) .*/\1/p' | while read -r command; do
      shiftnet "$command" --help >/dev/null
    done
    shiftnet models
    python -c "from PIL import Image; Image.new('RGB', (48, 40)).save('black.png')"
    shiftnet predict shiftresnet20_1c_c100 black.png
    shiftnet train --config quickstart --config.epochs=1 --config.model.arch=shiftresnet8 \
      --config.model.weights=s3 --workdir run
    shiftnet evaluate run
    shiftnet pack run net.safetensors
    shiftnet evaluate net.safetensors
  )
  rm -r "$scratch/work"
done
echo "== ready: $(cd "$dist" && echo *)"
