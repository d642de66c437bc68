// Package revoke cuts open connections that policy no longer allows, and only those.
//
//	Envoy ──access logs──► flows ──Opened, Closed──► table of open connections
//	                                                       │ each held against …
//	control plane ──Verdicts──► verdicts.Holder ───────────┘ … the verdicts in force
//	                                                       ▼ denied
//	                             sock_diag: both of Envoy's sockets reset ──► record in the flow log
//
// The gate and the on-demand clusters decide on new connections; Envoy asks nobody again about those that are open. Either end cuts what its
// own verdicts deny: the destination by its ingress (which holds the peers' egress where it is isolated), the source by its egress.
//
// # Why none is missed
//
// Let a narrowing take effect in the agent at A (Holder.Apply) and in Envoy at E, in either order.
//
//   - Told of before A: it is in the table, and the sweep that Apply sets off judges it.
//   - Told of after A: it is judged when it is told of, by the verdicts that are then in force. So is one that Envoy let pass between A
//     and E.
//
// There is nothing between the two: both take the table's lock, and the verdicts are read under it. A connection is told of when Envoy's
// own connection onward stands, and at once; what it may have sent in that millisecond was sent in time, for E had not come.
//
// # Why none is cut that newer policy admits
//
// The control plane sends Verdicts before anything that is for Envoy (xds/server), so the relay receives them first. It does not wait for them
// to be applied (relay.Coming tells that they have yet to be): a connection that the verdicts in force deny, and that is younger than a
// second, is judged again every other millisecond as long as newer ones are about to be applied.
//
// # Why only those
//
// Envoy gives every connection an upstream connection of its own (xds: unshared). Its two sockets are looked up by their addresses and
// destroyed by the kernel's cookie of the very socket: a port that was used again, or a listener on it, is another socket. Resetting both
// tells either end at once, also one that does not read, and nobody takes the end for a complete transfer.
//
// Ends are told of up to 100 ms late, many in one message, by the log of the listener. Until then the table holds a connection that is gone, for which the kernel finds nothing;
// for Envoy to have another one with the same addresses and ports by then, it would have to go through its whole range of ports in that time.
// Where an end overtakes its beginning, the next audit forgets the connection.
//
// # What Envoy did not tell
//
// Entries could get lost with a stream between Envoy and the agent. So from time to time the table is held against the kernel: what is in the
// table and no longer there is forgotten, and a socket of Envoy's that nobody told of within the grace of a handshake is closed, loudly,
// for it cannot be judged.
package revoke
