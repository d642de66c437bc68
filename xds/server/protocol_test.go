package server_test

import (
	"fmt"
	"strings"
	"testing"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"

	"github.com/mantlet/mantlet/xds/server"
)

// cds, lds, ecds, own make resources whose bytes depend on name and content.
func cds(t testing.TB, name, content string) *server.Resource {
	return resource(t, name, &clusterv3.Cluster{Name: name, AltStatName: content})
}

func lds(t testing.TB, name, content string) *server.Resource {
	return resource(t, name, &listenerv3.Listener{Name: name, StatPrefix: content})
}

func ecds(t testing.TB, name, content string) *server.Resource {
	return resource(t, name, &corev3.TypedExtensionConfig{Name: name + content})
}

func own(t testing.TB, name, content string) *server.Resource {
	return resource(t, name, wrapperspb.String(content))
}

func TestWildcard(t *testing.T) {
	b := start(t, nil)
	b.Publish("ns/a", set(t, lds(t, "in", "1"), lds(t, "out", "1"), own(t, "verdicts", "1")))
	s := b.connect(t, "ns/a")
	s.ask("lds")
	s.gets("lds +in +out")
	s.ask("cds")
	s.gets("cds") // answered though empty
	s.ask("own")  // no wildcard without saying so for other types
	s.silent()
	s.ask("own", "*")
	s.gets("own +verdicts")
	s.ask("own", "*") // asked again: answered, with nothing new
	s.gets("own")
	s.ask("lds", "-*")
	s.silent()
	b.Publish("ns/a", set(t, lds(t, "in", "2"), lds(t, "out", "1"), own(t, "verdicts", "1")))
	s.silent()
	s.ask("lds") // not the first request any more: no wildcard
	s.silent()
	s.ask("lds", "*")
	s.gets("lds +in +out") // who unsubscribed has dropped them
}

func TestWildcardByNameOnFirstRequest(t *testing.T) {
	b := start(t, nil)
	b.Publish("ns/a", set(t, lds(t, "in", "1"), lds(t, "out", "1")))
	s := b.connect(t, "ns/a")
	s.ask("lds", "in") // a name: no wildcard
	s.gets("lds +in")
	s.silent()
}

func TestOnlyDifferencesAreSent(t *testing.T) {
	b := start(t, nil)
	first := set(t, lds(t, "in", "1"), lds(t, "out", "1"), cds(t, "app", "1"))
	b.Publish("ns/a", first)
	s := b.connect(t, "ns/a")
	s.ask("cds")
	s.gets("cds +app")
	s.ask("lds")
	s.gets("lds +in +out")
	if b.Publish("ns/a", first) {
		t.Error("the same set again is said to differ")
	}
	if b.Publish("ns/a", set(t, lds(t, "in", "1"), lds(t, "out", "1"), cds(t, "app", "1"))) {
		t.Error("a set of the same bytes is said to differ")
	}
	s.silent()
	if !b.Publish("ns/a", set(t, lds(t, "in", "2"), lds(t, "gate", "1"), cds(t, "app", "1"))) {
		t.Error("another set is said not to differ")
	}
	s.gets("lds +gate +in")
	s.gets("lds -out")
	s.silent()
	b.Publish("ns/a", server.Set{})
	s.gets("lds -gate -in")
	s.gets("cds -app")
	s.silent()
}

func TestNothingIsAnsweredBeforeTheFirstPublish(t *testing.T) {
	b := start(t, nil)
	b.od.set("od|x", cds(t, "od|x", "1"))
	s := b.connect(t, "ns/a")
	s.resume("lds", map[string]string{"in": "v"}) // else it would be removed
	s.ask("cds", "*", "od|x", "od|y")
	s.ask("fence", "*")
	await(t, "subscription", func() bool { return len(b.Subscribers("od|x")) == 1 })
	b.Publish("ns/b", server.Set{}) // somebody else
	if b.od.count() != 0 {
		t.Error("an on-demand name was resolved before anything was published")
	}
	b.Publish("ns/a", set(t, lds(t, "in", "2")))
	s.gets("cds +od|x")
	s.gets("lds +in")
	s.gets("cds -od|y")
	s.gets("fence")
	s.silent()
}

