// Package server serves delta ADS to sidecars and keeps the ledger of what each of them acknowledged. It knows nothing of
// policy, of Kubernetes, or of how resources are made.
//
//	 control plane                          server                                       sidecar
//
//	NewResource ─► NewSet                ┌────────────────────────────┐
//	  marshalled once, shared            │ client "namespace/name"    │
//	                  │                  │                            │
//	                  └─► Publish ──────►│ wanted     (Set, pointer)  │
//	                                     │    │                       │
//	      Refresh ──────────────────────►│ stale ──► OnDemand.Resolve │
//	                                     │    │                       │
//	                                     │    ▼   wake                │
//	                                     │  plan = wanted − held      │   DeltaDiscoveryResponse
//	                                     │    └──► sender goroutine ──┼──────────────────────────► Envoy
//	                                     │                            │
//	      Subscribers ◄──────────────────│ subscriptions ◄── receiver ◄───────────────────────────┐
//	                                     │    │            goroutine  │   DeltaDiscoveryRequest   │
//	      Ledger ◄── Wait, InForce ──────│ held, acked, refused ◄┘    │   subscribe, ACK, NACK ───┘
//	      OnEvent ◄──────────────────────│                            │
//	                                     └────────────────────────────┘
//
// # Sending
//
// One goroutine per stream sends, and ends when there is nothing to send: nearly all sidecars wait for nothing nearly always. Woken, it
// compares what the client should hold with what it holds or has on its way, and sends the difference; what changes while it writes is part of
// its next comparison. So there is no queue, nothing is delayed on purpose, and a client that reads slowly skips versions and holds up nobody. No
// lock is held while sending, resolving or marshalling; each client has a lock of its own.
//
// Several responses may wait for their ACK, but a resource only has one version on its way: the next waits for the ACK of the
// last, at most Config.AckPatience. A narrower policy is thus never held up by an unrelated resource, and by a sidecar that has
// stopped answering only that long.
//
// Within one comparison the order is: clusters, other types, extensions (ECDS), listeners; then removals, the other way round.
// A published cluster is removed only when no listener change is waiting for its ACK. Nothing waits for another type's ACK
// otherwise, so that a resource which is refused holds up nothing else.
//
// # Subscriptions
//
// As the protocol has it: the wildcard ("*", or the first request for listeners or clusters without names) gives everything
// published and never what others asked for on demand, and is answered even when there is nothing. A name gives that resource,
// and is answered even if the client has it already; one that does not exist is answered at once as removed, and sent when it
// comes to exist. After a reconnect initial_resource_versions is believed: what is the same is not sent again and counts as
// acknowledged, what should be gone is removed. Nothing is answered before the first Publish for a client.
//
// What Envoy 1.40 makes of that for on-demand clusters (TestEnvoyOnDemand): a name that is answered as removed fails the
// connection that asked at once. But Envoy keeps the subscription and does not ask again, so every later connection to that
// name waits for its lookup timeout, unless the name is pushed meanwhile: that repairs it, waiting connections included. A
// cluster without endpoints fails every connection at once, and is repaired by a push in the same way. OnDemand should
// therefore answer what is only denied, or may be asked for again, with a cluster without endpoints.
//
// # NACK
//
// A refused version is remembered per client and never sent to it again; the version before stays in force, and a new one is
// sent at once. Envoy refuses a response as a whole but applies what it can, unless validation fails before anything is applied;
// it names the guilty in the first case only. The innocent are sent again either way, because Envoy does not remember versions
// of a refused response. Where none was named, each is sent alone: that is the only time when bytes that were in a refused
// response are repeated, and it tells who is guilty.
//
// Refusals outlive the stream. They are forgotten when a client comes back and holds nothing of that type: a fresh Envoy, which
// needs everything and may well take what the one before it could not (a port that was in use).
package server
