#!/bin/sh
# What the Dockerfile does, without a container engine: the wheel, then for each target a fresh virtual
# environment from it and the constraints, its size, and its command. From the root of the repository:
#     deploy/containers/rehearse.sh service sidecar
# PYTHON names the interpreter (3.11). Targets are those of the Dockerfile.
set -eu

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

"${PYTHON:-python3}" -m venv "$place/builder"
"$place/builder/bin/pip" install --quiet -c constraints.txt hatchling
"$place/builder/bin/pip" wheel --quiet --no-deps --no-build-isolation -w "$place/wheel" .
wheel=$(echo "$place"/wheel/*.whl)

for target in "$@"; do
  case $target in
    service) extras='[tracing]' command=guard-service ;;
    sidecar) extras='[sidecar,tracing]' command=guard-sidecar ;;
    vision) extras='[vision,fetch,pull,quantization,tracing]' command=guard-service ;;
    *) echo "no target $target" >&2; exit 2 ;;
  esac
  "${PYTHON:-python3}" -m venv --without-pip "$place/$target"
  "$place/builder/bin/pip" --python "$place/$target/bin/python" install --quiet \
    -c constraints.txt "$wheel$extras"
  PYTHONDONTWRITEBYTECODE=1 "$place/$target/bin/$command" --help >/dev/null
  if [ "$target" != sidecar ]; then
    "$place/$target/bin/guard-service" verify starter
  fi
  echo "$target: $(du -sm "$place/$target" | cut -f1) MiB of packages; $command starts"
done