func TestExplicitNames(t *testing.T) {
	b := start(t, nil)
	b.Publish("ns/a", set(t, ecds(t, "rbac", "1"), ecds(t, "other", "1")))
	s := b.connect(t, "ns/a")
	s.ask("ecds", "rbac", "late")
	s.gets("ecds +rbac")
	s.gets("ecds -late") // does not exist: said at once
	b.Publish("ns/a", set(t, ecds(t, "rbac", "1"), ecds(t, "other", "2"), ecds(t, "late", "1")))
	s.gets("ecds +late") // and remembered
	s.silent()
	s.ask("ecds", "rbac") // asked again: sent again, the client may have dropped it
	s.gets("ecds +rbac")
	s.ask("ecds", "-rbac")
	s.silent()
	b.Publish("ns/a", set(t, ecds(t, "rbac", "2"), ecds(t, "late", "1")))
	s.silent()
}

func TestOnDemandBesideWildcard(t *testing.T) {
	b := start(t, nil)
	b.od.set("od|a", cds(t, "od|a", "1"))
	b.od.set("od|b", cds(t, "od|b", "1"))
	static := set(t, cds(t, "app", "1"))
	b.Publish("ns/a", static)
	b.Publish("ns/b", static)
	s, other := b.connect(t, "ns/a"), b.connect(t, "ns/b")
	s.ask("cds")
	s.gets("cds +app") // never what exists on demand
	other.ask("cds")
	other.gets("cds +app")
	s.ask("cds", "od|a", "od|none")
	s.gets("cds +od|a")
	s.gets("cds -od|none")
	if got := b.Subscriptions("ns/a"); fmt.Sprint(got) != "[od|a od|none]" {
		t.Errorf("subscriptions: %v", got)
	}
	if got := b.Subscribers("od|none"); fmt.Sprint(got) != "[ns/a]" {
		t.Errorf("subscribers: %v", got)
	}

	b.Refresh("ns/a", "od|a", "od|b", "od|none") // nothing changed, or not subscribed
	s.silent()
	b.od.set("od|none", cds(t, "od|none", "1"))
	b.od.set("od|a", cds(t, "od|a", "2"))
	b.Refresh("ns/a", "od|none")
	s.gets("cds +od|none")
	s.silent()
	b.Refresh("ns/a", "od|a")
	s.gets("cds +od|a")
	b.od.set("od|a", nil)
	b.Refresh("ns/a", "od|a")
	s.gets("cds -od|a")
	s.ask("cds", "od|a") // asks again: answered again
	s.gets("cds -od|a")
	other.silent()

	s.ask("cds", "-od|none") // below a wildcard the client cannot know: told
	s.gets("cds -od|none")
	b.Refresh("ns/a", "od|none")
	s.silent()
	if got := b.SubscribedNames(); fmt.Sprint(got) != "[od|a]" {
		t.Errorf("subscribed names: %v", got)
	}
}

func TestExplicitNameOfAStaticCluster(t *testing.T) {
	b := start(t, nil)
	b.od.set("app", cds(t, "app", "on demand"))
	b.Publish("ns/a", set(t, cds(t, "app", "static")))
	s := b.connect(t, "ns/a")
	s.ask("cds", "*", "app")
	s.gets("cds +app")
	s.ask("cds", "-app") // still part of the wildcard: said so
	if r := s.gets("cds +app"); r.Resources[0].Version != cds(t, "app", "static").Version {
		t.Error("the on-demand cluster goes before the published one")
	}
	s.ask("cds", "app")
	s.gets("cds +app")
	b.Publish("ns/a", server.Set{}) // now it exists on demand only
	if r := s.gets("cds +app"); r.Resources[0].Version != cds(t, "app", "on demand").Version {
		t.Error("the name was not resolved on demand after its publication ended")
	}
}

func TestUnsubscribeWithoutWildcardIsNotAnswered(t *testing.T) {
	b := start(t, nil)
	b.od.set("od|a", cds(t, "od|a", "1"))
	b.Publish("ns/a", server.Set{})
	s := b.connect(t, "ns/a")
	s.ask("cds", "od|a")
	s.gets("cds +od|a")
	s.ask("cds", "-od|a")
	s.silent()
	b.Refresh("ns/a", "od|a")
	s.silent()
	s.ask("cds", "od|a")
	s.gets("cds +od|a")
	s.ask("cds", "-od|a", "od|a") // both at once: subscribed
	s.gets("cds +od|a")
	if got := b.Subscribers("od|a"); len(got) != 1 {
		t.Errorf("subscribers: %v", got)
	}
}

