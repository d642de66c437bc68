package server_test

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mantlet/mantlet/xds/server"
)

func TestOnlyTheAuthenticatedNameCounts(t *testing.T) {
	b := start(t, nil)
	b.Publish("ns/a", set(t, lds(t, "a", "1")))
	b.Publish("ns/b", set(t, lds(t, "b", "1")))
	s := b.connect(t, "ns/a")
	s.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: server.ListenerType, Node: &corev3.Node{Id: "ns/b", Cluster: "ns/b"}})
	s.gets("lds +a")

	nobody := b.connect(t, "")
	err := nobody.end()
	if status.Code(err) != codes.Unauthenticated || strings.Contains(err.Error(), "metadata") {
		t.Errorf("without a name: %v; want Unauthenticated, and not a word on why", err)
	}
	if !strings.Contains(b.log.String(), "no client in the metadata") {
		t.Error("the log does not say why the stream was refused")
	}
}

func TestNewWithoutAuthenticatorPanics(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("a server without Authenticator was made")
		}
	}()
	server.New(server.Config{})
}

func TestSecondStreamReplacesTheFirst(t *testing.T) {
	var mu sync.Mutex
	released := map[string]int{}
	b := start(t, func(c *server.Config) {
		c.OnUnsubscribe = func(c server.Client, names []string) {
			mu.Lock()
			defer mu.Unlock()
			for _, n := range names {
				released[string(c)+" "+n]++
			}
		}
	})
	b.od.set("od|a", cds(t, "od|a", "1"))
	b.Publish("ns/a", set(t, lds(t, "in", "1")))
	first := b.connect(t, "ns/a")
	first.ask("cds", "od|a")
	first.gets("cds +od|a")
	first.ask("lds")
	first.gets("lds +in")
	second := b.connect(t, "ns/a")
	second.ask("lds")
	second.gets("lds +in") // it is another Envoy for all that is known
	if err := first.end(); status.Code(err) != codes.Aborted {
		t.Errorf("the first stream ended with %v", err)
	}
	if got := b.Subscribers("od|a"); len(got) != 0 {
		t.Errorf("the first stream's subscriptions are still there: %v", got)
	}
	if !strings.Contains(b.log.String(), "replaces_older_stream=true") {
		t.Error("the replacement is not in the log")
	}
	second.ask("cds", "od|a")
	second.gets("cds +od|a")
	b.Publish("ns/a", set(t, lds(t, "in", "2")))
	second.gets("lds +in")
	second.silent()
	if cs, _ := b.Ledger().Status("ns/a"); !cs.Connected || !cs.InForce {
		t.Errorf("the end of the first stream took the second with it: %+v", cs)
	}
	second.cancel()
	await(t, "released", func() bool { mu.Lock(); defer mu.Unlock(); return released["ns/a od|a"] == 2 })
	if got := b.SubscribedNames(); len(got) != 0 {
		t.Errorf("subscriptions without a stream: %v", got)
	}
}

func TestSubscriptionHooks(t *testing.T) {
	var mu sync.Mutex
	var got []string
	b := start(t, func(c *server.Config) {
		c.OnSubscribe = func(c server.Client, names []string) {
			mu.Lock()
			got = append(got, fmt.Sprint("+", names))
			mu.Unlock()
		}
		c.OnUnsubscribe = func(c server.Client, names []string) {
			mu.Lock()
			got = append(got, fmt.Sprint("-", names))
			mu.Unlock()
		}
	})
	b.Publish("ns/a", set(t, cds(t, "app", "1"), ecds(t, "rbac", "1")))
	s := b.connect(t, "ns/a")
	s.ask("cds", "*", "app", "od|a", "od|b")
	s.gets("cds +app")
	s.gets("cds -od|a -od|b")
	s.ask("cds", "od|b", "-od|a", "-app")
	s.gets("cds +app")
	s.gets("cds -od|a -od|b")
	s.ask("ecds", "rbac")
	s.gets("ecds +rbac")
	s.silent()
	mu.Lock()
	defer mu.Unlock()
	if want := "[+[od|a od|b] -[od|a]]"; fmt.Sprint(got) != want {
		t.Errorf("got %v, want %s", got, want)
	}
}

func TestForget(t *testing.T) {
	b := start(t, nil)
	b.Publish("ns/a", set(t, lds(t, "in", "1")))
	s := b.connect(t, "ns/a")
	s.ask("lds")
	s.gets("lds +in")
	b.Forget("ns/a")
	if err := s.end(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("ended with %v", err)
	}
	if got := b.status("ns/a"); got != "unknown" {
		t.Errorf("still known: %s", got)
	}
	b.Forget("ns/a") // nothing to do
	// The pod's name may come back, as a StatefulSet's does.
	b.Publish("ns/a", set(t, lds(t, "in", "2")))
	s = b.connect(t, "ns/a")
	s.ask("lds")
	s.gets("lds +in")
}

