#!/bin/bash
# The demo: the policies of examples/shop, enforced by real Envoys in network namespaces on this machine; then one of them is narrowed
# while connections are open. It ends by itself, and with 0 only if what it is meant to show has been seen.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dir=$(mktemp -d)
sandbox=
ended() {
	[ -z "$sandbox" ] || kill -INT "$sandbox" 2>/dev/null || true
	rm -rf "$dir"
}
trap ended EXIT

cp -R examples/shop "$dir/shop"
policy=$dir/shop/shop/policies/db.yaml
mkfifo "$dir/out" "$dir/err"
tee "$dir/out.txt" <"$dir/out" &
out=$!
tee "$dir/err.txt" <"$dir/err" >&2 &
err=$!

# wait_for TEXT FILE: until the sandbox has said so.
wait_for() {
	until grep -q "$1" "$2" 2>/dev/null; do
		kill -0 "$sandbox" 2>/dev/null || { echo "demo: the sandbox has ended before it said: $1" >&2; exit 1; }
		sleep 0.1
	done
}

set -x
bin/mantlet sandbox -f "$dir/shop" --external 203.0.113.0/24:443 --external 203.0.113.128/25:443 --flows 1 --explain 3 \
	--watch --stream shop/api-0=shop/db-0:5432 --stream shop/report-0=shop/db-0:5432 >"$dir/out" 2>"$dir/err" &
{ sandbox=$!; set +x; } 2>/dev/null

wait_for 'watching for edits' "$dir/err.txt"
wait_for 'opened  shop/report-0' "$dir/out.txt"
echo
echo "Second act: db no longer admits the report. The api's connection to the same port of the same pod is its neighbour."
sed '/app: report/,$d' examples/shop/shop/policies/db.yaml | sed '$d' | sed '$d' | sed '$d' >"$dir/narrowed.yaml"
diff -u --label before --label after examples/shop/shop/policies/db.yaml "$dir/narrowed.yaml" || true
cp "$dir/narrowed.yaml" "$policy"
wait_for 'differ from the evaluator' "$dir/out.txt"

kill -INT "$sandbox"
code=0
wait "$sandbox" || code=$?
sandbox=
wait "$out" "$err"
[ "$code" = 0 ] || exit "$code"
for seen in 'cut     shop/report-0 → shop/db-0:5432' 'lives   shop/api-0 → shop/db-0:5432' 'closed  shop/api-0 → shop/db-0:5432 in good order'; do
	grep -q "$seen" "$dir/out.txt" || { echo "demo: not seen: $seen" >&2; exit 1; }
done
