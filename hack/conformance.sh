#!/bin/bash
# conformance.sh OUT: the upstream NetworkPolicy tests against Mantlet on a cluster made for them: permissive, then strict.
#
# Sidecars need NET_ADMIN, which Pod Security baseline forbids, and the tests' namespaces are baseline: the API server runs without that plugin.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=$1
dir=.cache/conformance
export KUBECONFIG="$PWD/$dir/pki/admin.conf"
cluster() { go run ./test/cluster/cmd/cluster --dir "$dir" "$@"; }
kubectl=$(cluster binaries kubectl)

cluster down
trap 'cluster down' EXIT
cluster up --nodes 2 --disable-admission PodSecurity --image dist/mantlet.tar
failed=
for mode in permissive strict; do
	bin/mantlet install --set image=localhost/mantlet:dev --set injectByDefault=true --set podSecurity=ignored --set mtls=$mode |
		"$kubectl" apply --server-side -f -
	"$kubectl" -n mantlet-system rollout status deploy/mantlet --timeout=120s
	go run ./test/conformance -mode "$mode" -logs ".cache/conformance-logs/$mode" -out "$out" || failed="$failed $mode"
done
[ -z "$failed" ] || { echo "conformance: failed:$failed (logs: .cache/conformance-logs)" >&2; exit 1; }
