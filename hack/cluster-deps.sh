#!/bin/bash
# Installs what a test cluster needs and Go modules cannot bring, on Debian and Ubuntu: nft, with which kube-proxy and the port mappings write their
# rules, and libseccomp, which runc is linked with. Elsewhere it says what to install.
set -euo pipefail

missing=()
command -v nft >/dev/null || [ -x /usr/sbin/nft ] || missing+=(nftables)
command -v gcc >/dev/null || missing+=(gcc libc6-dev)
command -v pkg-config >/dev/null || missing+=(pkg-config)
pkg-config --exists libseccomp 2>/dev/null || missing+=(libseccomp-dev)
[ ${#missing[@]} -gt 0 ] || exit 0

command -v apt-get >/dev/null || { echo "cluster-deps: install these, by the names that they have here: ${missing[*]}" >&2; exit 1; }
[ "$(id -u)" = 0 ] || { echo "cluster-deps: run as root: apt-get install ${missing[*]}" >&2; exit 1; }
echo "cluster-deps: installing ${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
