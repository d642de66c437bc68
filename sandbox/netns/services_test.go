package netns_test

import (
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/mantlet/mantlet/sandbox/netns"
)

func TestServicesReachEveryBackendAndRefuseWithoutAny(t *testing.T) {
	n := testNetwork(t, netns.Config{})
	pods := testPods(t, n, 4, netns.Port{Number: 8080, Speaks: netns.ClientFirst}, netns.Port{Number: 25, Speaks: netns.ServerFirst})
	client, backends := pods[0], pods[1:]
	to := func(family int, port uint16, pods ...*netns.Pod) (list []netip.AddrPort) {
		for _, p := range pods {
			list = append(list, netip.AddrPortFrom(p.Spec().IPs[family], port))
		}
		return list
	}
	vip := func(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }
	set := func(services ...netns.Service) {
		t.Helper()
		if err := n.SetServices(services); err != nil {
			t.Fatal(err)
		}
	}
	set(
		netns.Service{Addr: vip("10.96.0.1:80"), Protocol: netns.TCP, Backends: to(0, 8080, backends...)},
		netns.Service{Addr: vip("10.96.0.1:25"), Protocol: netns.TCP, Backends: to(0, 25, backends[0])},
		netns.Service{Addr: vip("10.96.0.2:80"), Protocol: netns.TCP},
		netns.Service{Addr: vip("[fd00:10:96::1]:80"), Protocol: netns.TCP, Backends: to(1, 8080, backends...)},
		netns.Service{Addr: vip("[fd00:10:96::1]:25"), Protocol: netns.TCP, Backends: to(1, 25, backends[0])},
		netns.Service{Addr: vip("[fd00:10:96::2]:80"), Protocol: netns.TCP},
	)
	node4, node6 := n.Addresses()
	for family, address := range []string{"10.96.0.1", "fd00:10:96::1"} {
		for _, from := range []struct {
			prober
			own [2]netip.Addr
		}{{client, [2]netip.Addr(client.Spec().IPs)}, {n, [2]netip.Addr{node4, node6}}} {
			// Random, so: a backend of three that 200 tries never meet would be one in 10^35.
			out := probe(t, from, slices.Repeat([]netns.Target{at(address, 80, netns.ClientFirst)}, 200)...)
			reached := map[string]int{}
			for _, o := range out {
				if o.Err != "" || o.Seen.Addr() != from.own[family] {
					t.Fatalf("by the service: %+v, want the client's own address %s", o, from.own[family])
				}
				reached[o.Reached]++
			}
			if len(reached) != 3 || reached["test/pod-1:8080"] == 0 || reached["test/pod-2:8080"] == 0 || reached["test/pod-3:8080"] == 0 {
				t.Errorf("by %s: reached %v, want the three backends", address, reached)
			}
			wantReached(t, probe(t, from, at(address, 25, netns.ServerFirst))[0], "test/pod-1:25", from.own[family])
		}
		none := []string{"10.96.0.2", "fd00:10:96::2"}[family]
		for _, from := range []prober{client, n} {
			if o := probe(t, from, at(none, 80, netns.ClientFirst))[0]; o.Connect != netns.Refused {
				t.Errorf("a service without backends: %+v, want %q", o, netns.Refused)
			}
		}
		// A backend that meets itself sees the node, because its own address would not bring the answer back through the translation.
		node := []netip.Addr{node4, node6}[family]
		wantReached(t, probe(t, backends[0], at(address, 25, netns.ServerFirst))[0], "test/pod-1:25", node)
	}

	// Replaced as a whole, and open connections stay.
	var held net.Conn
	if err := client.Do(func() (err error) { held, err = net.Dial("tcp", "10.96.0.1:80"); return err }); err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	set(netns.Service{Addr: vip("10.96.0.3:80"), Protocol: netns.TCP, Backends: to(0, 8080, backends[2])})
	wantReached(t, probe(t, client, at("10.96.0.3", 80, netns.ClientFirst))[0], "test/pod-3:8080", client.Spec().IPs[0])
	if o := probe(t, client, at("10.96.0.1", 80, netns.ClientFirst))[0]; o.Connect != "no route to host" {
		t.Errorf("a service that was removed: %+v", o)
	}
	if _, err := held.Write([]byte("still here\n")); err != nil {
		t.Fatal(err)
	}
	if k, err := held.Read(make([]byte, 500)); k == 0 {
		t.Errorf("an open connection through a service that was removed: %v", err)
	}
}

