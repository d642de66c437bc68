// Command dataplane measures what a connection between two pods costs, with real Envoys in network namespaces: without any, through a pair of
// plaintext Envoys, through a pair that speaks mTLS and holds a linear list of principals as Istio writes it, and through Mantlet's sidecars
// as they are shipped, agents and all.
//
//	go run ./test/dataplane                           the figures, as tables
//	go run ./test/dataplane -o json                   one object
//	go run ./test/dataplane -docs docs/performance    what docs/performance.md shows
//	go run ./test/dataplane -variants plaintext,mantlet-1 -rounds 3
//
// All variants run beside each other the whole time and take turns, kind of traffic by kind, in every round; every other round goes backwards.
// Only ratios between variants of one round say anything, of which the median over all rounds is taken: what else the machine does hits
// both sides of them.
//
//	app ──► [Envoy] ──── veth ── node ── veth ────► [Envoy] ──► app        each app a process of its own; [ ] captures by nftables
//
// What proxies cost is CPU time of their processes, by the kernel's own clocks. It includes what the kernel does in their name: of the
// network between two namespaces that is most of it.
package main