func TestReconnectResendsNothingUnchanged(t *testing.T) {
	b := start(t, nil)
	b.od.set("od|a", cds(t, "od|a", "1"))
	b.od.set("od|b", cds(t, "od|b", "1"))
	b.Publish("ns/a", set(t, cds(t, "app", "1"), cds(t, "old", "1"), lds(t, "in", "1"), lds(t, "out", "1"), ecds(t, "rbac", "1")))
	s := b.connect(t, "ns/a")
	s.ask("cds", "*", "od|a", "od|b")
	cdsHeld := holds(s.gets("cds +app +od|a +od|b +old"))
	s.ask("lds")
	ldsHeld := holds(s.gets("lds +in +out"))
	s.ask("ecds", "rbac")
	ecdsHeld := holds(s.gets("ecds +rbac"))
	s.cancel()
	await(t, "detached", func() bool { return len(b.SubscribedNames()) == 0 })

	b.Publish("ns/a", set(t, cds(t, "app", "1"), lds(t, "in", "2"), lds(t, "out", "1"), ecds(t, "rbac", "1")))
	b.od.set("od|b", nil)
	s = b.connect(t, "ns/a")
	s.resume("lds", ldsHeld)
	s.gets("lds +in")
	s.resume("cds", cdsHeld, "*", "od|a", "od|b")
	s.gets("cds -od|b -old")
	s.resume("ecds", ecdsHeld, "rbac")
	s.silent()
	if err := b.Ledger().Wait(within(t, 10e9), "ns/a"); err != nil {
		t.Errorf("what the client said it holds does not count as confirmed: %v", err)
	}
	s.resume("ecds", map[string]string{"rbac": "nonsense"}, "rbac") // only in the first request of a type
	s.gets("ecds +rbac")
	b.Publish("ns/a", server.Set{})
	s.gets("lds -in -out")
	s.gets("ecds -rbac")
	s.gets("cds -app")
}

func TestHeldButNotSubscribedIsLeftAlone(t *testing.T) {
	b := start(t, nil)
	b.Publish("ns/a", set(t, ecds(t, "rbac", "1")))
	s := b.connect(t, "ns/a")
	s.resume("ecds", map[string]string{"stranger": "v", "rbac": ecds(t, "rbac", "1").Version}, "rbac")
	s.silent()
}

func TestNonces(t *testing.T) {
	b := start(t, nil)
	b.Publish("ns/a", set(t, lds(t, "in", "1"), ecds(t, "rbac", "1")))
	s := b.connect(t, "ns/a")
	s.ask("lds")
	r := s.wants("lds +in")
	// An unknown nonce confirms nothing, but the subscription beside it counts.
	s.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeURLs["ecds"], ResponseNonce: "unknown", ResourceNamesSubscribe: []string{"rbac"}})
	s.gets("ecds +rbac")
	s.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeURLs["ecds"], ResponseNonce: r.Nonce}) // of another type
	s.silent()
	if got, want := b.status("ns/a"), "ecds rbac in force; lds in pending"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	s.ack(r)
	s.ack(r) // twice does no harm
	s.silent()
	if got, want := b.status("ns/a"), "ecds rbac in force; lds in in force"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	second := b.connect(t, "ns/b")
	b.Publish("ns/b", set(t, lds(t, "in", "1")))
	second.ask("lds")
	if other := second.wants("lds +in"); other.Nonce == r.Nonce {
		t.Error("two streams use the same nonces: an ACK that a relay delivers late could confirm the wrong thing")
	}
}

