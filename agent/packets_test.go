package agent

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	corev1 "k8s.io/api/core/v1"

	"github.com/mantlet/mantlet/agent/netfilter/packet"
	"github.com/mantlet/mantlet/agent/podtest"
	mantletv1 "github.com/mantlet/mantlet/api/mantlet/v1"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/verdict/wire"
	"github.com/mantlet/mantlet/xds/names"
	"github.com/mantlet/mantlet/xds/server"
)

// udpSocket opens a UDP socket in the pod, or outside.
func udpSocket(t *testing.T, outside *podtest.Outside, address string) net.PacketConn {
	t.Helper()
	var c net.PacketConn
	var err error
	open := func() { c, err = net.ListenPacket("udp", address) }
	if outside == nil {
		open()
	} else {
		outside.Do(open)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// leaves reports whether the kernel takes a datagram from the pod.
func leaves(t *testing.T, to string) bool {
	t.Helper()
	_, err := udpSocket(t, nil, ":0").WriteTo([]byte("x"), net.UDPAddrFromAddrPort(netip.MustParseAddrPort(to)))
	if err != nil && !errors.Is(err, syscall.EPERM) {
		t.Fatalf("send to %s: %v", to, err)
	}
	return err == nil
}

// hears wants that a datagram from outside arrives at a port of the pod, or that it does not: then a ping that was sent after it is back.
func (w *world) hears(when, address string, want bool) {
	w.t.Helper()
	to := net.UDPAddrFromAddrPort(netip.MustParseAddrPort(address))
	at := udpSocket(w.t, nil, fmt.Sprintf("[::]:%d", to.Port)).(*net.UDPConn)
	defer at.Close()
	from := udpSocket(w.t, w.outside, ":0")
	arrived := func() bool {
		raw, err := at.SyscallConn()
		if err != nil {
			w.t.Fatal(err)
		}
		n := -1
		_ = raw.Read(func(fd uintptr) bool {
			n, _, _ = unix.Recvfrom(int(fd), make([]byte, 16), unix.MSG_DONTWAIT)
			return true
		})
		return n >= 0
	}
	for end := time.Now().Add(patience); ; {
		if _, err := from.WriteTo([]byte("x"), to); err != nil {
			w.t.Fatal(err)
		}
		w.outside.Do(func() { ping(w.t, to.AddrPort().Addr().Unmap()) })
		got := arrived()
		if got == want {
			return
		}
		if got || time.Now().After(end) { // one that is let through may still get lost
			w.t.Errorf("%s: from outside to %s: arrived=%v", when, to, got)
			return
		}
	}
}

// ping sends an echo request and awaits the reply.
func ping(t *testing.T, a netip.Addr) {
	network, request, reply, header := "ip4:icmp", byte(8), byte(0), 20 // a raw IPv4 socket reads the IP header too
	if a.Is6() {
		network, request, reply, header = "ip6:ipv6-icmp", 128, 129, 0
	}
	c, err := net.Dial(network, a.String())
	if err != nil {
		t.Error(err)
		return
	}
	defer c.Close()
	echo := []byte{request, 0, 0, 0, 0, 7, 0, 1}
	if a.Is4() { // the kernel does it for ICMPv6
		binary.BigEndian.PutUint16(echo[2:], ^(uint16(request)<<8 + 7 + 1))
	}
	_ = c.SetDeadline(time.Now().Add(patience))
	_, err = c.Write(echo)
	buf := make([]byte, 128)
	for err == nil {
		var n int
		if n, err = c.Read(buf); err == nil && n >= header+8 && buf[header] == reply {
			return
		}
	}
	t.Errorf("ping %s: %v", a, err)
}

// datagrams wants that UDP on port 5353 is let through, both ways in both families, or not.
func (w *world) datagrams(when string, want bool) {
	w.t.Helper()
	for _, to := range []string{"10.99.0.1:5353", "[fd99::1]:5353"} {
		if got := leaves(w.t, to); got != want {
			w.t.Errorf("%s: to %s: sent=%v", when, to, got)
		}
	}
	for _, to := range []string{"10.99.0.2:5353", "[fd99::2]:5353"} {
		w.hears(when, to, want)
	}
}

// withUDP is the world's policy, and UDP on port 5353 from and to the other end of eth0.
func withUDP() *networkingv1.NetworkPolicy {
	np := objects(8080).NetworkPolicies[0].DeepCopy()
	udp, port := corev1.ProtocolUDP, intstr.FromInt32(5353)
	ports := []networkingv1.NetworkPolicyPort{{Protocol: &udp, Port: &port}}
	peers := np.Spec.Egress[0].To
	np.Spec.Ingress = append(np.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: peers, Ports: ports})
	np.Spec.Egress = append(np.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: peers, Ports: ports})
	return np
}

