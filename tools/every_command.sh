#!/usr/bin/env bash
# Runs every command of an installed shiftnet, in an empty folder outside of the checkout.
#
#   tools/every_command.sh ENVIRONMENT     where it is installed, with its extras report and sweep
set -euo pipefail
environment=$(cd "$1" && pwd)
export PATH="$environment/bin:$PATH" JAX_PLATFORMS=cpu
unset PYTHONPATH
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"

ran=()
run() {
  echo "\$ shiftnet $*"
  shiftnet "$@" >printed 2>&1 || { cat printed; exit 1; }
  ran+=("$1")
}

shiftnet --version
python - "$environment" <<'PY'
import sys
from pathlib import Path

import shiftnet
from PIL import Image

assert Path(shiftnet.__file__).is_relative_to(sys.argv[1]), shiftnet.__file__
for color in ("red", "blue"):
    for number in range(10):
        file = Path("photos", color, f"{number}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48, 40), color).save(file)
PY
run models
run predict shiftresnet20_1c_c100 photos --html sheet.html
run count --arch shiftresnet20 --true
small=(--config quickstart --config.epochs=1 --config.model.arch=shiftresnet8)
run train "${small[@]}" --config.model.weights=s3 --config.model.shift=sparse --workdir run
run evaluate run
run shifts run shifts.svg
run pack run net.safetensors
run evaluate net.safetensors
mkdir net
run export run net/net.c
run prepare photos prepared
run sweep "${small[@]}" --config.data.validation=100 --over optimizer.lr=0.1,0.2 --trials 1
run export runs/sweep/trial0000 arrays.npz
run convert arrays.npz --out converted
run reproduce
run report run --out report.html

for command in $(shiftnet | sed -n 's/^  \([a-z]*\)  .*/\1/p'); do
  [[ " ${ran[*]} " == *" $command "* ]] || { echo "$command was not run"; exit 1; }
done
