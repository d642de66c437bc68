package sandbox

import (
	"context"
	"fmt"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

// A connection whose source port was changed on the way is told of all the same, once; one that was not logged is not.
func TestFlowLogOfRenumbered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFlowLog()
		line := `{"time":%q,"log":"outbound","direction":"outbound","verdict":"allowed","peer":"spiffe://a/b","authenticated":true,"upstreamLocal":%q,"upstreamRemote":"10.64.0.3:80"}` + "\n"
		for _, from := range []string{"10.64.0.2:40000", "10.64.0.2:40001", "10.64.0.9:40002"} {
			if _, err := fmt.Fprintf(f, line, time.Now().Format(time.RFC3339Nano), from); err != nil {
				t.Fatal(err)
			}
		}
		to := netip.MustParseAddrPort("10.64.0.3:80")
		for _, from := range []string{"10.64.0.2:40001", "10.64.0.2:1408"} {
			if r, err := f.waitToPeer(t.Context(), netip.MustParseAddrPort(from), to); err != nil || r.Peer != "spiffe://a/b" {
				t.Errorf("%s: %+v, %v", from, r, err)
			}
		}
		if r, err := f.waitToPeer(t.Context(), netip.MustParseAddrPort("10.64.0.2:1409"), to); err == nil {
			t.Errorf("a record is used twice, or another pod's: %+v", r)
		}
	})
}

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