// UDP is closed from the first moment on, follows policy, and stays as it is while the control plane is away or sends what cannot be.
func TestPackets(t *testing.T) {
	w := newWorld(t)
	w.startAgent()
	w.log.await(t, "start of envoy", func(s string) bool { return strings.Contains(s, "envoy: started") })
	w.datagrams("without a control plane", false)
	if err := Ready(t.Context(), w.cfg.RunDir, 0); err == nil || !strings.Contains(err.Error(), "no packet policy from the control plane") {
		t.Errorf("ready without a packet policy: %v", err)
	}
	w.startPlane()
	w.ready()
	w.datagrams("with a policy that does not speak of UDP", false)

	const pod = server.Client("shop/db")
	ledger := w.cp.Server().Ledger()
	policy := func(np *networkingv1.NetworkPolicy) {
		t.Helper()
		if err := w.cp.Apply(np); err != nil {
			t.Fatal(err)
		}
		if err := ledger.Wait(t.Context(), pod); err != nil {
			t.Fatal(err)
		}
	}
	policy(withUDP())
	w.datagrams("with a policy that admits", true)

	r, err := server.NewResource(names.Packets, &mantletv1.Packets{Node: [][]byte{{1}}})
	if err != nil {
		t.Fatal(err)
	}
	readable, err := server.NewResource(names.Verdicts, wire.Message(&verdict.Verdicts{Subject: w.api, Mode: verdict.Permissive}))
	if err != nil {
		t.Fatal(err)
	}
	network, err := server.NewResource(names.Network, wire.NetworkMessage(&verdict.Network{Cluster: []netip.Prefix{netip.MustParsePrefix("10.98.0.0/16")}}))
	if err != nil {
		t.Fatal(err)
	}
	unreadable, err := server.NewSet(r, readable, network)
	if err != nil {
		t.Fatal(err)
	}
	w.cp.Server().Publish(pod, unreadable)
	var refused *server.RefusedError
	if err := ledger.Wait(t.Context(), pod); !errors.As(err, &refused) || refused.Type != names.TypePackets || !strings.Contains(refused.Refusal.Reason, "node[0]") {
		t.Fatalf("packets that cannot be read: %v", err)
	}
	w.datagrams("after a refusal", true)
	policy(objects(8080).NetworkPolicies[0])
	w.datagrams("with the first policy again", false)
	policy(withUDP())
	w.stopPlane()
	w.datagrams("with the control plane away", true)
	w.stopAgent()
	w.datagrams("without an agent", true)
}

// What the kernel does not take is refused with the kernel's reason, and the one before stays.
func TestPacketsThatTheKernelRefuses(t *testing.T) {
	podtest.Connect(t)
	p, err := closePackets(slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cleanRedirect(t) })
	b, err := wire.MarshalPackets(&verdict.Packets{Ingress: []verdict.PacketBlock{{Protocol: verdict.UDP, Ports: []verdict.PortRange{{First: 53, Last: 53}}}}})
	if err != nil {
		t.Fatal(err)
	}
	podtest.OnThread(func() { // without the capability to write tables
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		if err := unix.Capset(&header, &make([]unix.CapUserData, 2)[0]); err != nil {
			t.Error(err)
		}
		if err := p.Apply(b); !errors.Is(err, syscall.EPERM) || !strings.Contains(p.Missing(), err.Error()) {
			t.Errorf("the kernel refuses: %v, missing %q", err, p.Missing())
		}
	})
	if err := p.Apply(b); err != nil || p.Missing() != "" {
		t.Errorf("the kernel takes it: %v, missing %q", err, p.Missing())
	}
}

