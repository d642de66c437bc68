// Package relay is a delta xDS proxy with a cache between a pod's Envoy and the control plane, and answers the agent's own questions.
//
//	 Envoy                              relay                                       control plane
//	                       ┌───────────────────────────────┐
//	 subscribe, ACK, NACK  │   envoy.go         plane.go   │  subscribe, versions held, ACK, NACK
//	──────────────────────►│ Envoy's stream    the pod's   │────────────────────────────────────►
//	◄──────────────────────│      │     ╲     ╱  stream    │◄────────────────────────────────────
//	 its resources         │      │    store.go     │      │  resources
//	                       │      │  last good ones │      │
//	                       │   Ledger      ▲       Own ────┼──► the agent's resources: verdicts, …
//	                       └──────┼────────┼───────────────┘
//	                    what Envoy holds   │ questions.go: Ask, OnDestinations, Forget
//	                       (readiness)    the SYN hold
//
// Everything happens in one goroutine, which owns the machine (machine.go); streams.go carries what it puts out. Resources pass as the bytes that
// they came as; only their names and versions are read, and whether an on-demand cluster has endpoints (cluster.go).
//
// # Two streams
//
// The stream to the control plane lives as long as the agent. It begins when there is an SVID, before Envoy does (Envoy's first request also
// carries its node, of which the control plane asks nothing), and is begun again with growing pauses. Its first request of each type lists what is
// held, so that nothing is sent twice. Envoy notices nothing of any of this.
//
// A response is passed to Envoy as one response, and Envoy's ACK or NACK back as the answer to it: what the control plane's ledger says
// is what Envoy said. So when Envoy's stream ends, the control plane's is begun anew without what Envoy had asked for: no response is left
// without an answer, and nothing is called in force that no Envoy holds. A response that Envoy has no part in is ACKed here.
//
// # The cache
//
// What Envoy has ACKed is the last good version; what it refused never is, and does not keep a later one away. An Envoy that starts anew
// is given what is good as soon as it asks, whether there is a control plane or not: clusters first, then, as it comes to ask for them,
// listeners and their extensions. Its answers to that stay here; only then is the control plane told that it is held. A NACK then is logged and
// noted in the Ledger, and each resource is sent once more by itself.
//
// The cache is memory, of the agent's own life: an agent that starts anew starts Envoy anew, and a pod without a control plane and
// without a past is closed. It keeps what Envoy holds, what is on its way there, and denied answers (about 200 bytes each), of at most 4,000 names. An
// Envoy that leaves 64 MiB unanswered loses its stream.
//
// # On-demand clusters
//
// Envoy asks for od|IP:PORT when a connection needs it. Without a control plane, a name that nobody knows is answered as removed: the connection that
// asked fails at once, later ones wait Envoy's 2 s and fail, until the control plane is back and the name is sent after all.
//
// [Relay.Ask] asks the same on the agent's behalf: may the pod connect there? A cluster with endpoints goes to Envoy as well, and the
// answer waits for Envoy's ACK, so that the connection which follows finds it. One without costs Envoy nothing: it is for those who asked for it themselves. From
// then on changes are told ([Relay.OnDestinations]): denials before Envoy hears of them, admissions after it has. A cluster that comes to be denied Envoy
// lets go of, unless it has asked for it. What was denied and is admitted is told as unknown and not followed any more: Envoy gets its cluster when
// somebody asks again. [Relay.Forget] ends that, too.
//
// Envoy applies of a response that it refuses what it can, and does not say what. Where that leaves an on-demand cluster in doubt it counts as
// denied, and is taken out of Envoy where nobody will send it again.
package relay
