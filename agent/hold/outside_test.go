package hold

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"

	"github.com/mantlet/mantlet/agent/podtest"
	"github.com/mantlet/mantlet/verdict"
)

// arrive listens where Envoy takes what comes in, and counts.
func arrive(t *testing.T) (count func() int) {
	t.Helper()
	l, err := net.Listen("tcp", "[::]:15006")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	n := 0
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			n++
			mu.Unlock()
			_ = c.Close()
		}
	})
	t.Cleanup(func() { _ = l.Close(); wg.Wait() })
	return func() int { mu.Lock(); defer mu.Unlock(); return n }
}

// From outside the cluster a connection gets to Envoy where the ingress table admits its source, and is refused before it otherwise.
func TestInbound(t *testing.T) {
	outside, _ := connect(t)
	for _, r := range [][2]string{{"192.0.2.0/24", "10.99.0.1"}, {"2001:db8::/64", "fd99::1"}, {"10.1.0.0/24", "10.99.0.1"}} {
		route(t, r[0], r[1])
	}
	outside.Do(func() {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			t.Error(err)
			return
		}
		for _, a := range []string{"192.0.2.1/32", "192.0.2.129/32", "2001:db8::1/128", "10.1.0.1/32"} {
			address, err := netlink.ParseAddr(a)
			if err != nil {
				t.Error(err)
			}
			if err := netlink.AddrAdd(lo, address); err != nil {
				t.Error(err)
			}
		}
	})
	count := arrive(t)
	from := func(source, to, want string) {
		t.Helper()
		before := count()
		d := net.Dialer{Timeout: 5 * time.Second, LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
		got := "connected"
		outside.Do(func() {
			c, err := d.Dial("tcp", to)
			switch {
			case err == nil:
				_ = c.Close()
			case strings.Contains(err.Error(), "refused"):
				got = refused
			default:
				got = err.Error()
			}
		})
		if got != want {
			t.Errorf("%s → %s: %s, not %s", source, to, got, want)
		}
		if want == "connected" {
			await(t, "its arrival", func() bool { return count() == before+1 })
		} else if n := count(); n != before {
			t.Errorf("%s → %s: %d connections arrived", source, to, n-before)
		}
	}
	v4, v6 := netip.AddrPortFrom(podtest.PodIPv4, 8080).String(), netip.AddrPortFrom(podtest.PodIPv6, 8080).String()
	c := config()
	c.Cluster = append(c.Cluster, netip.MustParsePrefix("2001:db8:1::/64"))
	c.Exempt = []netip.Addr{netip.MustParseAddr("10.1.0.1")}
	h := open(t, c, asker(oddPorts))
	from("10.99.0.1", v4, "connected") // the cluster: Envoy asks for an identity
	from("fd99::1", v6, "connected")
	from("10.1.0.1", v4, "connected") // the node
	from("192.0.2.1", v4, refused)    // empty never means any
	from("2001:db8::1", v6, refused)
	admit := func(prefixes ...verdict.Prefix) {
		t.Helper()
		if err := h.SetInbound(egress(verdict.Block{Protocol: verdict.TCP, Ports: []verdict.PortRange{{First: 8000, Last: 8080}, {First: 9000, Last: 9000}},
			Peers: verdict.Peers{Anonymous: prefixes}})); err != nil {
			t.Fatal(err)
		}
	}
	admit(allow("192.0.2.0/24"), deny("192.0.2.128/25"), allow("2001:db8::/64"))
	from("192.0.2.1", v4, "connected")
	from("192.0.2.1", netip.AddrPortFrom(podtest.PodIPv4, 9000).String(), "connected")
	from("192.0.2.1", netip.AddrPortFrom(podtest.PodIPv4, 8081).String(), refused)
	from("192.0.2.129", v4, refused)
	from("2001:db8::1", v6, "connected")
	admit(allow("192.0.2.129/32"))
	from("192.0.2.129", v4, "connected")
	from("192.0.2.1", v4, refused)
	from("2001:db8::1", v6, refused)
	if err := h.SetInbound(anywhere()); err != nil {
		t.Fatal(err)
	}
	for _, source := range []string{"192.0.2.1", "192.0.2.129"} {
		from(source, v4, "connected")
	}
	from("2001:db8::1", v6, "connected")
	if err := h.Check(); err != nil {
		t.Error(err)
	}
}

// prefixes makes so many that do not touch.
func prefixes(n int) []verdict.Prefix {
	var list []verdict.Prefix
	for i := range n {
		list = append(list, verdict.Prefix{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{172, byte(i >> 8), byte(i), 0}), 25), Verdict: verdict.Verdict{Allow: true}})
	}
	return list
}

func everyPort(list []verdict.Prefix) verdict.Table {
	return egress(verdict.Block{Protocol: verdict.TCP, Ports: []verdict.PortRange{verdict.AllPorts}, Peers: verdict.Peers{Anonymous: list}})
}

