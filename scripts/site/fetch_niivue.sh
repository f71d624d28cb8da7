#!/usr/bin/env bash
# bash scripts/site/fetch_niivue.sh [VERSION]: fetches the viewer of the page from npm anew, with the licences of what is in it
set -euo pipefail
cd "$(dirname "$0")/../.."
version=${1:-0.69.0}
target=hf_binaryformer/app/static/niivue
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fetch() { # npm checks the registry's own hash
    (cd "$work" && npm pack --silent "$1" >/dev/null && mkdir -p "$2" && tar -xzf ./*.tgz -C "$2" --strip-components 1 && rm ./*.tgz)
}
fetch "@niivue/niivue@$version" niivue
cp "$work/niivue/dist/niivue.umd.js" "$target/"
# npm's package of NiiVue has no licence file; LICENSE is the one of its repository. The build holds these libraries.
: >"$work/licences"
for name in @lukeed/uuid@2 @ungap/structured-clone@1 array-equal@1 fflate@0.8 gl-matrix@3 nifti-reader-js@0.8 zarrita@0.5 \
    @zarrita/storage@0.1 numcodecs@0.3 reference-spec-reader@0.2 unzipit@1 uzip-module@1; do
    folder=$(tr '/@' '__' <<<"$name")
    fetch "$name" "$folder"
    licence=$(find "$work/$folder" -maxdepth 1 -iname 'licen[cs]e*' | sort | head -1)
    kind=$(node -p "const p = require('$work/$folder/package.json'); p.name + ' ' + p.version + ', ' + (p.license || 'see below')")
    { echo "== $kind"; echo; [ -n "$licence" ] && cat "$licence"; echo; } >>"$work/licences"
done
cp "$work/licences" "$target/LICENSES-of-libraries.txt"
(cd "$target" && sha256sum niivue.umd.js)
