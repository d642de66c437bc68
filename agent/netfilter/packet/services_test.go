package packet

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds/names"
)

var (
	vip4, vip6 = netip.MustParseAddrPort("10.96.0.10:53"), netip.MustParseAddrPort("[fd96::10]:53")
	// backends are at the first two peers of each family.
	backends4 = []netip.AddrPort{netip.MustParseAddrPort("10.99.0.3:9053"), netip.MustParseAddrPort("10.99.0.4:9053")}
	backends6 = []netip.AddrPort{netip.MustParseAddrPort("[fd99::3]:9053"), netip.MustParseAddrPort("[fd99::4]:9053")}
)

// dns is a policy that admits the backends at egress, and leads a service to those given.
func dns(v4, v6 []netip.AddrPort) verdict.Packets {
	p := verdict.Packets{Egress: []verdict.PacketBlock{udp(9053, 9053, "10.99.0.3/32", "10.99.0.4/32", "10.99.0.2/32", "fd99::2/128", "fd99::3/128", "fd99::4/128")}}
	if len(p.Egress) == 1 {
		slices.SortFunc(p.Egress[0].Peers, verdict.PacketPrefix.Compare)
	}
	for _, s := range []verdict.PacketService{{Protocol: verdict.UDP, Addr: vip4, Endpoints: v4}, {Protocol: verdict.UDP, Addr: vip6, Endpoints: v6}} {
		if len(s.Endpoints) > 0 {
			p.Services = append(p.Services, s)
		}
	}
	return p
}

// routes gives the pod a way out: cluster IPs are on no link.
func routes(t *testing.T) {
	t.Helper()
	addRoute(t, "10.96.0.0/16", node4)
	addRoute(t, "fd96::/64", node6)
}

// asks sends a word to a service from a socket of its own, and has the backend that gets it answer. It returns which that is; none: the kernel
// refuses the datagram.
func asks(t *testing.T, c net.PacketConn, vip netip.AddrPort, backends map[netip.AddrPort]net.PacketConn) netip.AddrPort {
	t.Helper()
	if _, err := c.WriteTo([]byte("question"), net.UDPAddrFromAddrPort(vip)); err != nil {
		if !errors.Is(err, syscall.EPERM) {
			t.Fatalf("send to %s: %v", vip, err)
		}
		return netip.AddrPort{}
	}
	type question struct {
		at   netip.AddrPort
		from net.Addr
	}
	got := make(chan question, len(backends))
	for at, b := range backends {
		go func() {
			buf := make([]byte, 16)
			if _, from, err := b.ReadFrom(buf); err == nil {
				got <- question{at, from}
			} else {
				got <- question{}
			}
		}()
	}
	q := <-got
	for _, b := range backends { // ends the other readers
		_ = b.SetReadDeadline(past)
	}
	for range len(backends) - 1 {
		<-got
	}
	for _, b := range backends {
		_ = b.SetReadDeadline(never)
	}
	if _, err := backends[q.at].WriteTo([]byte("answer"), q.from); err != nil {
		t.Fatal(err)
	}
	word, from := receive(t, c)
	if word != "answer" || from.(*net.UDPAddr).AddrPort() != vip {
		t.Fatalf("got %q from %s, not from %s", word, from, vip)
	}
	return q.at
}

// A datagram to a service reaches its endpoints, each of them some time, and nobody else; the answer comes from the service. One without
// endpoints is refused at once.
func TestServices(t *testing.T) {
	outside := surroundings(t)
	routes(t)
	for _, c := range []struct {
		vip      netip.AddrPort
		backends []netip.AddrPort
	}{{vip4, backends4}, {vip6, backends6}} {
		open := map[netip.AddrPort]net.PacketConn{}
		for _, b := range c.backends {
			open[b] = socket(t, outside, b.String())
		}
		apply(t, dns(backends4, backends6))
		seen := map[netip.AddrPort]bool{}
		for range 64 { // missing one of two would be chance once in 2^64
			seen[asks(t, socket(t, nil, netip.AddrPortFrom(same(c.vip.Addr(), own), 0).String()), c.vip, open)] = true
			if len(seen) == len(c.backends) {
				break
			}
		}
		if len(seen) != len(c.backends) || seen[netip.AddrPort{}] {
			t.Errorf("%s led to %v", c.vip, seen)
		}
		apply(t, dns(backends4[:1], backends6[:1]))
		for range 8 {
			if got := asks(t, socket(t, nil, netip.AddrPortFrom(same(c.vip.Addr(), own), 0).String()), c.vip, open); got != c.backends[0] {
				t.Errorf("%s led to %s, which is no endpoint", c.vip, got)
			}
		}
		apply(t, dns(nil, nil))
		if got := asks(t, socket(t, nil, netip.AddrPortFrom(same(c.vip.Addr(), own), 0).String()), c.vip, open); got.IsValid() {
			t.Errorf("%s without endpoints led to %s", c.vip, got)
		}
	}
}

