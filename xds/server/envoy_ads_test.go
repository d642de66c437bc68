package server_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"

	"github.com/mantlet/mantlet/xds/server"
)

// confirmed waits until everything published for ns/a is in force in Envoy.
func confirmed(t *testing.T, b *bench) {
	t.Helper()
	if err := b.Ledger().Wait(within(t, 30*time.Second), "ns/a"); err != nil {
		t.Fatal(err)
	}
}

// refused waits for a NACK and returns it.
func refused(t *testing.T, b *bench) *server.RefusedError {
	t.Helper()
	err := b.Ledger().Wait(within(t, 30*time.Second), "ns/a")
	var r *server.RefusedError
	if !errors.As(err, &r) {
		t.Fatalf("want a NACK, got: %v", err)
	}
	return r
}

func answers(t *testing.T, port int, want string) {
	t.Helper()
	if got, _ := dial(t, fmt.Sprintf("127.0.0.1:%d", port)); got != want {
		t.Errorf("the listener on port %d answers %q, want %q", port, got, want)
	}
}

func TestEnvoyTakesUpdatesAndKeepsTheOldOnNack(t *testing.T) {
	b := start(t, nil)
	port, one, two := freePort(t), banner(t, "one"), banner(t, "two")
	b.Publish("ns/a", set(t, proxy(t, "in", port, "app"), static(t, "app", one), rbac(t, "ALLOW")))
	e := startEnvoy(t, "ns/a", b.socket)
	confirmed(t, b)
	answers(t, port, "one")

	b.Publish("ns/a", set(t, proxy(t, "in", port, "app"), static(t, "app", two), rbac(t, "ALLOW")))
	confirmed(t, b)
	answers(t, port, "two")

	bad := set(t, listener(t, "in", `{name: in, address: {socket_address: {address: not-an-address, port_value: 1}}}`), static(t, "app", two), rbac(t, "ALLOW"))
	b.Publish("ns/a", bad)
	if r := refused(t, b); r.Name != "in" || r.Type != server.ListenerType {
		t.Errorf("refused: %v", r)
	}
	answers(t, port, "two")
	if got := e.stat("listener_manager.listener_added"); got != 1 {
		t.Errorf("%d listeners were added", got)
	}

	// While the listener is refused, the filter still changes, and a filter of the wrong type is refused for itself.
	b.Publish("ns/a", set(t, listener(t, "in", `{name: in, address: {socket_address: {address: not-an-address, port_value: 1}}}`), static(t, "app", two),
		resource(t, "rbac", fromYAML(t, &corev3.TypedExtensionConfig{}, `{name: rbac, typed_config: {"@type": `+extensions+`tcp_proxy.v3.TcpProxy, stat_prefix: x, cluster: app}}`))))
	await(t, "refused filter", func() bool { return strings.Count(b.status("ns/a"), "refused: ") == 2 })
	answers(t, port, "two")

	b.Publish("ns/a", set(t, proxy(t, "in", port, "app"), static(t, "app", one), rbac(t, "DENY")))
	confirmed(t, b)
	if got := e.stat("listener_manager.lds.update_rejected"); got != 1 {
		t.Errorf("Envoy refused %d listener responses, want 1: a refused version was sent again", got)
	}
}

// A response is refused as a whole for the sake of one resource, in two ways: after the good ones were applied, and before
// anything was. Either way the ledger ends with exactly the guilty refused and all others in force.
func TestEnvoyRefusesOneOfMany(t *testing.T) {
	cases := map[string]string{
		"while applying":   `{name: bad, type: STATIC, load_assignment: {cluster_name: bad, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: not-an-address, port_value: 1}}}}]}]}}`,
		"while validating": `{name: bad, type: STATIC, connect_timeout: -1s}`,
	}
	for name, text := range cases {
		t.Run(name, func(t *testing.T) {
			b := start(t, nil)
			port, app := freePort(t), banner(t, "app")
			b.Publish("ns/a", set(t, onDemandProxy(t, "out", port), static(t, "nowhere"), static(t, "good", app), cluster(t, "bad", text), static(t, "also-good", app)))
			e := startEnvoy(t, "ns/a", b.socket)
			if r := refused(t, b); r.Name != "bad" {
				t.Errorf("refused: %v", r)
			}
			await(t, "the rest in force", func() bool {
				return strings.Count(b.status("ns/a"), "in force") == 4 && strings.Contains(b.status("ns/a"), "cds bad refused")
			})
			for _, c := range []string{"good", "also-good"} {
				if got := e.stat("cluster." + c + ".membership_total"); got != 1 {
					t.Errorf("%s has %d endpoints in Envoy", c, got)
				}
			}
			// The next push is not held up, and repairs.
			b.Publish("ns/a", set(t, onDemandProxy(t, "out", port), static(t, "nowhere"), static(t, "good", app), static(t, "bad", app), static(t, "also-good", app)))
			confirmed(t, b)
		})
	}
}

