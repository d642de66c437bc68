package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/yaml"

	"github.com/mantlet/mantlet/controlplane/source"
	"github.com/mantlet/mantlet/sandbox"
)

// under runs a test while a policy is in force.
func under(t *testing.T, s *sandbox.Sandbox, text string, test func()) {
	t.Helper()
	np := &networkingv1.NetworkPolicy{}
	if err := yaml.UnmarshalStrict([]byte(text), np); err != nil {
		t.Fatal(err)
	}
	np.Namespace = "shop"
	if err := s.ControlPlane().Apply(np); err != nil {
		t.Fatal(err)
	}
	confirmed(t, s, "shop/web", "shop/api-0", "shop/api-1", "shop/api-2")
	test()
	if err := s.ControlPlane().Delete(np); err != nil {
		t.Fatal(err)
	}
	confirmed(t, s, "shop/web", "shop/api-0", "shop/api-1", "shop/api-2")
}

// trickle is a connection that stays open. It was answered by a pod.
type trickle struct {
	net.Conn
	lines *bufio.Reader
	said  int
}

// open opens a stream by a service to a certain pod: whoever else answers is hung up on.
func open(t *testing.T, s *sandbox.Sandbox, to netip.AddrPort, want string) *trickle {
	t.Helper()
	for range 100 {
		conn, err := dialIn(pod(t, s, "shop/web"))(t.Context(), "tcp", to.String())
		if err != nil {
			t.Fatal(err)
		}
		st := &trickle{Conn: conn, lines: bufio.NewReader(conn)}
		if who := st.talk(t); strings.Contains(who, want) {
			t.Cleanup(func() { _ = conn.Close() })
			return st
		}
		_ = conn.Close()
	}
	t.Fatalf("%s never answered by %s", want, to)
	return nil
}

// talk says a line and returns the answer to it.
func (st *trickle) talk(t *testing.T) string {
	t.Helper()
	st.said++
	_ = st.SetDeadline(time.Now().Add(patience))
	line := fmt.Sprintf("line %d", st.said)
	if _, err := fmt.Fprintln(st, line); err != nil {
		t.Fatal(err)
	}
	answer, err := st.lines.ReadString('\n')
	if err != nil || !strings.Contains(answer, line) {
		t.Fatalf("to %q: %q, %v", line, answer, err)
	}
	return answer
}

// partlyAllowed: of a service's endpoints those are used that the policies of both ends admit, now. Connections to those that stay
// allowed live on.
func partlyAllowed(t *testing.T, s *sandbox.Sandbox) {
	var streams []*trickle
	for _, vip := range vips["api"] {
		streams = append(streams, open(t, s, at(vip, 80), "api-0"))
	}
	check := func(want ...string) func() {
		return func() {
			t.Helper()
			wantBehind(t, s, "shop/web", "api", 80, want...)
			for _, st := range streams {
				if who := st.talk(t); !strings.Contains(who, "api-0") {
					t.Errorf("the stream to api-0 is answered by %s", who)
				}
			}
		}
	}
	all := []string{"api-0", "api-1", "api-2"}
	check(all...)()
	under(t, s, `{metadata: {name: at-one}, spec: {podSelector: {matchLabels: {replica: "1"}}, policyTypes: [Ingress]}}`, check("api-0", "api-2"))
	check(all...)()
	under(t, s, `
metadata: {name: of-web}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Egress]
  egress: [{to: [{podSelector: {matchExpressions: [{key: replica, operator: In, values: ["0", "2"]}]}}], ports: [{port: 8080}]}]`, func() {
		check("api-0", "api-2")()
		wantBehind(t, s, "shop/web", "api", banner, "") // the rule speaks of the port behind the service
		under(t, s, `{metadata: {name: at-two}, spec: {podSelector: {matchLabels: {replica: "2"}}, policyTypes: [Ingress]}}`, check("api-0"))
		check("api-0", "api-2")()
	})
	check(all...)()
	// The port of the service itself is nobody's: a rule that names it admits nothing, and cuts what was open.
	for _, st := range streams {
		_ = st.Close()
	}
	streams = nil
	under(t, s, `
metadata: {name: of-web}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Egress]
  egress: [{to: [{podSelector: {matchLabels: {app: api}}}], ports: [{port: 80}]}, {to: [{ipBlock: {cidr: 10.96.0.0/16}}]}]`, func() {
		wantBehind(t, s, "shop/web", "api", 80, "")
	})
	check(all...)()
}

