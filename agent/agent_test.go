package agent

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mantlet/mantlet/agent/envoy"
	"github.com/mantlet/mantlet/agent/flows"
	"github.com/mantlet/mantlet/agent/hold"
	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/agent/netfilter/packet"
	"github.com/mantlet/mantlet/agent/podtest"
	"github.com/mantlet/mantlet/xds/names"
)

func cleanRedirect(t *testing.T) {
	t.Helper()
	r, err := netfilter.New(netfilter.ByMark(), slog.New(slog.DiscardHandler))
	if err == nil {
		kernel := packet.Open()
		err = errors.Join(r.Remove(), packet.Remove(kernel), hold.Remove())
		r.Close()
		kernel.Close()
	}
	if err != nil {
		t.Error(err)
	}
}

// One pod from its first moment to its last.
func TestLife(t *testing.T) {
	w := newWorld(t)
	w.app("[::]:8080")
	echo(t, w.outside.Listen(t, "[::]:9090"))

	// No control plane yet: closed, and not ready for that reason.
	w.startAgent()
	w.log.await(t, "failed attempt at an identity", func(s string) bool {
		return strings.Contains(s, "identity not renewed") && strings.Contains(s, "envoy: started")
	})
	err := Ready(t.Context(), w.cfg.RunDir, 0)
	if err == nil || !strings.Contains(err.Error(), "no valid X.509-SVID") || !strings.Contains(err.Error(), "envoy has not accepted: inbound, gate, outbound, rbac") {
		t.Errorf("ready without a control plane: %v", err)
	}
	w.refused("without a control plane")

	w.startPlane()
	w.ready()

	t.Run("inbound with an identity", func(t *testing.T) {
		for _, address := range []string{"10.99.0.2:8080", "[fd99::2]:8080"} {
			c, err := w.peer(address)
			if err != nil {
				t.Fatal(err)
			}
			if got := greeted(t, c); got != "hello\n" {
				t.Fatalf("%s: %q", address, got)
			}
			say(t, c, "ping")
			local := netip.MustParseAddrPort(c.LocalAddr().String())
			c.Close()
			r := w.record("the connection to "+address, func(r flows.Record) bool { return r.Source == local })
			if r.Log != names.LogGate || r.Direction != flows.Inbound || r.Verdict != flows.Allowed || !r.Authenticated ||
				r.Peer != w.api.String() || r.Self == "" || r.Self == r.Peer ||
				r.Destination.String() != address || r.UpstreamRemote.String() != address || !r.UpstreamLocal.IsValid() ||
				r.Cluster != names.ClusterApp || r.BytesReceived != 4 || r.BytesSent != 10 || r.DurationSeconds <= 0 || time.Since(r.Time) > time.Hour {
				t.Errorf("record of %s: %+v", address, r)
			}
		}
	})

	t.Run("inbound without an identity", func(t *testing.T) {
		var c net.Conn
		var err error
		w.outside.Do(func() { c, err = apiDialer("10.99.0.2:8080").Dial("tcp", "10.99.0.2:8080") })
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := io.WriteString(c, "some plaintext\n"); err != nil {
			t.Fatal(err)
		}
		if got := greeted(t, c); got != "" {
			t.Errorf("the app answered %q", got)
		}
		local := netip.MustParseAddrPort(c.LocalAddr().String())
		r := w.record("the plaintext connection", func(r flows.Record) bool { return r.Source == local })
		if r.Verdict != flows.Denied || r.Authenticated || r.Peer != "" || r.Log != names.LogGate || r.Destination.String() != "10.99.0.2:8080" || r.UpstreamLocal.IsValid() {
			t.Errorf("record: %+v", r)
		}
	})

	t.Run("inbound to a port that is not allowed", func(t *testing.T) {
		c, err := w.peer("10.99.0.2:8081")
		if err != nil {
			t.Fatal(err)
		}
		if got := greeted(t, c); got != "" {
			t.Errorf("got %q", got)
		}
		r := w.record("the denied peer", func(r flows.Record) bool { return r.Destination.Port() == 8081 })
		if r.Verdict != flows.Denied || !r.Authenticated || r.Peer != w.api.String() {
			t.Errorf("record: %+v", r)
		}
	})

	t.Run("inbound without a certificate", func(t *testing.T) {
		var c net.Conn
		var err error
		w.outside.Do(func() { c, err = apiDialer("10.99.0.2:8080").Dial("tcp", "10.99.0.2:8080") })
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		session := tls.Client(c, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{names.ALPN}})
		_ = session.SetDeadline(time.Now().Add(patience))
		if err = session.Handshake(); err == nil { // in TLS 1.3 the refusal comes after the client's last word
			_, err = session.Read(make([]byte, 1))
		}
		if err == nil {
			t.Error("accepted")
		}
		local := netip.MustParseAddrPort(c.LocalAddr().String())
		r := w.record("the handshake", func(r flows.Record) bool { return r.Source == local })
		if r.Verdict != flows.Denied || r.Authenticated || r.Peer != "" || !strings.Contains(r.TransportFailure, "PEER_DID_NOT_RETURN_A_CERTIFICATE") {
			t.Errorf("record: %+v", r)
		}
	})

	t.Run("inbound to the capture port", func(t *testing.T) {
		var c net.Conn
		var err error
		w.outside.Do(func() { c, err = apiDialer("10.99.0.2:15006").Dial("tcp", "10.99.0.2:15006") })
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := io.WriteString(c, "some plaintext\n"); err != nil {
			t.Fatal(err)
		}
		if got := greeted(t, c); got != "" {
			t.Errorf("got %q", got)
		}
		r := w.record("the capture port", func(r flows.Record) bool { return r.Destination.Port() == 15006 })
		if r.Verdict != flows.Denied || r.Log != names.LogInbound {
			t.Errorf("record: %+v", r)
		}
	})

	t.Run("inbound to an app that is not there", func(t *testing.T) {
		if err := w.cp.Apply(objects(8080, 8082).NetworkPolicies[0]); err != nil {
			t.Fatal(err)
		}
		if err := w.cp.Server().Ledger().Wait(t.Context(), "shop/db"); err != nil {
			t.Fatal(err)
		}
		c, err := w.peer("10.99.0.2:8082")
		if err != nil {
			t.Fatal(err)
		}
		if got := greeted(t, c); got != "" {
			t.Errorf("got %q", got)
		}
		r := w.record("the app that is not there", func(r flows.Record) bool { return r.Destination.Port() == 8082 })
		if r.Verdict != flows.Failed || r.Peer != w.api.String() || r.Log != names.LogGate {
			t.Errorf("record: %+v", r)
		}
	})

	t.Run("outbound allowed", func(t *testing.T) {
		for _, address := range []string{"10.99.0.1:9090", "[fd99::1]:9090"} {
			c, err := dial(t, address)
			if err != nil {
				t.Fatal(err)
			}
			if got := greeted(t, c); got != "hello\n" {
				t.Errorf("%s: %q", address, got)
			}
			c.Close()
			r := w.record("the connection to "+address, func(r flows.Record) bool { return r.Destination.String() == address })
			if r.Log != names.LogOutbound || r.Direction != flows.Outbound || r.Verdict != flows.Allowed || r.Authenticated || r.Cluster != names.ClusterPassthrough {
				t.Errorf("record of %s: %+v", address, r)
			}
		}
	})

	t.Run("outbound denied", func(t *testing.T) {
		for _, address := range []string{"10.99.0.1:9091", "[fd99::1]:9091"} {
			if _, err := dial(t, address); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("%s: %v, not refused", address, err)
			}
			r := w.record("the denied destination", func(r flows.Record) bool { return r.Destination.String() == address })
			if r.Verdict != flows.Denied || r.Direction != flows.Outbound || r.Log != names.LogHold || r.Self == "" || !r.Source.IsValid() {
				t.Errorf("record: %+v", r)
			}
		}
	})

	t.Run("inbound from outside the cluster", func(t *testing.T) {
		for _, address := range []string{"10.99.0.2:8080", "[fd99::2]:8080"} {
			var err error
			w.outside.Do(func() {
				var c net.Conn
				if c, err = net.Dial("tcp", address); err == nil {
					c.Close()
				}
			})
			if !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("%s: %v, not refused", address, err)
			}
			r := w.record("the refusal", func(r flows.Record) bool { return r.Log == names.LogHold && r.Destination.String() == address })
			if r.Verdict != flows.Denied || r.Direction != flows.Inbound || !r.Source.IsValid() {
				t.Errorf("record: %+v", r)
			}
		}
	})

	t.Run("to itself", func(t *testing.T) {
		c, err := dial(t, "10.99.0.2:8080")
		if err != nil {
			t.Fatal(err)
		}
		if got := greeted(t, c); got != "hello\n" {
			t.Errorf("got %q", got)
		}
	})

	w.stopAgent()
	w.refused("after the agent's end")
	if text, _ := w.log.read(); strings.Contains(text, "level=ERROR") {
		t.Error("errors in the log")
	}
	// What the gate has logged is not logged again by the capture.
	text, _ := w.flows.read()
	seen := map[string]bool{}
	for line := range strings.Lines(text) {
		var r flows.Record
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatal(err)
		}
		if ends := r.Source.String() + " " + r.Destination.String(); seen[ends] {
			t.Errorf("two records of %s", ends)
		} else {
			seen[ends] = true
		}
	}
}

