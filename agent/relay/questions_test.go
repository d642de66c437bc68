package relay

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

var dest = netip.MustParseAddrPort("10.0.0.1:80")

func clusters(t *testing.T, nonce, version string) *deltaResponse {
	t.Helper()
	r := &deltaResponse{TypeUrl: TypeCluster, Nonce: nonce}
	if version == "" {
		r.RemovedResources = []string{onDemandName(dest)}
	} else {
		r.Resources = []*discoveryv3.Resource{what{TypeCluster, onDemandName(dest), version}.resource(t)}
	}
	return r
}

// Over real streams: an answer, a denial that is told before Envoy gets it, and no answer at all.
func TestAsk(t *testing.T) {
	told, release := make(chan Verdict), make(chan struct{})
	b := newBench(t, func(r *Relay) {
		r.OnDestinations(func(news map[netip.AddrPort]Verdict) {
			told <- news[dest]
			r.Forget(nil) // may be called here
			<-release
		})
	})
	close(b.ready)
	envoy := b.connect()
	b.says(envoy, &deltaRequest{TypeUrl: TypeCluster, ResourceNamesSubscribe: []string{"*"}})
	up := b.upstream()
	wanted := map[string]bool{TypeListener: true, TypeCluster: true}
	for len(wanted) > 0 {
		r, err := up.Recv()
		if err != nil {
			t.Fatal(err)
		}
		delete(wanted, r.TypeUrl)
	}
	type result struct {
		allowed bool
		err     error
	}
	asked := make(chan result, 1)
	ask := func(ctx context.Context) {
		go func() {
			allowed, err := b.relay.Ask(ctx, dest)
			asked <- result{allowed, err}
		}()
	}
	ask(t.Context())
	wantRequest(t, up, &deltaRequest{TypeUrl: TypeCluster, ResourceNamesSubscribe: []string{onDemandName(dest)}})
	send(t, up, clusters(t, "1", "full"))
	r, err := envoy.Recv()
	if err != nil || len(r.Resources) != 1 {
		t.Fatalf("envoy got %v, %v", r, err)
	}
	select {
	case got := <-asked:
		t.Errorf("answered %+v before envoy had it", got)
	default:
	}
	b.says(envoy, &deltaRequest{TypeUrl: TypeCluster, ResponseNonce: r.Nonce})
	if got := <-asked; !got.allowed || got.err != nil {
		t.Errorf("%+v", got)
	}
	wantRequest(t, up, &deltaRequest{TypeUrl: TypeCluster, ResponseNonce: "1"})

	send(t, up, clusters(t, "2", "empty"))
	if v := <-told; v != Denied {
		t.Errorf("a denial is told as %d", v)
	}
	passed := make(chan *deltaResponse, 1)
	go func() { passed <- b.hears(envoy) }()
	select {
	case r := <-passed:
		t.Errorf("envoy got %v while the denial was being told", r)
	case <-time.After(50 * time.Millisecond): // less than the patience
	}
	close(release)
	r = <-passed
	if len(r.Resources) != 0 || !slices.Equal(r.RemovedResources, []string{onDemandName(dest)}) {
		t.Errorf("envoy got %v", r)
	}
	b.says(envoy, &deltaRequest{TypeUrl: TypeCluster, ResponseNonce: r.Nonce})
	wantRequest(t, up, &deltaRequest{TypeUrl: TypeCluster, ResponseNonce: "2"})

	other := netip.MustParseAddrPort("10.0.0.2:80")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if allowed, err := b.relay.Ask(ctx, other); allowed || err == nil {
		t.Errorf("without an answer: %t, %v", allowed, err)
	}
	for _, d := range []netip.AddrPort{{}, netip.MustParseAddrPort("10.0.0.1:0")} {
		if allowed, err := b.relay.Ask(t.Context(), d); allowed || err == nil {
			t.Errorf("%s: %t, %v", d, allowed, err)
		}
	}
	go func() {
		allowed, err := b.relay.Ask(t.Context(), netip.MustParseAddrPort("10.0.0.3:80"))
		asked <- result{allowed, err}
	}()
	if _, err := up.Recv(); err != nil {
		t.Fatal(err)
	}
	b.relay.Close()
	if got := <-asked; got.allowed || got.err == nil || !strings.Contains(got.err.Error(), "stopping") {
		t.Errorf("while closing: %+v", got)
	}
}

// Envoy is the authority: who is told and does not come back holds it up for tellPatience, once.
func TestTellerIsNotWaitedForForEver(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	stuck, got := make(chan struct{}), make(chan map[netip.AddrPort]Verdict, 8)
	tl := newTeller(slog.New(slog.DiscardHandler))
	tl.tell = func(news map[netip.AddrPort]Verdict) { got <- news; <-stuck }
	ended := make(chan struct{})
	go func() { tl.run(ctx); close(ended) }()
	tl.hand(ctx, map[netip.AddrPort]Verdict{dest: Denied})
	<-got
	for i := range 100 { // all these return at once, else the test takes 100 s
		tl.hand(ctx, map[netip.AddrPort]Verdict{dest: Allowed - Verdict(i%2)})
	}
	close(stuck)
	for last := Allowed; last == Allowed; { // the last word is a denial
		last = (<-got)[dest]
	}
	cancel()
	<-ended
}

// A scan ends at the number of names that are kept, and what is denied is not sent to Envoy.
func TestScan(t *testing.T) {
	w := newWorld(t)
	w.m.maxNames = 300
	w.startEnvoy()
	w.settle()
	sent := 0
	w.envoy.side.send = func([]byte) { sent++ }
	refused := 0
	for i := range w.m.maxNames + 100 {
		reply := make(chan answer, 1)
		d := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), 80)
		w.plane.resolves[onDemandName(d)] = fmt.Sprint("empty", i)
		w.m.ask(d, reply)
		select {
		case a := <-reply:
			if a.err == nil {
				t.Fatalf("answered %+v", a)
			}
			refused++
		default:
		}
	}
	w.settle()
	if n := len(w.m.kind(TypeCluster).entries); n > w.m.maxNames || refused < 100 {
		t.Errorf("%d names are kept, %d were refused", n, refused)
	}
	if sent > 0 {
		t.Errorf("envoy was sent %d responses", sent)
	}
}