// Ten thousand prefixes are replaced while destinations are asked about and known ones connected to: nobody waits for long or is refused.
func TestManyOutside(t *testing.T) {
	connect(t)
	route(t, "172.0.0.0/8", "10.99.0.1")
	h := open(t, config(), asker(oddPorts))
	start(t, h)
	if err := h.SetExternal(everyPort(prefixes(10_000))); err != nil {
		t.Fatal(err)
	}
	expect(t, "172.3.4.1:80", "172.3.4.1:80")
	expect(t, "172.3.4.200:80", refused)
	ctx, end := context.WithCancel(t.Context())
	replaced := make(chan int)
	go func() {
		n := 0
		for ctx.Err() == nil {
			began := time.Now()
			if err := h.SetExternal(everyPort(prefixes(10_000 - 1 - n%2))); err != nil {
				t.Error(err)
			}
			t.Logf("10,000 prefixes replaced in %v", time.Since(began).Round(time.Millisecond))
			n++
		}
		replaced <- n
	}()
	var slowest time.Duration
	for i := range 200 {
		began := time.Now()
		a := netip.AddrPortFrom(netip.MustParseAddr("10.99.0.1"), uint16(1001+2*i)).String()
		expect(t, a, a) // asked about
		slowest = max(slowest, time.Since(began))
		expect(t, "172.3.4.1:80", "172.3.4.1:80") // admitted before and after
	}
	end()
	if n := <-replaced; n < 2 {
		t.Errorf("%d replacements: the test saw none", n)
	}
	t.Logf("slowest first connect meanwhile: %v", slowest.Round(time.Millisecond))
	if err := h.Check(); err != nil {
		t.Error(err)
	}
}

// With more than MaxOutside the connection goes on to Envoy; what fits again is held again.
func TestTooManyOutside(t *testing.T) {
	connect(t)
	route(t, "172.0.0.0/8", "10.99.0.1")
	c := config()
	c.MaxOutside = 100
	c.External = everyPort(prefixes(100)) // and the range of ports
	h := open(t, c, asker(oddPorts))
	expect(t, "172.0.1.200:80", "172.0.1.200:80")
	for _, n := range []int{99, 100, 10} {
		if err := h.SetExternal(everyPort(prefixes(n))); err != nil {
			t.Fatal(err)
		}
		expect(t, "172.0.1.1:80", "172.0.1.1:80")
		want := refused
		if n == 100 {
			want = "172.0.1.200:80"
		}
		expect(t, "172.0.1.200:80", want)
		if err := h.Check(); err != nil {
			t.Error(err)
		}
	}
}

// What others do to rules, chains and sets is noticed and repaired; what they do to elements opens nothing.
func TestRepair(t *testing.T) {
	_, arrivals := connect(t)
	route(t, "172.0.0.0/8", "10.99.0.1")
	p := asker(oddPorts)
	h := open(t, config(), p)
	start(t, h)
	if err := h.SetExternal(everyPort(prefixes(10))); err != nil {
		t.Fatal(err)
	}
	if err := h.SetInbound(everyPort(prefixes(10))); err != nil {
		t.Fatal(err)
	}
	chain := func(name string) *nftables.Chain { return &nftables.Chain{Name: name, Table: table()} }
	tamper := func(change func(c *nftables.Conn)) {
		t.Helper()
		conn, err := nftables.New()
		if err != nil {
			t.Fatal(err)
		}
		change(conn)
		if err := conn.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	for name, change := range map[string]func(c *nftables.Conn){
		"table deleted": func(c *nftables.Conn) { c.DelTable(table()) },
		"rule in front": func(c *nftables.Conn) {
			c.InsertRule(&nftables.Rule{Table: table(), Chain: chain("cluster4"), Exprs: []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}})
		},
		"chain flushed": func(c *nftables.Conn) { c.FlushChain(chain("external")) },
		"put to sleep":  func(*nftables.Conn) { dormant(t, 1) },
		"set added": func(c *nftables.Conn) {
			_ = c.AddSet(&nftables.Set{Table: table(), Name: "more", KeyType: nftables.TypeInetService}, nil)
		},
	} {
		expect(t, "10.99.0.1:80", refused)
		if err := h.Check(); err != nil {
			t.Errorf("before %q: %v", name, err)
		}
		tamper(change)
		if err := h.Check(); err == nil {
			t.Errorf("%s: not noticed", name)
		}
		if err := h.Repair(); err != nil {
			t.Fatal(err)
		}
		if err := h.Check(); err != nil {
			t.Errorf("after %q: %v", name, err)
		}
		expect(t, "10.99.0.1:81", "10.99.0.1:81")
		expect(t, "172.0.1.1:80", "172.0.1.1:80")
		expect(t, "172.0.1.200:80", refused)
	}
	before, asked := arrivals.n.Load(), p.count(dest("10.99.0.1:80"))
	expect(t, "10.99.0.1:80", refused)
	tamper(func(c *nftables.Conn) {
		for _, s := range h.kernel.sets {
			c.FlushSet(s.allowed)
			c.FlushSet(s.denied)
		}
		for i := range h.shape.sides {
			for _, s := range h.shape.sides[i].judging.sets {
				c.FlushSet(s.Set)
			}
		}
	})
	expect(t, "10.99.0.1:80", refused) // asked about again
	expect(t, "172.0.1.1:80", refused)
	if n := arrivals.n.Load(); n != before {
		t.Errorf("%d connections arrived", n-before)
	}
	if n := p.count(dest("10.99.0.1:80")); n <= asked {
		t.Error("not asked about again")
	}
}