// Where Envoy has no user of its own, its mark keeps its connections out of the redirect.
func TestSharedUser(t *testing.T) {
	w := newWorld(t)
	w.cfg.Exempt = envoy.SharedUser
	w.app("[::]:8080")
	echo(t, w.outside.Listen(t, "[::]:9090"))
	w.startPlane()
	w.startAgent()
	w.ready()
	c, err := w.peer("10.99.0.2:8080")
	if err != nil {
		t.Fatal(err)
	}
	if got := greeted(t, c); got != "hello\n" {
		t.Errorf("inbound: %q", got)
	}
	c.Close()
	for _, address := range []string{"10.99.0.1:9090", "[fd99::1]:9090"} {
		out, err := dial(t, address)
		if err != nil {
			t.Fatal(err)
		}
		if got := greeted(t, out); got != "hello\n" {
			t.Errorf("outbound to %s: %q", address, got)
		}
		out.Close()
	}
	// Everybody is the same user here, this test too; it is the pid that tells Envoy.
	wantShut(t, AgentSocket(w.cfg.RunDir))
	w.log.await(t, "log of the refusal", func(s string) bool { return strings.Contains(s, "is not this agent's envoy") })
}

// wantShut wants the agent's socket to end a connection of this process before it answers anything.
func wantShut(t *testing.T, socket string) {
	t.Helper()
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	_, _ = io.WriteString(c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00") // how an HTTP/2 client begins
	if n, err := io.Copy(io.Discard, c); n != 0 || err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the agent's socket answered %d bytes, %v", n, err)
	}
}