func TestEnvoyRefusesTwoListenersOfThree(t *testing.T) {
	b := start(t, nil)
	bad := func(name string) *server.Resource {
		return listener(t, name, `{name: `+name+`, address: {socket_address: {address: not-an-address, port_value: 1}}}`)
	}
	port, app := freePort(t), banner(t, "app")
	b.Publish("ns/a", set(t, bad("a"), proxy(t, "b", port, "app"), bad("c"), static(t, "app", app), rbac(t, "ALLOW")))
	e := startEnvoy(t, "ns/a", b.socket)
	await(t, "two refused, one in force", func() bool {
		s := b.status("ns/a")
		return strings.Contains(s, "lds a refused") && strings.Contains(s, "lds b in force") && strings.Contains(s, "lds c refused")
	})
	if got := e.stat("listener_manager.lds.update_rejected"); got != 1 {
		t.Errorf("Envoy refused %d responses; its error names both listeners, so one should do", got)
	}
	await(t, "listener in service", func() bool { return e.stat("listener_manager.workers_started") == 1 })
	answers(t, port, "app")
}

func TestEnvoyIsSentNothingUnchangedAfterAReconnect(t *testing.T) {
	dir := shortDir(t)
	port, app := freePort(t), banner(t, "app")
	od := fmt.Sprintf("od|127.0.0.2:%d", port)
	published := set(t, onDemandProxy(t, "out", port), static(t, "nowhere"), proxy(t, "in", freePort(t), "app"), static(t, "app", app), rbac(t, "ALLOW"))
	first := startAt(t, dir+"/s", nil)
	first.od.set(od, static(t, od, app))
	first.Publish("ns/a", published)
	startEnvoy(t, "ns/a", first.socket)
	confirmed(t, first)
	if got, _ := dial(t, fmt.Sprintf("127.0.0.2:%d", port)); got != "app" {
		t.Fatalf("on demand: %q", got)
	}
	first.stop()
	if got, _ := dial(t, fmt.Sprintf("127.0.0.2:%d", port)); got != "app" {
		t.Errorf("without a control plane: %q", got)
	}
	second := startAt(t, dir+"/s", nil)
	second.od.set(od, static(t, od, app))
	second.Publish("ns/a", published)
	confirmed(t, second)
	await(t, "on-demand name subscribed to again", func() bool { return len(second.Subscribers(od)) == 1 })
	confirmed(t, second)
	for url, c := range second.Ledger().Totals() {
		if c.Resources+c.Removals != 0 {
			t.Errorf("%s: %d resources and %d removals were sent to an Envoy that has them all", url, c.Resources, c.Removals)
		}
	}
	second.od.set(od, static(t, od))
	second.Refresh("ns/a", od)
	confirmed(t, second)
	if got, _ := dial(t, fmt.Sprintf("127.0.0.2:%d", port)); got != "" {
		t.Errorf("an on-demand cluster without endpoints answers %q", got)
	}
}

// What Envoy does with names on demand, on which the control plane's answers rest. Its lookup timeout is 60 s here, so that
// a connection that waits for it is told from one that fails at once.
func TestEnvoyOnDemand(t *testing.T) {
	b := start(t, nil)
	port, app := freePort(t), banner(t, "app")
	b.Publish("ns/a", set(t, onDemandProxy(t, "out", port), static(t, "nowhere")))
	startEnvoy(t, "ns/a", b.socket)
	confirmed(t, b)
	address := func(host int) string { return fmt.Sprintf("127.0.0.%d:%d", host, port) }
	od := func(host int) string { return "od|" + address(host) }
	now := func(what string, host int, want string) {
		t.Helper()
		if got, took := dial(t, address(host)); got != want || took > 30*time.Second {
			t.Errorf("%s: got %q, want %q, after %v", what, got, want, took)
		}
	}

	b.od.set(od(2), static(t, od(2), app))
	now("known", 2, "app")
	now("known, again", 2, "app")
	b.od.set(od(3), static(t, od(3)))
	now("no endpoints", 3, "")
	now("no endpoints, again", 3, "")
	b.od.set(od(3), static(t, od(3), app))
	b.Refresh("ns/a", od(3))
	confirmed(t, b)
	now("endpoints came", 3, "app")
	b.od.set(od(3), static(t, od(3)))
	b.Refresh("ns/a", od(3))
	confirmed(t, b)
	now("endpoints went", 3, "")

	// A name answered as removed: the first connection fails at once. Envoy keeps the subscription and never asks again, so
	// every later connection waits until its timeout, or until the name is pushed after all.
	now("unknown", 4, "")
	confirmed(t, b)
	asked := b.od.count()
	c, err := net.Dial("tcp", address(4))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
	if n, err := c.Read(make([]byte, 1)); !isTimeout(err) {
		t.Errorf("second connection to an unknown name: %d bytes, %v; it used to wait", n, err)
	}
	if b.od.count() != asked {
		t.Error("Envoy asked again for a name that it was told is removed: it used not to")
	}
	b.od.set(od(4), static(t, od(4), app))
	b.Refresh("ns/a", od(4))
	_ = c.SetReadDeadline(time.Now().Add(30 * time.Second))
	if got, err := io.ReadAll(c); string(got) != "app" {
		t.Errorf("the waiting connection after the push: %q, %v", got, err)
	}
	now("came to exist", 4, "app")

	// The same for a name that was known and is removed.
	b.od.set(od(2), nil)
	b.Refresh("ns/a", od(2))
	confirmed(t, b)
	c, err = net.Dial("tcp", address(2))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
	if n, err := c.Read(make([]byte, 1)); !isTimeout(err) {
		t.Errorf("connection to a removed name: %d bytes, %v; it used to wait", n, err)
	}
}

func isTimeout(err error) bool {
	var e net.Error
	return errors.As(err, &e) && e.Timeout()
}
