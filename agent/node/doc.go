// Package node enforces in the network namespaces of a node's pods, so that their sidecars need no privileges.
//
//	container runtime ── ADD ──► CNI plugin (mantlet-cni): has the pod the sidecar's volume? then a State file, and closed
//	                                  │ /run/mantlet/node/*.json
//	                                  ▼
//	                             Daemon ── one child for each pod, in the pod's network namespace ──► agent.Enforce
//	                                                                          │ node.sock in the pod's volume
//	                                                                          ▼
//	                                                               the pod's agent, without privileges
//
// # Closed from the first packet
//
// The plugin comes last in the chain of the node's CNI configuration, and before the pod's first container. It closes the pod itself, without the daemon: redirect to
// where nobody listens, SYN hold shut, UDP and SCTP dropped. What it cannot tell, or cannot close, it answers with an error: the kubelet then tries again.
//
// How it tells: a pod has a sidecar where the kubelet has made the sidecar's volume for it, which it does before it asks for the sandbox. No API
// server is asked, so that pods start while there is none. A pod that only pretends to have a sidecar is closed and stays so.
//
// A pod that came before the plugin has a sidecar that waits for the daemon, and so no app: the sidecar's startup probe lets none
// start. The daemon looks for such sidecars and takes their pods over (find.go).
//
// # When the daemon goes
//
// Its children go with it, and nothing that they have written: the pods stay enforced by Envoy and by what is in their kernel, and closed to
// destinations that are not known. The next daemon begins with the State files; its children close what is missing, connect to the agents, and are told
// everything again. The control plane hears of a policy's success once the kernel has it, so that it waits meanwhile.
//
// The plugin stays too: the daemon cannot tell an upgrade from its removal, and between two daemons pods must be closed before they start. With the
// plugin and no daemon, and with neither, a pod that has a sidecar for node capture starts no app; a pod without sidecar starts as ever. So whoever
// removes Mantlet has pods made anew without sidecars first, and then the nodes cleaned: [Installation.Uninstall], in the daemon's place.
//
// # Whom it exempts
//
// A pod's sidecar is a user of its own, which its spec says and nobody could know when the pod's images were made (xds/proxyuser). The plugin exempts nobody. A
// child exempts who listens on the agent's socket, as the kernel says, if that is of the users that only sidecars are; from then on nobody else in that pod.
//
// # What an agent may do
//
// The child treats its agent as hostile. It works in that pod's network namespace only, has no capabilities but NET_ADMIN, NET_RAW (re-sent SYNs),
// SETUID (ports kept for the proxy's user) and DAC_OVERRIDE (the way to the socket), and every message is bounded.
package node
