#!/usr/bin/env bash
# Makes $PREFIX: a Python environment with Packtrain, its compiled kernels, the small model, and the list of what is in it (CycloneDX).
# Needs Python 3.11 or newer, g++ and a package index. The Dockerfile runs it; so does tests/packaging/test_image.py.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${PREFIX:=/opt/packtrain}" "${TARGET:=cpu}" "${DEMO_MODEL:=1}"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PYTHONDONTWRITEBYTECODE=1
case $TARGET in cpu | cuda) ;; *) echo "TARGET is '$TARGET' and must be cpu or cuda" >&2; exit 64 ;; esac

python3 -m venv --copies "$PREFIX"
# Torch first: afterwards everything else is content with it. Its pin, and Triton's, fall when another build is named.
pins=$(mktemp)
if [ -n "${TORCH:-}" ]; then
  grep -v -E '^(torch|triton)==' constraints.txt > "$pins"
  "$PREFIX/bin/pip" install --quiet --no-cache-dir --constraint "$pins" "$TORCH"
else
  cp constraints.txt "$pins"
fi
"$PREFIX/bin/pip" install --quiet --no-cache-dir --constraint "$pins" '.[postgres]'
rm "$pins"

# Kernels are there for every processor of this kind; no compiler is needed where the image runs.
export PACKTRAIN_CACHE=$PREFIX/cache HOME=$PREFIX/home
mkdir -p "$PACKTRAIN_CACHE" "$HOME"
(cd / && "$PREFIX/bin/python" -m model_parallel.native --all)
if [ "$DEMO_MODEL" = 1 ]; then
  (cd / && "$PREFIX/bin/packtrain" fetch smollm2-135m-instruct > /dev/null)
  mv "$PACKTRAIN_CACHE/models" "$PREFIX/models"
fi
rm -rf "$HOME"

# The list of packages is made by a tool that stays out of the image.
tools=$(mktemp -d)
python3 -m venv "$tools"
"$tools/bin/pip" install --quiet --no-cache-dir cyclonedx-bom==7.5.0
"$tools/bin/cyclonedx-py" environment "$PREFIX/bin/python" --output-format JSON --output-file "$PREFIX/sbom.cdx.json" > /dev/null
rm -rf "$tools"
find "$PREFIX" -name __pycache__ -type d -prune -exec rm -rf {} +
chmod -R a+rX,go-w "$PREFIX"
