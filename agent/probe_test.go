package agent

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/mantlet/mantlet/agent/podtest"
)

// TestNodeProbes: a TCP probe by the pod's own node tells the truth, as soon as the agent knows the node's addresses, while Envoy is away
// too, and for the addresses that the node has now.
func TestNodeProbes(t *testing.T) {
	w := newWorld(t)
	w.app("[::]:8080")
	at := func(nodes ...netip.Addr) {
		t.Helper()
		list := objects(8080)
		for _, p := range list.Pods {
			if p.Name == "db" {
				p.Spec.NodeName, p.Status.HostIP, p.Status.HostIPs = "node", "", nil
				for _, a := range nodes {
					p.Status.HostIPs = append(p.Status.HostIPs, corev1.HostIP{IP: a.String()})
				}
				if err := w.cp.Apply(p); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	probe := func(host, port string) string {
		var c net.Conn
		var err error
		w.outside.Do(func() { c, err = net.DialTimeout("tcp", net.JoinHostPort(host, port), patience) })
		switch {
		case err == nil:
			defer c.Close()
			return strings.TrimSpace(greeted(t, c))
		case errors.Is(err, syscall.ECONNREFUSED):
			return "refused"
		}
		t.Fatal(err)
		return ""
	}
	want := func(when, open, closed string) {
		t.Helper()
		for _, h := range []string{podtest.PodIPv4.String(), podtest.PodIPv6.String()} {
			eventually(t, when+": port 8080 of "+h+": "+open, func() bool { return probe(h, "8080") == open })
			if got := probe(h, "9"); got != closed {
				t.Errorf("%s: port 9 of %s: %q, not %q", when, h, got, closed)
			}
		}
	}
	w.startAgent()
	want("before the control plane has said anything", "refused", "refused")
	w.startPlane()
	at(podtest.OutsideIPv4, podtest.OutsideIPv6)
	w.ready()
	want("the node", "hello", "refused")
	at(netip.MustParseAddr("10.99.0.77")) // no policy admits who was the node
	want("who was the node", "refused", "refused")
	at(podtest.OutsideIPv4, podtest.OutsideIPv6)
	want("the node again", "hello", "refused")
	w.stopAgent()
	want("without agent and Envoy", "hello", "refused")
}
