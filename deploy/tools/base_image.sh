#!/usr/bin/env bash
# Makes the images' base from Debian's own packages, under the name that it has in the hub, where the hub cannot be
# reached. Needs root, mmdebstrap and buildah. Then: make images ARGS="--base-image docker.io/library/debian:bookworm-slim"
set -euo pipefail
name=docker.io/library/debian:bookworm-slim
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mmdebstrap --variant=minbase --include=ca-certificates \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-exclude=/usr/share/info/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
    bookworm "$folder/base.tar"
container=$(buildah from scratch)
buildah add --quiet "$container" "$folder/base.tar" /
buildah config --cmd bash "$container"
buildah commit --quiet --rm --format docker "$container" "$name"
