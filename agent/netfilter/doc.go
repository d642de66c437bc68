// Package netfilter keeps a pod's TCP on its way through the sidecar, with nftables in the pod's network namespace.
//
//	         from outside                             from the pod's processes
//	              │                                             │
//	     prerouting (nat, -100)                         output (nat, -100)
//	lo: as it is ─┤                        Envoy, by its user ─┤
//	own node: as  │                        the agent, by mark ─┤ as it is
//	  it is      ─┤                        lo (the pod itself) ─┤
//	         every TCP                                     every TCP
//	  redirect to names.InboundPort             redirect to names.OutboundPort
//
// Both chains live in one table of the family inet, so IPv4 and IPv6 go the same way. The table is written in one transaction
// that also deletes its predecessor: there is no moment without it, however often it is written.
//
// The redirect is all that is needed to stay closed. Where nobody listens on the capture ports (Envoy has not started, has died,
// or has no configuration yet) the kernel answers the redirected SYN with a reset: refused, in both directions. Nothing takes the table
// away when the agent ends.
//
// The redirect takes every packet that begins a conntrack entry, not only a SYN. It has to: with tcp_loose (the kernel's default) a
// lone ACK from outside begins an entry too. Left alone, that entry would carry no translation, and a SYN on the same ports that
// comes before the kernel's reset has ended the entry would reach the app past Envoy. The price is paid by connections that are older
// than the first table: their next packet begins an entry as well, is redirected, and the connection is reset. In a pod there are none,
// because the table comes before the first app container; and a connection that no policy has seen should not live on. Connections that
// conntrack knows are not touched when the table is written again.
//
// A connection that was reset is forgotten at once: the kernel would let the next one with the same addresses and ports take its way, and
// the app and Envoy draw their ports from the same range (timeout.go).
//
// What else is exempt is so by what an app cannot have: the proxy's user and group, which are drawn for each pod (xds/proxyuser), or a mark that
// takes CAP_NET_ADMIN or CAP_NET_RAW to set. The table also remembers that user ([Exempted]): whoever comes to the pod later, the next agent
// or the node's next daemon, goes on with it.
//
// # The own node
//
// The own node always reaches its pods. What comes from its addresses is left as it is, once they are known (Redirect.SetNode): kubelet's TCP
// probe of a closed port fails as it does without a sidecar, where Envoy would accept first, and a pod whose Envoy is away is not restarted
// for that. What that trusts is what Envoy's own chain for the node trusts:
//
//   - A source address. Whoever gets answers sent to the node's address, a neighbour on the same bridge with CAP_NET_RAW who poses as the
//     gateway, was admitted before and is now. Who only sends gets a half-open connection, in the app's queue now instead of Envoy's.
//   - What a service proxy sends on from the node with the node's own address (node ports, external addresses, externalTrafficPolicy Cluster) is
//     admitted like the node. Clients with a sidecar do not come that way: these are destinations of their sidecars.
//   - Entries begun from outside let answers pass, and an app can send "answers" of its own. To the node it may send anything but what goes to
//     node ports and to services at its addresses, so segments that come from such a port are redirected like everybody's.
//   - An address that is the node's no more is captured from then on, and connections that it has open are cut. The app's end notices when
//     it sends something.
//
// It costs: the node's connections make no flow records, and mTLS that arrives with the node's address, from a sidecar whose packets something
// translates on the way, reaches the app as it is. No sidecar's on-demand clusters lead through a service proxy.
//
// Not enforced yet: UDP and SCTP. This table lets them pass.
package netfilter
