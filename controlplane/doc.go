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
package controlplane