// A flow that policy does not allow any more has ended with the ACK and is forgotten by conntrack later; one that it still allows goes on.
func TestPacketsRevoke(t *testing.T) {
	outside := podtest.Connect(t)
	log := newLines()
	p, err := closePackets(slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cleanRedirect(t) })
	if _, err := packet.Revoke(func() *verdict.Packets { return &verdict.Packets{} }); err != nil { // what other tests have left
		t.Fatal(err)
	}
	p.forget.others = 100 * time.Millisecond
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- p.run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	policy := func(ports ...uint16) {
		t.Helper()
		block := verdict.PacketBlock{Protocol: verdict.UDP, Peers: []verdict.PacketPrefix{{Prefix: netip.PrefixFrom(podtest.OutsideIPv4, 32), Allow: true}}}
		for _, port := range ports {
			block.Ports = append(block.Ports, verdict.PortRange{First: port, Last: port})
		}
		b, err := wire.MarshalPackets(&verdict.Packets{Ingress: []verdict.PacketBlock{block}, Egress: []verdict.PacketBlock{}})
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Apply(b); err != nil {
			t.Fatal(err)
		}
	}
	// Both flows have replies, so that conntrack would let them go on.
	flow := func(port int) (app, client net.PacketConn) {
		app = udpSocket(t, nil, fmt.Sprintf("%s:%d", podtest.PodIPv4, port))
		client = udpSocket(t, outside, fmt.Sprintf("%s:0", podtest.OutsideIPv4))
		buf := make([]byte, 16)
		_ = client.SetReadDeadline(time.Now().Add(patience))
		_ = app.SetReadDeadline(time.Now().Add(patience))
		if _, err := client.WriteTo([]byte("x"), app.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		_, from, err := app.ReadFrom(buf)
		if err == nil {
			_, err = app.WriteTo([]byte("y"), from)
		}
		if err == nil {
			_, _, err = client.ReadFrom(buf)
		}
		if err != nil {
			t.Fatal(err)
		}
		return app, client
	}
	policy(7001, 7003)
	stays, staysClient := flow(7001)
	goes, goesClient := flow(7003)
	policy(7001)
	if _, err := goes.WriteTo([]byte("x"), goesClient.LocalAddr()); !errors.Is(err, syscall.EPERM) {
		t.Errorf("a flow that is not allowed any more: %v", err)
	}
	if _, err := stays.WriteTo([]byte("x"), staysClient.LocalAddr()); err != nil {
		t.Errorf("a flow that is still allowed: %v", err)
	}
	log.await(t, "one flow ended", func(s string) bool { return strings.Contains(s, "ended flows") && strings.Contains(s, "flows=1") })
}

// How soon conntrack is read depends on what changes.
func TestWhenFlowsAreForgotten(t *testing.T) {
	podtest.Connect(t)
	p, err := closePackets(slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cleanRedirect(t) })
	p.forget = forgetting{misled: time.Hour, stuck: 10 * time.Hour, others: 100 * time.Hour}
	service := netip.MustParseAddrPort("10.98.0.7:53")
	policy := func(first uint16, endpoints ...string) *verdict.Packets {
		to := verdict.PacketBlock{Protocol: verdict.UDP, Ports: []verdict.PortRange{{First: first, Last: 9000}}, Peers: []verdict.PacketPrefix{{Prefix: netip.PrefixFrom(podtest.OutsideIPv4, 32), Allow: true}}}
		s := verdict.PacketService{Protocol: verdict.UDP, Addr: service}
		for _, e := range endpoints {
			s.Endpoints = append(s.Endpoints, netip.MustParseAddrPort(e))
		}
		return &verdict.Packets{Ingress: []verdict.PacketBlock{to}, Egress: []verdict.PacketBlock{}, Services: []verdict.PacketService{s}}
	}
	for _, step := range []struct {
		what          string
		next          *verdict.Packets
		after, atMost time.Duration // 0: not at all
	}{
		{"the first one", policy(8000), 10 * time.Hour, 10 * time.Hour},
		{"an endpoint for who had none", policy(8000, "10.98.0.1:53"), 10 * time.Hour, 10 * time.Hour},
		{"another endpoint", policy(8000, "10.98.0.2:53"), time.Hour, time.Hour},
		{"wider", policy(7000, "10.98.0.2:53"), 0, 0},
		{"narrower", policy(8500, "10.98.0.2:53"), 100 * time.Hour, 200 * time.Hour},
	} {
		p.mu.Lock()
		p.due = time.Time{}
		began := time.Now()
		err := p.enforce(step.next)
		due := p.due
		p.mu.Unlock()
		switch {
		case err != nil:
			t.Errorf("%s: %v", step.what, err)
		case due.IsZero() != (step.after == 0):
			t.Errorf("%s: to be read at %v", step.what, due)
		case !due.IsZero() && (due.Before(began.Add(step.after)) || due.After(time.Now().Add(step.atMost))):
			t.Errorf("%s: to be read in %s", step.what, due.Sub(began))
		}
	}
}
