package sandbox

import (
	"context"
	"net/netip"
	"testing"
	"time"
)

func TestFlowLogJoinsLinesAndUsesEachOnce(t *testing.T) {
	f := newFlowLog()
	line := `{"log":"gate","direction":"inbound","verdict":"allowed","peer":"spiffe://a/b","authenticated":true,"source":"10.64.0.2:1","destination":"10.64.0.3:80","upstreamLocal":"[::ffff:10.64.0.3]:4000","upstreamRemote":"10.64.0.3:80"}` + "\n"
	for _, piece := range []string{line[:20], line[20:90], line[90:]} {
		if _, err := f.Write([]byte(piece)); err != nil {
			t.Fatal(err)
		}
	}
	seen := netip.MustParseAddrPort("10.64.0.3:4000")
	r, err := f.wait(t.Context(), toApp(seen, 80))
	if err != nil || r.Peer != "spiffe://a/b" {
		t.Fatalf("%+v, %v", r, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if r, err := f.wait(ctx, toApp(seen, 80)); err == nil {
		t.Errorf("a record is used twice: %+v", r)
	}
	if _, err := f.Write([]byte("not JSON\n")); err != nil {
		t.Fatal(err)
	}
	if f.close() == nil {
		t.Error("a line that is no record goes unnoticed")
	}
}