// The sockets are for Envoy and for probes, not for the app: one gives away the private key.
func TestSocketsAreClosedToTheApp(t *testing.T) {
	w := newWorld(t)
	w.startPlane()
	w.startAgent()
	w.ready()
	wantShut(t, AgentSocket(w.cfg.RunDir)) // root, but not Envoy
	if podtest.SingleUser() {
		return // there is no other user to be
	}
	sockets := []string{AgentSocket(w.cfg.RunDir), StatusSocket(w.cfg.RunDir), filepath.Join(EnvoyDir(w.cfg.RunDir), "admin.sock")}
	for _, socket := range sockets {
		if _, err := os.Stat(socket); err != nil {
			t.Fatal(err)
		}
		podtest.AsUser(1234, func() {
			if c, err := net.Dial("unix", socket); !errors.Is(err, fs.ErrPermission) {
				t.Errorf("another user at %s: %v", socket, err)
				if err == nil {
					c.Close()
				}
			}
		})
	}
	// Who has become the proxy's user (root with CAP_SETUID can) gets to the socket, and no further.
	user := exempted(t)
	podtest.As(int(user.UID), int(user.GID), func() {
		c, err := net.Dial("unix", StatusSocket(w.cfg.RunDir))
		if err == nil {
			c.Close()
			t.Error("the proxy's user can open the status socket")
		}
	})
}