func TestServicesOfUDP(t *testing.T) {
	n := testNetwork(t, netns.Config{})
	pods := testPods(t, n, 2)
	for family, address := range []string{"10.96.0.53", "fd00:10:96::53"} {
		backend := netip.AddrPortFrom(pods[1].Spec().IPs[family], 5353)
		var server net.PacketConn
		if err := pods[1].Do(func() (err error) { server, err = net.ListenPacket("udp", backend.String()); return err }); err != nil {
			t.Fatal(err)
		}
		defer server.Close()
		vip := netip.AddrPortFrom(netip.MustParseAddr(address), 53)
		if err := n.SetServices([]netns.Service{
			{Addr: vip, Protocol: netns.UDP, Backends: []netip.AddrPort{backend}},
			{Addr: vip, Protocol: netns.TCP},
			{Addr: netip.AddrPortFrom(vip.Addr(), 54), Protocol: netns.UDP},
		}); err != nil {
			t.Fatal(err)
		}
		dial := func(port string) (c net.Conn) {
			t.Helper()
			if err := pods[0].Do(func() (err error) { c, err = net.Dial("udp", net.JoinHostPort(address, port)); return err }); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			return c
		}
		buffer := make([]byte, 100)
		c := dial("53")
		if _, err := c.Write([]byte("question")); err != nil {
			t.Fatal(err)
		}
		k, from, err := server.ReadFrom(buffer)
		if err != nil || string(buffer[:k]) != "question" {
			t.Fatalf("the backend got %q, %v", buffer[:k], err)
		}
		if _, err := server.WriteTo([]byte("answer"), from); err != nil {
			t.Fatal(err)
		}
		if k, err := c.Read(buffer); err != nil || string(buffer[:k]) != "answer" {
			t.Fatalf("the client got %q, %v", buffer[:k], err)
		}
		empty := dial("54")
		if _, err := empty.Write([]byte("question")); err != nil {
			t.Fatal(err)
		}
		if _, err := empty.Read(buffer); err == nil {
			t.Error("an answer of a service without backends")
		}
	}
}

// TestServicesInGreatNumber is about what one transaction with the kernel can hold.
func TestServicesInGreatNumber(t *testing.T) {
	n := testNetwork(t, netns.Config{})
	pods := testPods(t, n, 2, netns.Port{Number: 8080, Speaks: netns.ClientFirst})
	const many = 5000
	services := make([]netns.Service, many)
	for i := range services {
		services[i] = netns.Service{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, byte(i / 250), byte(1 + i%250)}), 80), Protocol: netns.TCP}
		for k := range i%7 + 1 {
			services[i].Backends = append(services[i].Backends, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 65, byte(i / 250), byte(k)}), 80))
		}
	}
	last := &services[many-1]
	last.Backends = []netip.AddrPort{netip.AddrPortFrom(pods[1].Spec().IPs[0], 8080)}
	for range 2 {
		if err := n.SetServices(services); err != nil {
			t.Fatal(err)
		}
	}
	wantReached(t, probe(t, pods[0], netns.Target{Addr: last.Addr, Speaks: netns.ClientFirst})[0], "test/pod-1:8080", pods[0].Spec().IPs[0])
}

func TestServicesThatCannotBe(t *testing.T) {
	n := testNetwork(t, netns.Config{})
	four, six := netip.MustParseAddrPort("10.96.0.1:80"), netip.MustParseAddrPort("[fd00::1]:80")
	for name, services := range map[string][]netns.Service{
		"no address":     {{Protocol: netns.TCP}},
		"no port":        {{Addr: netip.AddrPortFrom(four.Addr(), 0), Protocol: netns.TCP}},
		"no protocol":    {{Addr: four}},
		"another family": {{Addr: four, Protocol: netns.TCP, Backends: []netip.AddrPort{six}}},
		"twice":          {{Addr: four, Protocol: netns.TCP}, {Addr: four, Protocol: netns.TCP}},
	} {
		if err := n.SetServices(services); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
