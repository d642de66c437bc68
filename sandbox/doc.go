// Package sandbox runs a set of manifests on this machine: every pod a network namespace, every injected pod with a real agent and a
// real Envoy, the control plane in this process, real packets in between.
//
//	manifests ─► Start ─► network (netns) ─► pods with probe servers
//	                   ├► control plane, CA, tokens            on the node's address
//	                   └► agents with their Envoys             wait until each says ready
//	attempts ──► Try ──► probes from every pod, what the far end saw, what the sidecars logged ──► matrix.Report
//
// A connection counts as authenticated only on evidence: the sidecar of the pod that was reached logged the connection that its app
// saw as one of the source's identity. Every result is compared with the evaluator's; what differs is a mismatch.
package sandbox
