package e2e

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/mantlet/mantlet/sandbox/matrix"
	"github.com/mantlet/mantlet/sandbox/netns"
)

// TestClosedWithoutEnvoy: while a pod's Envoy is away nothing gets in or out, but from its own node, which is not led to Envoy; and all is as before
// when it is back.
func TestClosedWithoutEnvoy(t *testing.T) {
	s := start(t, manifests(t, besieged), matrix.Options{})
	db, api, plain, evil := pod(t, s, "shop/db"), pod(t, s, "shop/api"), pod(t, s, "legacy/plain"), pod(t, s, "shop/evil")
	sc := sidecarOf(t, "shop/db")
	signal := func(pid int, sig syscall.Signal) {
		t.Helper()
		if err := syscall.Kill(pid, sig); err != nil {
			t.Fatal(err)
		}
	}
	signal(sc.agent, syscall.SIGSTOP) // or it would start the next one at once
	resumed := false
	resume := func() {
		if !resumed {
			signal(sc.agent, syscall.SIGCONT)
			resumed = true
		}
	}
	defer resume()
	signal(sc.envoy, syscall.SIGKILL)
	await(t, "Envoy's end", func() bool {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", sc.envoy))
		return err != nil || strings.Contains(string(text), "State:\tZ")
	})
	for i, a := range db.Spec().IPs {
		for _, port := range []uint16{banner, echo} {
			wantReached(t, probe(t, s.Network(), a, port), "shop/db")
		}
		before := []int{accepted(t, db, banner), accepted(t, db, echo)}
		for _, port := range []uint16{banner, echo} {
			for _, from := range []*netns.Pod{api, plain, evil} {
				wantNothing(t, probe(t, from, a, port))
			}
			id := meshTLS(genuine(t, s.Authority(), identityOf(t, s, "shop/api")))
			if n := steal(t, evil, netip.AddrPortFrom(a, port), id, "hello\n"); n != 0 {
				t.Errorf("%s:%d: %d bytes", a, port, n)
			}
			conn, err := past(t, evil, netip.AddrPortFrom(a, port))
			if err == nil {
				conn.Close()
				t.Errorf("%s:%d accepts connections", a, port)
			}
		}
		for _, to := range []*netns.Pod{api, plain, evil} {
			count := accepted(t, to, echo)
			if o := probe(t, db, to.Spec().IPs[i], echo); o.Connect == netns.Connected {
				t.Errorf("db gets out to %s: %+v", to.Name(), o)
			}
			if got := accepted(t, to, echo); got != count {
				t.Errorf("%s accepted %d connections", to.Name(), got-count)
			}
		}
		if got := []int{accepted(t, db, banner), accepted(t, db, echo)}; got[0] != before[0] || got[1] != before[1] {
			t.Errorf("%s: the app accepted connections: %v, then %v", a, before, got)
		}
	}
	resume()
	client := &http.Client{Timeout: 2 * patience, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", filepath.Join(sc.runDir, "status.sock"))
	}}}
	await(t, "the agent to notice", func() bool { return sidecarOf(t, "shop/db").envoy != sc.envoy })
	resp, err := client.Get("http://agent/ready?wait=20s")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("not ready again: %s", resp.Status)
	}
	for _, a := range db.Spec().IPs {
		for _, port := range []uint16{banner, echo} {
			for _, from := range []*netns.Pod{api, plain} {
				wantReached(t, probe(t, from, a, port), "shop/db")
			}
			wantNothing(t, probe(t, evil, a, port))
		}
	}
}
