package verdicts

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/verdict/wire"
)

// bytesOf are verdicts that admit anybody on a port, inwards, and nobody outwards.
func bytesOf(t *testing.T, port uint16) []byte {
	t.Helper()
	b, err := wire.Marshal(&verdict.Verdicts{
		Subject: spiffeid.RequireFromString("spiffe://td.example/ns/shop/sa/db"), Mode: verdict.Permissive,
		Ingress: verdict.Table{Reasons: []verdict.Reason{{Text: "open"}}, Blocks: []verdict.Block{{
			Protocol: verdict.UDP, Ports: []verdict.PortRange{{First: port, Last: port}},
			Peers: verdict.Peers{Anonymous: []verdict.Prefix{{Prefix: netip.MustParsePrefix("0.0.0.0/0"), Verdict: verdict.Verdict{Allow: true}}}},
		}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestHolder(t *testing.T) {
	h := New()
	apply := func(b []byte) error {
		t.Helper()
		changed := h.Changed()
		err := h.Apply(b)
		select {
		case <-changed:
		default:
			t.Error("not announced")
		}
		return err
	}
	admits := func(want uint16) {
		t.Helper()
		c := h.Current()
		if c == nil {
			t.Fatal("holds nothing")
		}
		for _, port := range []uint16{53, 54} {
			peer := verdict.Peer{Addr: netip.MustParseAddr("192.0.2.1")}
			if got := c.Ingress.Decide(verdict.UDP, port, peer).Allowed; got != (port == want) {
				t.Errorf("port %d: %v, while %d is in force", port, got, want)
			}
			if c.Egress.Decide(verdict.UDP, port, peer).Allowed {
				t.Errorf("port %d: allowed outwards", port)
			}
		}
	}
	if h.Current() != nil || h.Missing() != "no verdicts from the control plane" {
		t.Errorf("at first: %v, %q", h.Current(), h.Missing())
	}
	if err := apply([]byte("x")); err == nil || h.Current() != nil || !strings.Contains(h.Missing(), "cannot read") || !strings.Contains(h.Missing(), err.Error()) {
		t.Errorf("bytes that are none: %v, %q", err, h.Missing())
	}
	if err := apply(bytesOf(t, 53)); err != nil || h.Missing() != "" {
		t.Fatalf("%v, missing %q", err, h.Missing())
	}
	admits(53)
	if err := apply([]byte("x")); err == nil || h.Missing() != "" {
		t.Errorf("bytes that are none, later: %v, %q", err, h.Missing())
	}
	admits(53)
	if err := apply(bytesOf(t, 54)); err != nil {
		t.Fatal(err)
	}
	admits(54)
}
