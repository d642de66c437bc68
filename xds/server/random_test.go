package server_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	"google.golang.org/protobuf/proto"

	"github.com/mantlet/mantlet/xds/server"
)

// replica is the dumbest possible client: it keeps what it is sent, answers like Envoy, and knows what must not happen.
type replica struct {
	*sidecar
	rnd *rand.Rand

	mu        *sync.Mutex
	held      map[string]string   // name → version, as Envoy would list them after a reconnect
	convicted map[string][]string // versions refused for themselves on this stream
	tried     map[string][]string // the same, on any stream
	stopped   chan struct{}
}

// follow applies and answers responses until the stream ends. A cluster whose content starts with "bad" is refused: by name,
// after the good ones were applied, or namelessly, before anything was.
func (r *replica) follow() {
	defer close(r.stopped)
	for {
		var resp *discoveryv3.DeltaDiscoveryResponse
		select {
		case resp = <-r.responses:
		case <-r.ended:
			return
		}
		r.mu.Lock()
		var bad []string
		for _, x := range resp.Resources {
			for _, v := range r.convicted[x.Name] {
				if v == x.Version {
					r.t.Errorf("%s came again with bytes that were refused", x.Name)
				}
			}
			var c clusterv3.Cluster
			if err := proto.Unmarshal(x.Resource.Value, &c); err != nil {
				r.t.Error(err)
			}
			if strings.HasPrefix(c.AltStatName, "bad") {
				bad = append(bad, x.Name)
			}
		}
		named := r.rnd.IntN(2) == 0
		answer := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: resp.TypeUrl, ResponseNonce: resp.Nonce}
		switch {
		case len(bad) == 0:
			for _, x := range resp.Resources {
				r.held[x.Name] = x.Version
			}
			for _, name := range resp.RemovedResources {
				delete(r.held, name)
			}
		case named:
			nack(answer, "Error adding/updating cluster(s) "+strings.Join(bad, ": why, ")+": why")
		default:
			nack(answer, "invalid duration")
		}
		for _, x := range resp.Resources {
			if len(bad) > 0 && (len(resp.Resources) == 1 || named && strings.Contains(" "+strings.Join(bad, " ")+" ", " "+x.Name+" ")) {
				r.convicted[x.Name] = append(r.convicted[x.Name], x.Version)
				r.tried[x.Name] = append(r.tried[x.Name], x.Version)
			}
		}
		r.mu.Unlock()
		if r.trySend(answer) != nil {
			return
		}
	}
}

// TestRandom changes everything at random, and looks whether each client ends with exactly what it should hold.
func TestRandom(t *testing.T) {
	seeds := 60
	if testing.Short() {
		seeds = 5
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { randomRun(t, uint64(seed)) })
	}
}

func randomRun(t *testing.T, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, 1))
	b := start(t, func(c *server.Config) { c.MaxResponseBytes = 200 })
	wanted := map[string]*server.Resource{} // static
	demand := map[string]*server.Resource{}
	subscribed := map[string]bool{}
	staticNames := []string{"a", "b", "c", "d", "e"}
	demandNames := []string{"od|1", "od|2", "od|3", "od|4"}
	content := func() string {
		if rnd.IntN(4) == 0 {
			return fmt.Sprint("bad", rnd.IntN(3))
		}
		return fmt.Sprint("good", rnd.IntN(3))
	}
	publish := func() {
		for range 1 + rnd.IntN(3) {
			name := staticNames[rnd.IntN(len(staticNames))]
			if wanted[name] = cds(t, name, content()); rnd.IntN(4) == 0 {
				delete(wanted, name)
			}
		}
		var list []*server.Resource
		for _, r := range wanted {
			list = append(list, r)
		}
		b.Publish("ns/a", set(t, list...))
	}
	publish()

	var mu sync.Mutex
	held, tried := map[string]string{}, map[string][]string{}
	connect := func() *replica {
		r := &replica{sidecar: b.connect(t, "ns/a"), rnd: rand.New(rand.NewPCG(seed, rnd.Uint64())), mu: &mu, held: held, convicted: map[string][]string{}, tried: tried, stopped: make(chan struct{})}
		mu.Lock()
		names := append(sortedKeys(subscribed), "*")
		r.resume("cds", maps.Clone(held), names...)
		mu.Unlock()
		go r.follow()
		return r
	}
	r := connect()
	connected := func() bool { cs, _ := b.Ledger().Status("ns/a"); return cs.Connected }
	for range 60 {
		switch rnd.IntN(10) {
		case 0, 1, 2, 3:
			publish()
		case 4, 5, 6:
			name := demandNames[rnd.IntN(len(demandNames))]
			if demand[name] = cds(t, name, content()); rnd.IntN(3) == 0 {
				demand[name] = nil
			}
			b.od.set(name, demand[name])
			for _, c := range b.Subscribers(name) {
				b.Refresh(c, name)
			}
		case 7, 8:
			name := demandNames[rnd.IntN(len(demandNames))]
			if subscribed[name] {
				delete(subscribed, name)
				r.ask("cds", "-"+name)
			} else {
				subscribed[name] = true
				r.ask("cds", name)
			}
		case 9:
			await(t, "the server sees the stream", connected)
			r.cancel() // a NACK may be lost with it
			<-r.stopped
			await(t, "the server sees the end", func() bool { return !connected() })
			mu.Lock()
			for name := range held { // the client drops what it does not ask for any more
				if strings.HasPrefix(name, "od|") && !subscribed[name] {
					delete(held, name)
				}
			}
			if rnd.IntN(2) == 0 {
				clear(held) // Envoy restarted
			}
			mu.Unlock()
			r = connect()
		}
	}

	should := func(name string) *server.Resource {
		switch {
		case wanted[name] != nil:
			return wanted[name]
		case subscribed[name]:
			return demand[name]
		}
		return nil
	}
	difference := func() string {
		mu.Lock()
		defer mu.Unlock()
		for _, name := range append(staticNames, demandNames...) {
			want := should(name)
			switch got := held[name]; {
			case want == nil && got != "":
				return fmt.Sprintf("%s should be gone", name)
			case want == nil || want.Version == got:
			case want.Version == cds(t, name, "bad0").Version || want.Version == cds(t, name, "bad1").Version || want.Version == cds(t, name, "bad2").Version:
				if !strings.Contains(fmt.Sprint(tried[name]), want.Version) {
					return fmt.Sprintf("%s was never tried", name)
				}
			default:
				return fmt.Sprintf("%s should be another version", name)
			}
		}
		return ""
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%s; subscribed %v, held %v, ledger %s", difference(), subscribed, held, b.status("ns/a"))
		}
	})
	await(t, fmt.Sprintf("seed %d: the client holds what it should", seed), func() bool { return difference() == "" })
	await(t, fmt.Sprintf("seed %d: the ledger agrees", seed), func() bool { return !strings.Contains(b.status("ns/a"), "pending") })
	if d := difference(); d != "" {
		t.Errorf("seed %d: afterwards %s", seed, d)
	}
	r.cancel()
	<-r.stopped
}
