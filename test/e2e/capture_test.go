package e2e

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mantlet/mantlet/sandbox"
	"github.com/mantlet/mantlet/sandbox/netns"
	"github.com/mantlet/mantlet/xds/names"
)

// sidecar is what runs in a pod, as /proc shows it.
type sidecar struct {
	agent, envoy int // pids
	runDir       string
	token        string
}

// sidecarOf finds a pod's agent and Envoy.
func sidecarOf(t *testing.T, name string) sidecar {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var sc sidecar
	args := map[int][]string{}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			continue // it has ended
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f)))
		if err != nil {
			t.Fatal(err)
		}
		args[pid] = strings.Split(string(text), "\x00")
	}
	flag := func(a []string, name string) string {
		if i := slices.Index(a, name); i >= 0 && i+1 < len(a) {
			return a[i+1]
		}
		return ""
	}
	for pid, a := range args {
		if flag(a, "--pod") == name {
			sc.agent, sc.runDir, sc.token = pid, flag(a, "--run-dir"), flag(a, "--token-file")
		}
	}
	if sc.agent == 0 {
		t.Fatalf("no agent of %s runs", name)
	}
	for pid, a := range args {
		if strings.HasPrefix(flag(a, "--config-path"), sc.runDir+"/") {
			sc.envoy = pid
		}
	}
	return sc
}

// stats asks Envoy for counters and gauges by name.
func (sc sidecar) stats(t *testing.T, filter string) map[string]int {
	t.Helper()
	client := &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(sc.runDir, "envoy", "admin.sock"))
	}}}
	resp, err := client.Get("http://envoy/stats?filter=" + filter)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	out := map[string]int{}
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), ": ")
		if n, err := strconv.Atoi(value); err == nil {
			out[name] = n
		}
	}
	if len(out) == 0 {
		t.Fatalf("no stat %s", filter)
	}
	return out
}

// taken counts the connections that the capture ports have accepted.
func (sc sidecar) taken(t *testing.T) int {
	t.Helper()
	return total(sc.stats(t, `^listener\..*_150(01|06)\.downstream_cx_total$`))
}

// total adds stats up, of all workers together.
func total(stats map[string]int) (n int) {
	for name, v := range stats {
		if !strings.Contains(name, "worker_") {
			n += v
		}
	}
	return n
}

// capturePorts: whoever speaks to the capture ports themselves is cut off, once, and Envoy does not speak to itself.
func capturePorts(t *testing.T, s *sandbox.Sandbox) {
	db := pod(t, s, "shop/db")
	addr4, addr6 := db.Spec().IPs[0], db.Spec().IPs[1]
	local := []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.9.9.9"), netip.IPv6Loopback(), addr4, addr6}
	// An address that the cluster does not know of: a pod may have more than its pod IPs.
	extra := []netip.Addr{netip.MustParseAddr("192.0.2.77"), netip.MustParseAddr("2001:db8::77")}
	if err := db.Do(func() error { return addAddresses(extra) }); err != nil {
		t.Fatal(err)
	}
	local = append(local, extra...)
	before := sidecarOf(t, "shop/db")
	for _, port := range []uint16{names.InboundPort, names.OutboundPort} {
		cut := func(who string, probe func(netip.AddrPort) netns.Outcome, addrs ...netip.Addr) {
			for _, a := range addrs {
				to := netip.AddrPortFrom(a, port)
				taken := before.taken(t)
				o := probe(to)
				if o.Reached != "" || o.Bytes > 0 || o.Connect == netns.TimedOut || o.Err == netns.TimedOut {
					t.Errorf("from %s to %s: %+v", who, to, o)
				}
				if n := before.taken(t) - taken; n > 1 {
					t.Errorf("from %s to %s: one connection made %d", who, to, n)
				}
			}
		}
		by := func(from interface {
			Probe(context.Context, []netns.Target) ([]netns.Outcome, error)
		},
		) func(netip.AddrPort) netns.Outcome {
			return func(to netip.AddrPort) netns.Outcome { return probe(t, from, to.Addr(), to.Port()) }
		}
		cut("the pod itself", by(db), local...)
		cut("a denied pod", by(pod(t, s, "shop/evil")), addr4, addr6)
		cut("an admitted pod", by(pod(t, s, "shop/api")), addr4, addr6)
		cut("an admitted pod without sidecar", by(pod(t, s, "legacy/plain")), addr4, addr6)
		cut("the node", by(s.Network()), addr4, addr6)
		cut("an admitted identity past its sidecar", func(to netip.AddrPort) netns.Outcome {
			id := genuine(t, s.Authority(), identityOf(t, s, "shop/api"))
			return netns.Outcome{Bytes: steal(t, pod(t, s, "shop/evil"), to, meshTLS(id), "hello\n")}
		}, addr4, addr6)
		cut("past the pod's own sidecar", func(to netip.AddrPort) netns.Outcome {
			conn, err := past(t, db, to)
			if err != nil {
				return netns.Outcome{}
			}
			return netns.Outcome{Bytes: loot(t, conn, "hello\n")}
		}, local...)
	}
	after := sidecarOf(t, "shop/db")
	if after.envoy != before.envoy {
		t.Error("Envoy died of it")
	}
	for _, a := range db.Spec().IPs {
		wantReached(t, probe(t, pod(t, s, "shop/api"), a, echo), "shop/db")
	}
	await(t, "connections to end", func() bool {
		return total(after.stats(t, `^listener\..*_150(01|06)\.downstream_cx_active$`)) == 0
	})
}

