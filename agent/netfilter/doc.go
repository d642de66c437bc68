// Package netfilter keeps a pod's TCP on its way through the sidecar, with nftables in the pod's network namespace.
//
//	         from outside                             from the pod's processes
//	              │                                             │
//	     prerouting (nat, -100)                         output (nat, -100)
//	lo: as it is ─┤                        Envoy, by its user ─┤
//	              │                        the agent, by mark ─┤ as it is
//	              │                        lo (the pod itself) ─┤
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
// What is exempt is so by what an app cannot have: the proxy's user, or a mark that takes CAP_NET_ADMIN or CAP_NET_RAW to set.
//
// Not enforced yet: UDP and SCTP. This table lets them pass.
package netfilter
