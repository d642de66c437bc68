package netfilter

import (
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// resetTimeout is the name of the conntrack timeouts of the connections that a pod begins.
const resetTimeout = "reset"

// tcpTimeouts are the kernel's, in seconds, but for connections that were reset, which it would remember for 10 s. In that time it lets a
// new connection with the same addresses and ports take the way of the old one without asking the rules, if the other end had reset
// that (nf_conntrack_tcp_packet: a SYN in state CLOSE is ignored). An app's connection that Envoy resets is remembered as redirected; when Envoy
// itself then connects to the same place and gets the same port, it would connect to itself. The other way round an app's
// connection would pass Envoy by. What is forgotten at once is asked about again.
var tcpTimeouts = expr.CtStatePolicyTimeout{
	expr.CtStateTCPSYNSENT: 120, expr.CtStateTCPSYNRECV: 60, expr.CtStateTCPESTABLISHED: 5 * 24 * 3600,
	expr.CtStateTCPFINWAIT: 120, expr.CtStateTCPCLOSEWAIT: 60, expr.CtStateTCPLASTACK: 30, expr.CtStateTCPTIMEWAIT: 120,
	expr.CtStateTCPCLOSE:    0,
	expr.CtStateTCPSYNSENT2: 120, expr.CtStateTCPRETRANS: 300, expr.CtStateTCPUNACK: 300,
}

// addTimeouts adds the object that forgetReset names. The package nftables writes what it is given into a map of its own, without a
// lock.
func addTimeouts(conn *nftables.Conn) {
	timeouts.Lock()
	defer timeouts.Unlock()
	conn.AddObj(&nftables.NamedObj{
		Table: table(), Name: resetTimeout, Type: nftables.ObjTypeCtTimeout,
		Obj: &expr.CtTimeout{L3Proto: unix.NFPROTO_IPV4, L4Proto: unix.IPPROTO_TCP, Policy: tcpTimeouts}, // holds for IPv6 too
	})
}

var timeouts sync.Mutex

// rememberChain comes after conntrack, and before the NAT chain of its hook.
func rememberChain() *nftables.Chain {
	accept, priority := nftables.ChainPolicyAccept, nftables.ChainPriority(-160)
	return &nftables.Chain{
		Name: "remember", Table: table(), Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookOutput, Priority: &priority, Policy: &accept,
	}
}

// forgetReset gives TCP connections the timeouts.
func forgetReset() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Objref{Type: unix.NFT_OBJECT_CT_TIMEOUT, Name: resetTimeout},
	}
}