// A port of the node that is a service's leads to the endpoints, or nowhere; all others are the node's, which is always reached.
func TestNodePorts(t *testing.T) {
	outside := surroundings(t)
	p := dns(nil, nil)
	p.Node = []netip.Addr{node4, node6}
	for _, at := range p.Node {
		p.Services = append(p.Services, verdict.PacketService{Protocol: verdict.UDP, Addr: netip.AddrPortFrom(at, 30053)})
		p.Services = append(p.Services, verdict.PacketService{Protocol: verdict.UDP, Addr: netip.AddrPortFrom(at, 30054), Endpoints: backends(at)[:1]})
	}
	apply(t, p)
	for _, at := range p.Node {
		from := func() net.PacketConn { return socket(t, nil, netip.AddrPortFrom(same(at, own), 0).String()) }
		backend := backends(at)[0]
		open := map[netip.AddrPort]net.PacketConn{backend: socket(t, outside, backend.String())}
		if got := asks(t, from(), netip.AddrPortFrom(at, 30053), open); got.IsValid() {
			t.Errorf("node port 30053 of %s led to %s", at, got)
		}
		if got := asks(t, from(), netip.AddrPortFrom(at, 30054), open); got != backend {
			t.Errorf("node port 30054 of %s led to %s", at, got)
		}
		its := netip.AddrPortFrom(at, 30055)
		if got := asks(t, from(), its, map[netip.AddrPort]net.PacketConn{its: socket(t, outside, its.String())}); got != its {
			t.Errorf("the node's own port %s led to %s", its, got)
		}
	}
}

func backends(a netip.Addr) []netip.AddrPort {
	if a.Is4() {
		return backends4
	}
	return backends6
}

// A flow stays with its endpoint as long as that is one, and goes to another when it is none any more; flows of others do not notice.
func TestServiceFlowsAreRevoked(t *testing.T) {
	outside := surroundings(t)
	routes(t)
	open := map[netip.AddrPort]net.PacketConn{}
	for _, b := range backends4 {
		open[b] = socket(t, outside, b.String())
	}
	apply(t, dns(backends4, nil))
	flows := map[netip.AddrPort]net.PacketConn{} // one to each backend
	for range 64 {
		c := socket(t, nil, "10.99.0.2:0")
		flows[asks(t, c, vip4, open)] = c
		if len(flows) == 2 {
			break
		}
	}
	gone, stays := backends4[0], backends4[1]
	next := here(dns(backends4[1:], nil))
	if err := Apply(kernel(t), next); err != nil {
		t.Fatal(err)
	}
	n, err := Revoke(as(next))
	if err != nil || n == 0 {
		t.Fatalf("revoked %d flows, %v", n, err)
	}
	for _, was := range []netip.AddrPort{gone, stays} {
		if got := asks(t, flows[was], vip4, open); got != stays {
			t.Errorf("the flow that went to %s goes to %s", was, got)
		}
	}
	if n, err := Revoke(as(next)); n != 0 || err != nil {
		t.Errorf("once more: revoked %d flows, %v", n, err)
	}
}

