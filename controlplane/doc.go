// Package controlplane is the loop: a change comes in, the affected subjects are compiled, what became different is published.
//
//	source ──Apply──► policy.Index ──► which subjects, pods, services?
//	                        │
//	                        ├─ verdicts differ ──► xds.Gate, RBAC, Outbound ──► server.Publish to the subject's sidecars
//	                        ├─ addresses differ, for UDP and SCTP ──► Packets to the pods that name them
//	                        └─ destinations differ ──► server.Refresh of the on-demand clusters that lead there
//
//	sidecar ── od|IP:PORT ──► Resolve: endpoints that both ends' policies admit for this identity, each with the SAN it must show
//	agent   ── CSR + token ─► Sign: the SVID of the token's pod
//
// Equal bytes are marshalled once: the resources of a subject are shared by its replicas on a node.
//
// # No gap
//
// An edit reaches sidecars one after the other, and in each of them its resources one after the other. No order among them is
// needed for this: what neither the policies before nor those after an edit allow never gets through, and what both allow never fails.
//
//   - An Update is one change of the index, published when it is complete. Nobody is sent what holds between the deletion of one policy and
//     the creation of the next.
//   - Each lock that a connection passes (the on-demand cluster or the outbound listener at its source; the gate and rbac at its destination) is
//     one resource, which Envoy replaces as a whole. A connection is admitted if all of them admit it.
//   - The lock at the source answers for both ends: an on-demand cluster has those endpoints only that the egress policy of the source
//     and the ingress policy of the destination admit. So it denies what is denied by either, whichever of both has changed, before as well as
//     after an edit that swaps the two; a mixture of an old egress policy and a new ingress policy cannot add up to an admission. At an isolated
//     destination the gate answers for both ends as well, which holds for peers that slip past their own sidecar.
//
// test/e2e.TestNoGap tries it while 200 edits are made.
package controlplane