// await asks again until something is so.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.After(patience); !ok(); {
		select {
		case <-deadline:
			t.Fatalf("waited %s for %s", patience, what)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// listen listens in a pod and counts who comes; each gets a line at once.
func listen(t *testing.T, in *netns.Pod, at string) *atomic.Int32 {
	t.Helper()
	var l net.Listener
	if err := in.Do(func() (err error) {
		l, err = net.Listen("tcp", at)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	var n atomic.Int32
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			n.Add(1)
			go func() {
				defer conn.Close()
				_ = conn.SetDeadline(time.Now().Add(patience))
				_, _ = io.WriteString(conn, "secret\n")
				_, _ = io.Copy(io.Discard, conn)
			}()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return &n
}

// loopback: what an app keeps to itself the sidecar does not show to others: it connects to the address that was called. The own node,
// which everybody must admit, gets no further than without a sidecar.
func loopback(t *testing.T, s *sandbox.Sandbox) {
	const port, open = 9999, 9998
	db := pod(t, s, "shop/db")
	for _, host := range []string{"127.0.0.1", "[::1]"} {
		kept, shown := listen(t, db, fmt.Sprintf("%s:%d", host, port)), new(atomic.Int32)
		if host == "127.0.0.1" {
			shown = listen(t, db, fmt.Sprintf("[::]:%d", open))
		}
		for _, a := range db.Spec().IPs {
			for _, name := range []string{"shop/api", "legacy/plain", "shop/evil"} {
				wantNothing(t, probe(t, pod(t, s, name), a, port))
			}
			wantNothing(t, probe(t, s.Network(), a, port))
			id := meshTLS(genuine(t, s.Authority(), identityOf(t, s, "shop/api")))
			if n := steal(t, pod(t, s, "shop/evil"), netip.AddrPortFrom(a, port), id, "hello\n"); n != 0 {
				t.Errorf("%d bytes past the sidecar from %s", n, host)
			}
			if host == "127.0.0.1" { // the same ways lead to an app that is open to all
				if o := probe(t, pod(t, s, "shop/api"), a, open); o.Bytes == 0 {
					t.Errorf("%s: %+v", a, o)
				}
				if o := probe(t, s.Network(), a, open); o.Bytes == 0 {
					t.Errorf("from the node to %s: %+v", a, o)
				}
			}
		}
		if n := kept.Load(); n != 0 {
			t.Errorf("the app on %s accepted %d connections", host, n)
		}
		if host == "127.0.0.1" && shown.Load() != 4 {
			t.Errorf("the open app accepted %d connections, not 4", shown.Load())
		}
	}
}

// ownNodeAndSelf: the own node and the pod itself are admitted whatever policies say, and nobody else can pass for them.
func ownNodeAndSelf(t *testing.T, s *sandbox.Sandbox) {
	v4, v6 := s.Network().Addresses()
	vault := pod(t, s, "strict/vault-a")
	eachFamily(t, vault, func(t *testing.T, a netip.Addr) {
		node := v6
		if a.Is4() {
			node = v4
		}
		wantReached(t, probe(t, s.Network(), a, echo), "strict/vault-a")
		wantReached(t, probe(t, vault, a, echo), "strict/vault-a")
		count := accepted(t, vault, echo)
		for _, name := range []string{"strict/vault-b", "shop/api", "legacy/plain", "legacy/stranger"} {
			wantNothing(t, probe(t, pod(t, s, name), a, echo))
			out, err := pod(t, s, name).Probe(t.Context(), []netns.Target{{
				Addr: netip.AddrPortFrom(a, echo), Speaks: netns.ClientFirst, Nonce: "hello", From: node, Timeout: time.Second,
			}})
			if err != nil {
				t.Fatal(err)
			}
			if out[0].Reached != "" || out[0].Bytes > 0 {
				t.Errorf("%s passes for the node: %+v", name, out[0])
			}
		}
		wantReached(t, probe(t, s.Network(), a, echo), "strict/vault-a")
		if got := accepted(t, vault, echo); got != count+1 {
			t.Errorf("vault-a accepted %d more connections than the node's", got-count-1)
		}
		vip := netip.MustParseAddr(vaultVIP6)
		if a.Is4() {
			vip = netip.MustParseAddr(vaultVIP4)
		}
		for range 10 { // never the other one behind it
			o := probe(t, vault, vip, 80)
			if o.Reached != "strict/vault-a:8080" || o.Err != "" {
				t.Errorf("by its Service: %+v", o)
			}
		}
		for _, name := range []string{"shop/api", "legacy/plain"} {
			wantNothing(t, probe(t, pod(t, s, name), vip, 80))
		}
	})
}