// A flow of a service all of whose endpoints have gone goes on with the next that come, and nowhere meanwhile.
func TestServiceFlowsGoOnWithNewEndpoints(t *testing.T) {
	outside := surroundings(t)
	routes(t)
	open := map[netip.AddrPort]net.PacketConn{}
	for _, b := range backends4 {
		open[b] = socket(t, outside, b.String())
	}
	app := socket(t, nil, "10.99.0.2:0")
	before := here(verdict.Packets{})
	for i, at := range [][]netip.AddrPort{backends4[:1], nil, backends4[1:], nil, backends4[:1]} {
		next := here(verdict.Packets{})
		if len(at) > 0 {
			next = here(dns(at, nil))
		}
		apply(t, *next)
		if Releads(before, next) {
			if _, err := Revoke(as(next)); err != nil {
				t.Fatal(err)
			}
		}
		before = next
		if len(at) == 0 {
			if send(t, app, net.UDPAddrFromAddrPort(vip4), "x") {
				t.Errorf("%d: it passes without endpoints", i)
			}
		} else if got := asks(t, app, vip4, open); got != at[0] {
			t.Errorf("%d: it goes to %s", i, got)
		}
	}
}

// A pod that is an endpoint of its own service reaches itself.
func TestServiceOfOneself(t *testing.T) {
	surroundings(t)
	routes(t)
	self := netip.AddrPortFrom(own[0], 9053)
	p := here(dns([]netip.AddrPort{self}, nil))
	apply(t, *p)
	if _, err := Revoke(as(p)); err != nil { // what other tests have left
		t.Fatal(err)
	}
	at := map[netip.AddrPort]net.PacketConn{self: socket(t, nil, self.String())}
	if got := asks(t, socket(t, nil, "10.99.0.2:0"), vip4, at); got != self {
		t.Errorf("led to %s", got)
	}
	if n, err := Revoke(as(p)); n != 0 || err != nil {
		t.Errorf("revoked %d flows, %v", n, err)
	}
}

// Check finds what is changed in rules, chains and sets, and nothing where all is as it was written.
func TestCheck(t *testing.T) {
	surroundings(t)
	p := here(dns(backends4, backends6))
	p.Ingress = []verdict.PacketBlock{udp(53, 53, "10.99.0.3/32", "fd99::/64"), udp(54, 60, "0.0.0.0/0")}
	apply(t, *p)
	if err := Check(kernel(t), p); err != nil {
		t.Fatalf("as it was written: %v", err)
	}
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	rs, err := Emit(p, names.ProxyMark)
	if err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string]func(){
		"table gone": func() { conn.DelTable(rs.Table) },
		"rules gone": func() { conn.FlushChain(rs.Chains[1].Chain) },
		"a rule more": func() {
			conn.AddRule(&nftables.Rule{Table: rs.Table, Chain: rs.Chains[1].Chain, Exprs: rs.Chains[1].Rules[0]})
		},
		"a rule before": func() {
			conn.InsertRule(&nftables.Rule{Table: rs.Table, Chain: rs.Chains[1].Chain, Exprs: rs.Chains[1].Rules[0]})
		},
		"a chain more":   func() { conn.AddChain(&nftables.Chain{Name: "more", Table: rs.Table}) },
		"services gone":  func() { conn.FlushChain(rs.Chains[len(rs.Chains)-1].Chain) },
		"everything new": func() { conn.FlushRuleset() },
	} {
		change()
		if err := conn.Flush(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if Check(kernel(t), p) == nil {
			t.Errorf("%s: not found", what)
		}
		if err := Apply(kernel(t), p); err != nil {
			t.Fatal(err)
		}
		if err := Check(kernel(t), p); err != nil {
			t.Errorf("%s, and written again: %v", what, err)
		}
	}
	other := here(dns(backends4[:1], backends6))
	if Check(kernel(t), other) == nil {
		t.Error("another policy's table passes")
	}
}

var (
	past  = time.Unix(1, 0)
	never = time.Time{}
)

// addRoute sends a network by way of the node, until the test ends.
func addRoute(t *testing.T, network string, via netip.Addr) {
	t.Helper()
	_, dst, err := net.ParseCIDR(network)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.RouteAdd(&netlink.Route{Dst: dst, Gw: via.AsSlice()}); err != nil {
		t.Fatalf("route to %s: %v", network, err)
	}
}
