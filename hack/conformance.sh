#!/bin/bash
# conformance.sh OUT [CAPTURE...]: the upstream NetworkPolicy tests against Mantlet, permissive and then strict, on a cluster made for each way of
# capture: node and sidecar, or those named.
#
# The tests' namespaces are at Pod Security baseline. Node mode runs there. Sidecars that redirect by themselves need NET_ADMIN, which baseline forbids: for
# them the API server runs without that plugin.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=$1
shift
tree=$(go run ./test/conformance -print-tree -out "$out") # before the build: what changes later is not tested
make build image # what is tested is this tree, not what somebody built before
[ $# -gt 0 ] || set -- node sidecar
dir=.cache/conformance
export KUBECONFIG="$PWD/$dir/pki/admin.conf"
cluster() { go run ./test/cluster/cmd/cluster --dir "$dir" "$@"; }
kubectl=$(cluster binaries kubectl)

trap 'cluster down' EXIT
failed=
for capture; do
	case $capture in
	node) up="" set="" daemon=ds/mantlet-node ;;
	sidecar) up="--disable-admission PodSecurity" set="--set podSecurity=ignored" daemon="" ;;
	*) echo "conformance: capture $capture: node or sidecar" >&2 && exit 2 ;;
	esac
	cluster down
	# shellcheck disable=SC2086 # several words, or none
	cluster up --nodes 2 --image dist/mantlet.tar $up
	for mode in permissive strict; do
		# shellcheck disable=SC2086
		bin/mantlet install --set image=localhost/mantlet:dev --set injectByDefault=true --set capture=$capture --set mtls=$mode $set |
			"$kubectl" apply --server-side -f -
		for workload in deploy/mantlet $daemon; do
			"$kubectl" -n mantlet-system rollout status "$workload" --timeout=120s
		done
		go run ./test/conformance -mode "capture $capture, $mode" -tree "$tree" -logs ".cache/conformance-logs/$capture-$mode" -out "$out" || failed="$failed $capture-$mode"
	done
done
[ -z "$failed" ] || { echo "conformance: failed:$failed (logs: .cache/conformance-logs)" >&2; exit 1; }
