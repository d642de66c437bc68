// Package packet enforces a pod's verdict.Packets, its policy on UDP and SCTP, with nftables in the pod's network namespace.
//
//	verdict.Packets ──Emit──► Ruleset (chains, rules, sets as the kernel gets them) ──Table.Apply──► kernel, one transaction of what differs
//	                             └──► an interpreter holds it against the value in random tests
//
//	 from outside                                    from the pod's processes
//	      │ prerouting (filter, 0)                        │ postrouting (filter, 0)
//	UDP ──► ingress-udp                             UDP ──► egress-udp
//	        replies ─► egress-udp-replies                   replies ─► ingress-udp-replies
//	SCTP ─► ingress-sctp, …                         SCTP ─► egress-sctp, …
//	all else: as it is                              all else: as it is
//	      │                                               │
//	lo, own node: accept                            lo, proxy's mark, own node: accept
//	port ──► from-…, to-…: addresses in its sets: accept; else drop
//
// UDP-Lite (RFC 3828), of which NetworkPolicy does not speak, is judged as UDP: its sockets take no capability, and it has the same ports in the same
// places. Services are not led for it.
//
// These protocols carry no identity that Envoy could check: an address is all there is, and reports have to say so.
//
// The table is independent of the redirect's. It becomes another in one transaction, so that every packet meets the old rules or the new ones. The kernel
// reads elements of sets as they are at the moment of the lookup, however; so whom a port admits has a name that stands for its content and
// never changes, and the maps of ports are all that does. One that meets old rules whose sets have just gone is dropped: never admitted by neither.
//
//   - Longest prefixes are flattened into intervals of allowed addresses, apart from each other. What no interval holds is dropped.
//   - Prerouting and postrouting, not input and output: so what a pod forwards (containers in it) meets the rules as well; addresses are those
//     after the pod's own destination NAT (-100), and the interface is the one that a packet leaves by after it. A dropped datagram
//     of a local process fails its send with EPERM.
//   - Every packet is judged, those of known flows too: a policy that narrows cuts flows with the commit. What goes back on a flow, as conntrack
//     tells, is judged as the flow is: by the peer, and by the port that was asked for, which is the source's then. At prerouting an answer still
//     comes from the endpoint that a service's flow was led to (its source is translated back at input).
//   - Related flows are not let through: those would be flows that a protocol helper expects and no rule admits. ICMP errors are no UDP and pass
//     anyway, as do neighbour discovery and path MTU: ICMP is never looked at.
//   - Replacing the table leaves conntrack alone. It has to forget flows that policy does not allow any more (Revoke), but nothing depends on how soon: a flow
//     of a service stays with the endpoint that it was led to, and a flow's ports stay those of who began it. What the pod began it never forgets for
//     being denied: it would come back as a flow of the peer's. It ends when both ends are silent.
//   - The pod's own source address opens nothing at ingress: what the pod sends to itself comes through lo. From eth0 it is a forgery.
//   - The mark of the proxy exempts the agent's own name resolution at egress. It takes CAP_NET_ADMIN or CAP_NET_RAW to set.
package packet