func TestOrderWithinOnePush(t *testing.T) {
	b := start(t, nil)
	b.Publish("ns/a", set(t, lds(t, "old-listener", "1"), cds(t, "old-cluster", "1"), ecds(t, "old-filter", "1")))
	s := b.connect(t, "ns/a")
	s.ask("cds")
	s.gets("cds +old-cluster")
	s.ask("ecds", "old-filter")
	s.gets("ecds +old-filter")
	s.ask("own", "verdicts")
	s.gets("own -verdicts")
	s.ask("ecds", "rbac")
	s.gets("ecds -rbac")
	s.ask("lds")
	s.gets("lds +old-listener")
	s.silent()
	b.Publish("ns/a", set(t, lds(t, "in", "1"), cds(t, "app", "1"), ecds(t, "rbac", "1"), own(t, "verdicts", "1")))
	s.gets("own +verdicts")
	s.gets("cds +app")
	s.gets("ecds +rbac")
	add := s.wants("lds +in")
	remove := s.wants("lds -old-listener")
	s.gets("ecds -old-filter")
	s.silent() // the old cluster stays while a listener is on its way
	s.ack(add)
	s.silent()
	s.ack(remove)
	s.gets("cds -old-cluster")
}

func TestLargeResponsesAreSplit(t *testing.T) {
	b := start(t, func(c *server.Config) { c.MaxResponseBytes = 1000 })
	big := strings.Repeat("x", 600)
	b.Publish("ns/a", set(t, cds(t, "a", big), cds(t, "b", "1"), cds(t, "c", big), cds(t, "d", strings.Repeat("y", 5000))))
	s := b.connect(t, "ns/a")
	s.ask("cds")
	s.gets("cds +a +b")
	s.gets("cds +c")
	s.gets("cds +d") // one resource is never split
	s.silent()
}

func TestLimits(t *testing.T) {
	b := start(t, func(c *server.Config) { c.MaxSubscriptions, c.MaxNameLength = 3, 10 })
	b.od.set("od|4", cds(t, "od|4", "1"))
	b.od.set("od|12345678", cds(t, "od|12345678", "1"))
	b.Publish("ns/a", server.Set{})
	s := b.connect(t, "ns/a")
	s.ask("cds", "od|12345678") // too long
	s.gets("cds -od|12345678")
	if got := b.SubscribedNames(); len(got) != 0 {
		t.Errorf("subscribed: %v", got)
	}
	s.ask("cds", "od|1", "od|2", "od|3", "od|4", "od|12345678", "od|1")
	s.gets("cds -od|1 -od|2 -od|3 -od|12345678 -od|4") // the last two refused
	if got := b.SubscribedNames(); len(got) != 3 {
		t.Errorf("subscribed: %v", got)
	}
	if !strings.Contains(b.log.String(), "subscriptions refused") {
		t.Error("a refused subscription is not in the log")
	}
	b.Refresh("ns/a", "od|4")
	s.silent()
	s.ask("cds", "-od|1", "od|4") // room again
	s.gets("cds +od|4")
	s.silent()
	s.cancel()
	away(t, b, "ns/a")
	s = b.connect(t, "ns/a")
	s.ask("cds", "od|1", "od|2", "od|3") // a new stream counts anew
	s.gets("cds -od|1 -od|2 -od|3")
	if got := b.SubscribedNames(); len(got) != 3 {
		t.Errorf("subscribed: %v", got)
	}
}

func TestBadRequestsEndTheStream(t *testing.T) {
	flood := func(s *sidecar) {
		for i := range 40 {
			s.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: fmt.Sprintf("type.googleapis.com/t%d", i)})
		}
	}
	for name, c := range map[string]struct {
		send func(*sidecar)
		code codes.Code
	}{
		"no type": {func(s *sidecar) { s.send(&discoveryv3.DeltaDiscoveryRequest{}) }, codes.InvalidArgument},
		"locators": {func(s *sidecar) {
			s.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: server.ClusterType, ResourceLocatorsSubscribe: []*discoveryv3.ResourceLocator{{Name: "x"}}})
		}, codes.InvalidArgument},
		"too many types": {flood, codes.ResourceExhausted},
		"too large":      {func(s *sidecar) { s.ask("cds", strings.Repeat("x", server.MaxRequestBytes)) }, codes.ResourceExhausted},
	} {
		t.Run(name, func(t *testing.T) {
			b := start(t, nil)
			s := b.connect(t, "ns/a")
			c.send(s)
			if err := s.end(); status.Code(err) != c.code {
				t.Errorf("ended with %v, want %v", err, c.code)
			}
		})
	}
}