// outsideOfTheMesh: endpoints without a sidecar are judged by this pod's egress alone: a pod by who it is, an address that is no pod's by
// ipBlock, as the address that it has behind the service. The own node always is admitted.
func outsideOfTheMesh(t *testing.T, s *sandbox.Sandbox, m *source.Manifests) {
	behind := func(v4, v6 []string) {
		t.Helper()
		for i, want := range [][]string{v4, v6} {
			if got := reached(t, s, "shop/web", vips["outside"][i], 80, 60); !slices.Equal(got, want) {
				t.Errorf("by %s: %q, want %q", vips["outside"][i], got, want)
			}
		}
	}
	egress := func(to string) string {
		return "{metadata: {name: of-web}, spec: {podSelector: {matchLabels: {app: web}}, policyTypes: [Egress], egress: [" + to + "]}}"
	}
	nobody := []string{""}
	behind([]string{"198.51.100.7/32", "203.0.113.7/32", "plain"}, []string{"2001:db8::7/128", "plain"})
	under(t, s, egress("{to: [{ipBlock: {cidr: 203.0.113.0/24}}]}"), func() { behind([]string{"203.0.113.7/32"}, nobody) })
	under(t, s, egress("{to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: legacy}}}]}"), func() { behind([]string{"plain"}, []string{"plain"}) })
	// The cluster IP is not what is judged, and is not a way around it.
	under(t, s, egress("{to: [{ipBlock: {cidr: 10.96.0.0/16}}, {ipBlock: {cidr: 'fd00:10:96::/112'}}]}"), func() { behind(nobody, nobody) })

	node := slicesOf(m, "outside")
	v4, v6 := s.Network().Addresses()
	for i, a := range []netip.Addr{v4, v6} {
		l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", netip.AddrPortFrom(a, 8080).String())
		if err != nil {
			t.Fatal(err)
		}
		served := serveLine(l, "the node\n")
		t.Cleanup(func() { _ = l.Close(); <-served })
		node[i].Endpoints = []discoveryv1.Endpoint{{Addresses: []string{a.String()}}}
	}
	applied(t, s, node...)
	under(t, s, egress(""), func() {
		for _, vip := range vips["outside"] {
			if got := say(t, pod(t, s, "shop/web"), at(vip, 80), "who is there?\n"); got != "the node\n" {
				t.Errorf("the own node by %s: %q", vip, got)
			}
		}
	})
	applied(t, s, slicesOf(m, "outside")...)
}

// mixedEndpoints: endpoints of several identities, pods without a sidecar and addresses outside are behind one service. Each is reached as it has to be:
// those of the mesh by mTLS alone, as they are isolated and a pod with a sidecar is nobody in plaintext, the others in plaintext.
func mixedEndpoints(t *testing.T, s *sandbox.Sandbox, m *source.Manifests) {
	list := slicesOf(m, "outside")
	for i := range list {
		for _, name := range []string{"shop/api-1", "shop/slow", "shop/api-0"} {
			a := pod(t, s, name).Spec().IPs[i]
			list[i].Endpoints = append(list[i].Endpoints, discoveryv1.Endpoint{Addresses: []string{a.String()}})
		}
	}
	applied(t, s, list...)
	under(t, s, `
metadata: {name: of-web-alone}
spec:
  podSelector: {matchExpressions: [{key: app, operator: In, values: [api, slow]}]}
  policyTypes: [Ingress]
  ingress: [{from: [{podSelector: {matchLabels: {app: web}}}]}]`, func() {
		for i, others := range [][]string{{"198.51.100.7/32", "203.0.113.7/32"}, {"2001:db8::7/128"}} {
			want := append(others, "api-0", "api-1", "plain", "slow")
			if got := reached(t, s, "shop/web", vips["outside"][i], 80, 150); !slices.Equal(got, want) {
				t.Errorf("by %s: %q, want %q", vips["outside"][i], got, want)
			}
		}
	})
	applied(t, s, slicesOf(m, "outside")...)
}

// serveLine writes a line to whoever connects, until the listener is closed.
func serveLine(l net.Listener, line string) (done chan struct{}) {
	done = make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_ = conn.SetDeadline(time.Now().Add(patience))
			_, _ = io.WriteString(conn, line)
			_, _ = bufio.NewReader(conn).ReadString('\n') // closed with bytes unread it would be a reset
			_ = conn.Close()
		}
	}()
	return done
}

// changingService: another port, another cluster IP, gone, and back. What a sidecar has asked for once follows.
func changingService(t *testing.T, s *sandbox.Sandbox, m *source.Manifests) {
	i := slices.IndexFunc(m.Objects.Services, func(o *corev1.Service) bool { return o.Name == "near" })
	near := m.Objects.Services[i]
	vip := vips["near"][0]
	want := func(what, vip string, port uint16, name string) {
		t.Helper()
		if got := reached(t, s, "shop/web", vip, port, 5); !slices.Equal(got, []string{name}) {
			t.Errorf("%s: %s port %d: %q, want %q", what, vip, port, got, name)
		}
	}
	want("at first", vip, 80, "api-0")

	ports := near.DeepCopy()
	ports.Spec.Ports[0].Port = 8000
	applied(t, s, ports)
	want("another port", vip, 80, "")
	want("another port", vip, 8000, "api-0")

	moved := near.DeepCopy()
	moved.Spec.ClusterIP, moved.Spec.ClusterIPs = "10.96.1.50", []string{"10.96.1.50"}
	applied(t, s, moved)
	want("another cluster IP", vip, 80, "")
	want("another cluster IP", vip, 8000, "")
	want("another cluster IP", "10.96.1.50", 80, "api-0")

	if err := s.ControlPlane().Delete(moved); err != nil {
		t.Fatal(err)
	}
	confirmed(t, s, "shop/web")
	want("gone", "10.96.1.50", 80, "")
	applied(t, s, near)
	want("back", vip, 80, "api-0")
	want("back", "10.96.1.50", 80, "")
}
