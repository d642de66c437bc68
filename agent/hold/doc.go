// Package hold makes connect() tell the truth: a TCP connection that policy denies is refused at the first attempt, instead of being
// accepted by the local proxy and closed later.
//
//	app's SYN ── output, filter, -150: table inet mantlet_hold ── output, nat, -100: the redirect ── Envoy
//	                │
//	  not TCP, no SYN, the proxy, the agent, lo, the node's other ports ─► on
//	                │
//	  outside the cluster's prefixes, no service, no node port: admitted by an ipBlock? ─► on      else reset
//	                │
//	  in denied4/6  ─► reset
//	  in allowed4/6 ─► on (and noted in used4/6)
//	                │
//	  neither: more than Rate a second ─► reset
//	           NFLOG, and dropped
//	                │
//	             Holder ── Asker: may this pod connect there?
//	                │        no answer: no, for a short time
//	                ├─► element into allowed or denied, in one transaction
//	                └─► the very SYN once more, by a raw socket: on to the redirect, or reset
//
//	SYN from outside ── prerouting, filter, -150 ── from outside the cluster's prefixes: admitted by an ipBlock? ─► on      else reset
//
// The sets only tell the app early; Envoy stays the authority over who is let through. All the same everything here fails closed. A SYN
// to an unknown destination is dropped by the kernel before anybody is asked, so a Holder that is slow, dead, or not there yet opens
// nothing: the app's connect() waits, and its SYN is asked about when TCP sends it again. An error of the Asker is a denial.
//
// # The SYN that is sent again
//
// It carries [Mark], not the proxy's mark, because it has to meet the redirect like the app's own packet. In this table the mark lets it
// pass nothing: it meets the same sets, where its element has just been written. It only keeps a re-sent SYN from being held a second time,
// where the element has gone again in between: it is then dropped, and TCP sends another. The raw socket belongs to the agent's user, so
// that user must not be one that the redirect exempts; [Open] refuses it.
//
// # Bounds
//
// Whoever scans 65,000 ports of 256 addresses gets no more than Config says: Rate questions a second are asked (the kernel refuses the
// rest without waking the agent), MaxQuestions are outstanding, MaxHeld SYNs are kept, and MaxAllowed and MaxDenied destinations are known,
// of which the least recently used go first; a scan pushes denied destinations out, never allowed ones. With the defaults that is below 2 MB
// of elements in the kernel, 2 MB of bookkeeping here, and 3 MB of SYNs if all of them carry data (TCP Fast Open), 0.2 MB if none does.
// MaxAllowed is what the Envoy beside it can hold: each allowed destination is a cluster there, of 38 to 68 KB.
//
// # Outside the cluster
//
// Addresses outside the cluster's prefixes need no question, but for external addresses of services, with their ports, which the Holder is told of, and
// ports of the range of node ports: whether an address is a node's, and the port a service's, only the control plane knows. For all others what the pod's tables say of peers without an identity is written as interval
// sets, one pair for each group of ports. 10,000 prefixes are replaced in 0.2 s; with more than MaxOutside, or more than the system's send
// buffer takes (net.core.wmem_max, in user namespaces), that direction is left to Envoy: connect() then succeeds and the connection is closed.
//
// Whoever connects to the pod from outside the prefixes is taken for a peer without an identity before it can prove one. Where something on the
// way changes the source address of pods to one outside, so that a sidecar's mTLS comes from there, those addresses belong into Config.Cluster.
//
// # Others at the table
//
// A [Holder] is a table for netfilter.Guard: rules, chains and sets are put back in place. Elements are not looked at: who deletes
// one of a destination inside the cluster has it asked about again; of an address outside, has it refused until that part of the
// policy changes; who adds one lets the SYN go on to Envoy.
//
// # Without NFLOG
//
// Where the kernel has no NFLOG the SYN to an unknown destination goes on to Envoy. Whoever knows what Envoy was told may call [Holder.Set], so that the
// next attempt is truthful; the agent does not know, and leaves destinations inside the cluster to Envoy. [Holder.Holding] tells which of the two it is.
// A group that cannot be bound for another reason, or cannot be read any more, opens nothing: Run fails, and what is unknown stays held.
package hold
