// Package agent is the process beside Envoy in a pod's sidecar: it wires the rooms below it and says when the pod is enforced.
//
//	0 whom the redirect exempts, as whom Envoy runs: who it was before in this pod, or somebody drawn at random
//	1 netfilter: SYN hold shut, redirect in place ─ nothing listens yet: refused; packet policy in place ─ UDP and SCTP: dropped
//	2 agent.sock: relay (ADS), sds, flows            control plane
//	3 svid: key, CSR ───────────────────────────────────►│
//	4 envoy: started ──agent.sock──► relay ──mTLS────────►│
//	5 ready: 1 still in place, the SYN hold at work, SVID valid, verdicts held, packet policy in the kernel, policy ACKed, capture ports listened on by Envoy
//
//	SIGTERM: not ready, Envoy drains and ends, then everything else. The redirect stays: a pod without its sidecar is closed. So does
//	the packet policy that was in force last.
//
// # Files
//
// All are in the run directory, which only the agent's user and the proxy's group may enter:
//
//	agent.lock        held while an agent runs
//	agent.sock        for Envoy: ADS, SDS (private key!), access logs
//	status.sock       for the kubelet: GET /ready, GET /started, ?wait=30s
//	enforced          the network namespace in which the pod was enforced once
//	envoy/            Envoy's own: bootstrap.json, admin.sock
//
// Whoever connects to agent.sock must be the very Envoy process that this agent started: the kernel tells the pid and user at the
// other end of a unix socket (SO_PEERCRED). The file modes keep other users away already; the pid holds where everybody is the
// same user, in a user namespace that maps one user only.
package agent
