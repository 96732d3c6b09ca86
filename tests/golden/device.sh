#!/usr/bin/env bash
# What a device does with every golden file: inspect, verify, merge, verify the result.
# Usage: device.sh OUT; needs `kilodelta` on the path, nothing else.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$1
mkdir -p "$out"
count=0
for file in "$here"/*/*.kd; do
    folder=$(dirname "$file")
    name=$(basename "$file" .kd)
    base="$folder/base.safetensors"
    [ -e "$folder/$name.base.safetensors" ] && base="$folder/$name.base.safetensors"
    kilodelta inspect "$file" >"$out/$name.txt"
    kilodelta verify -q "$base" "$file" >>"$out/$name.txt"
    kilodelta merge -q "$base" "$file" -o "$out/$name.safetensors" >>"$out/$name.txt"
    kilodelta verify -q "$base" "$file" "$out/$name.safetensors" >>"$out/$name.txt"
    count=$((count + 1))
done
[ "$count" -gt 0 ] || { echo "no golden file found" >&2; exit 1; }
echo "$count golden files inspected, verified and merged by $(kilodelta --version)"