func TestClientThatNobodyPublishedForLeavesNothingBehind(t *testing.T) {
	b := start(t, nil)
	s := b.connect(t, "ns/a")
	s.ask("cds", "od|a")
	await(t, "subscribed", func() bool { return len(b.Subscribers("od|a")) == 1 })
	s.cancel()
	await(t, "dropped", func() bool { return len(b.Ledger().Snapshot()) == 0 })
}

func TestDrain(t *testing.T) {
	b := start(t, nil)
	var all []*sidecar
	for i := range 5 {
		name := fmt.Sprintf("ns/%d", i)
		b.Publish(server.Client(name), server.Set{})
		s := b.connect(t, name)
		s.silent()
		all = append(all, s)
	}
	if err := b.Drain(within(t, 15*time.Second), 10*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	for _, s := range all {
		if err := s.end(); status.Code(err) != codes.Unavailable {
			t.Errorf("ended with %v", err)
		}
	}
	if err := b.connect(t, "ns/0").end(); status.Code(err) != codes.Unavailable {
		t.Errorf("a new stream while draining: %v", err)
	}
	if !b.Publish("ns/0", set(t, lds(t, "in", "1"))) {
		t.Error("publishing while draining")
	}
}

// A client that reads nothing holds up neither Publish nor others, and gets only the last of what it missed.
func TestSlowClient(t *testing.T) {
	b := start(t, func(c *server.Config) { c.AckPatience = time.Millisecond })
	big := func(i int) server.Set {
		return set(t, lds(t, "in", fmt.Sprint(i)+strings.Repeat("x", 1<<20)))
	}
	b.Publish("ns/slow", big(0))
	b.Publish("ns/fast", big(0))
	slow, fast := b.connect(t, "ns/slow"), b.connect(t, "ns/fast")
	slow.ask("lds")
	fast.ask("lds")
	fast.gets("lds +in")
	const rounds = 40
	for i := 1; i <= rounds; i++ {
		s := big(i)
		b.Publish("ns/slow", s)
		b.Publish("ns/fast", s)
		fast.gets("lds +in")
	}
	last := lds(t, "in", fmt.Sprint(rounds)+strings.Repeat("x", 1<<20)).Version
	received := 0
	for {
		r := slow.next()
		slow.ack(r)
		received++
		if r.Resources[0].Version == last {
			break
		}
	}
	if received > rounds/2 {
		t.Errorf("%d responses were kept for a client that does not read", received)
	}
}

func TestOneChangeTouchesOnlyWhoIsAffected(t *testing.T) {
	b := start(t, nil)
	common := set(t, lds(t, "in", "1"))
	var all []*sidecar
	for i := range 50 {
		name := fmt.Sprintf("ns/%02d", i)
		b.Publish(server.Client(name), common)
		s := b.connect(t, name)
		s.ask("lds")
		s.gets("lds +in")
		s.silent()
		all = append(all, s)
	}
	before := b.Ledger().Totals()[server.ListenerType].Responses
	other := set(t, lds(t, "in", "2"))
	for i := range all {
		next := common
		if i%10 == 0 {
			next = other
		}
		b.Publish(server.Client(fmt.Sprintf("ns/%02d", i)), next)
	}
	for i, s := range all {
		if i%10 == 0 {
			s.gets("lds +in")
		}
		s.silent()
	}
	if got := b.Ledger().Totals()[server.ListenerType].Responses - before; got != 5 {
		t.Errorf("%d responses for a change that affects 5 of 50", got)
	}
}

func TestSetIsChecked(t *testing.T) {
	if _, err := server.NewSet(lds(t, "in", "1"), lds(t, "in", "2")); err == nil {
		t.Error("two listeners of one name in a set")
	}
	if _, err := server.NewSet(&server.Resource{Name: "x"}); err == nil {
		t.Error("a resource without bytes in a set")
	}
	if _, err := server.NewSet(nil); err == nil {
		t.Error("a nil resource in a set")
	}
	for _, name := range []string{"", "*"} {
		if _, err := server.NewResource(name, &corev3.Node{}); err == nil {
			t.Errorf("a resource named %q", name)
		}
	}
}

func TestWrongOnDemandAnswerIsUnknown(t *testing.T) {
	b := start(t, nil)
	b.od.set("od|a", cds(t, "od|b", "1"))
	b.od.set("od|c", lds(t, "od|c", "1"))
	b.Publish("ns/a", server.Set{})
	s := b.connect(t, "ns/a")
	s.ask("cds", "od|a", "od|c")
	s.gets("cds -od|a -od|c")
	if !strings.Contains(b.log.String(), "not the cluster that was asked for") {
		t.Error("not in the log")
	}
}
