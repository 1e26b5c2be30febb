#!/usr/bin/env bash
# Builds the wheel, installs it beside the dependencies of an existing environment, and uses it
# from an empty folder that holds decoys of our top-level names.
set -euo pipefail
bin=$(cd "$1" && pwd)
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$bin/pip" wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$work/wheel" .
"$bin/python" -m venv --without-pip "$work/venv"
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/dependencies.pth"
"$bin/pip" --python "$work/venv/bin/python" install --quiet --disable-pip-version-check \
    --no-deps "$work"/wheel/voxelith-*.whl
voxelith="$work/venv/bin/voxelith"

mkdir -p "$work/empty/conf" "$work/empty/pretrain" "$work/empty/data_prep"
for name in conf pretrain data_prep; do
    echo 'raise RuntimeError("the decoy was imported")' > "$work/empty/$name/__init__.py"
done
cd "$work/empty"
"$voxelith" --help > /dev/null
samples=$("$work/venv/bin/python" -P -c 'import samples, pathlib; print(pathlib.Path(samples.__file__).parent)')
case "$samples" in "$work"/*) ;; *) echo "error: the wheel's own package was not used: $samples" >&2; exit 1 ;; esac
"$voxelith" prep input="$samples/pretrain.csv" output=corpus keys=names
"$voxelith" check corpus
"$voxelith" pretrain corpus=corpus run=first trainer=cpu backbone=resenc_small objective=cnn_mae \
    crop_size='[32,48,32]' batch_size=2 steps=4 warmup=1
"$voxelith" export runs/first release
"$voxelith" features ckpt=release output=features.npz \
    input="$(find "$samples" -name '*.nii.gz' | sort | head -1)"
# The encoder that comes along, by its name.
"$voxelith" fetch resenc-small-cnn-mae
# A release of an older version, in an environment that is new: one call, the same features.
"$voxelith" check "$root/tests/releases/encoder-7253723"
"$voxelith" check "$root/tests/releases/segmenter-8698360"
echo "wheel: installed, and prep, check, pretrain, export and features ran beside decoys"
