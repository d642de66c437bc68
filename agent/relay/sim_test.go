package relay

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// what is a resource in these simulations: its version says whether it has endpoints ("full") and whether Envoy refuses it ("poison").
type what struct{ kind, name, version string }

func full(version string) bool   { return strings.Contains(version, "full") }
func poison(version string) bool { return strings.Contains(version, "poison") }

func (w what) resource(t testing.TB) *discoveryv3.Resource {
	t.Helper()
	r := &discoveryv3.Resource{Name: w.name, Version: w.version, Resource: &anypb.Any{TypeUrl: w.kind, Value: []byte("\x0a\x01x")}}
	if onDemand(w.kind, w.name) {
		r.Resource.Value = marshal(t, onDemandCluster(w.name, full(w.version)))
	}
	return r
}

// onDemandCluster is one with one endpoint, or with none.
func onDemandCluster(name string, reachable bool) *clusterv3.Cluster {
	c := &clusterv3.Cluster{Name: name, LoadAssignment: &endpointv3.ClusterLoadAssignment{ClusterName: name}}
	if reachable {
		c.LoadAssignment.Endpoints = []*endpointv3.LocalityLbEndpoints{{LbEndpoints: []*endpointv3.LbEndpoint{{
			Metadata: &corev3.Metadata{},
			HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: &corev3.Address{Address: &corev3.Address_SocketAddress{
				SocketAddress: &corev3.SocketAddress{Address: "10.0.0.1", PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: 80}}}}}},
		}}}}
	}
	return c
}

type (
	deltaRequest  = discoveryv3.DeltaDiscoveryRequest
	deltaResponse = discoveryv3.DeltaDiscoveryResponse
	versions      map[string]map[string]string // type → name → version
)

func (v versions) of(kind string) map[string]string {
	if v[kind] == nil {
		v[kind] = map[string]string{}
	}
	return v[kind]
}

// simPlane is a control plane as xds/server is one, for one client.
type simPlane struct {
	t         testing.TB
	published versions // what is there, for a wildcard
	resolves  map[string]string
	refused   map[what]bool
	acked     versions // what it believes to be held
	resources int      // sent

	// Of the stream:
	side  *planeSide
	kinds map[string]*simKind
	nonce int
	sent  map[string][]what // by nonce
	ways  struct {
		up   []*deltaRequest
		down []*deltaResponse
	}
}

type simKind struct {
	wildcard, answerDue   bool
	explicit, due, flying map[string]bool
	held                  map[string]string
}

func newSimPlane(t testing.TB) *simPlane {
	return &simPlane{t: t, published: versions{}, resolves: map[string]string{}, refused: map[what]bool{}, acked: versions{}}
}

// begin forgets the stream before.
func (p *simPlane) begin(side *planeSide) {
	p.side, p.kinds, p.sent, p.acked = side, map[string]*simKind{}, map[string][]what{}, versions{}
	p.ways.up, p.ways.down = nil, nil
}

func (p *simPlane) wanted(kind, name string) string {
	v := p.published[kind][name]
	if onDemand(kind, name) {
		v = p.resolves[name]
	}
	if p.refused[what{kind, name, v}] {
		return p.acked.of(kind)[name]
	}
	return v
}

// take takes one request from its way.
func (p *simPlane) take() {
	r := p.ways.up[0]
	p.ways.up = p.ways.up[1:]
	k := p.kinds[r.TypeUrl]
	first := k == nil
	if first {
		k = &simKind{explicit: map[string]bool{}, due: map[string]bool{}, flying: map[string]bool{}, held: map[string]string{}}
		p.kinds[r.TypeUrl] = k
		for name, v := range r.InitialResourceVersions {
			k.held[name], p.acked.of(r.TypeUrl)[name] = v, v
		}
	} else if len(r.InitialResourceVersions) > 0 {
		p.t.Fatalf("versions listed in a later request: %v", r)
	}
	if r.ResponseNonce != "" {
		list, ok := p.sent[r.ResponseNonce]
		if !ok {
			p.t.Fatalf("answer to a response that was not sent: %v", r)
		}
		delete(p.sent, r.ResponseNonce)
		for _, w := range list {
			delete(k.flying, w.name)
			if r.ErrorDetail == nil {
				p.acked.of(w.kind)[w.name] = w.version
			} else {
				if poison(w.version) {
					p.refused[w] = true
				}
				k.held[w.name] = p.acked.of(w.kind)[w.name]
				if k.explicit[w.name] && !poison(w.version) {
					k.due[w.name] = true
				}
			}
			if p.acked.of(w.kind)[w.name] == "" {
				delete(p.acked.of(w.kind), w.name)
			}
		}
	}
	for _, n := range r.ResourceNamesUnsubscribe {
		if n == "*" {
			k.wildcard = false
			continue
		}
		delete(k.explicit, n)
		k.due[n] = k.wildcard
	}
	for _, n := range r.ResourceNamesSubscribe {
		if n == "*" {
			k.wildcard, k.answerDue = true, true
			continue
		}
		_, held := r.InitialResourceVersions[n]
		k.explicit[n], k.due[n] = true, !first || !held
	}
}

// plan puts responses on their way: all that differs, each resource one version at a time.
func (p *simPlane) plan() {
	for _, kind := range []string{TypeCluster, TypeExtension, TypeListener} {
		k := p.kinds[kind]
		if k == nil {
			continue
		}
		names := map[string]bool{}
		for n := range p.published[kind] {
			names[n] = k.wildcard
		}
		for _, from := range []map[string]bool{k.explicit, k.due} {
			for n, ok := range from {
				names[n] = names[n] || ok
			}
		}
		for n, v := range k.held {
			names[n] = names[n] || v != ""
		}
		var add, remove []what
		for _, n := range slices.Sorted(maps.Keys(names)) {
			v := p.wanted(kind, n)
			if !k.explicit[n] && (!k.wildcard || onDemand(kind, n)) {
				v = ""
			}
			switch {
			case !names[n] || k.flying[n]:
			case v != "" && (k.held[n] != v || k.due[n]):
				add = append(add, what{kind, n, v})
			case v == "" && (k.held[n] != "" || k.due[n]):
				remove = append(remove, what{kind, n, ""})
			}
		}
		for _, list := range [][]what{add, remove} {
			if len(list) > 0 {
				p.send(k, kind, list)
			}
		}
		if k.answerDue {
			p.send(k, kind, nil)
		}
	}
}

func (p *simPlane) send(k *simKind, kind string, list []what) {
	p.nonce++
	r := &deltaResponse{TypeUrl: kind, Nonce: fmt.Sprint("plane-", p.nonce)}
	for _, w := range list {
		k.held[w.name], k.due[w.name], k.flying[w.name] = w.version, false, true
		if w.version == "" {
			r.RemovedResources = append(r.RemovedResources, w.name)
			delete(k.held, w.name)
		} else {
			r.Resources = append(r.Resources, w.resource(p.t))
			p.resources++
		}
	}
	k.answerDue = false
	p.sent[r.Nonce] = list
	p.ways.down = append(p.ways.down, r)
}

// simEnvoy is an Envoy on one stream.
type simEnvoy struct {
	t          testing.TB
	side       *envoySide
	held       versions
	subscribed map[string]bool // on-demand names
	partly     map[string]bool // applied of a refused response
	listening  bool            // LDS and ECDS were asked for
	ways       struct {
		up   []*deltaRequest
		down []*deltaResponse
	}
}

func (e *simEnvoy) ask(kind string, names ...string) {
	e.ways.up = append(e.ways.up, &deltaRequest{TypeUrl: kind, ResourceNamesSubscribe: names})
}

// take takes one response from its way and answers it. What it can it applies also of what it refuses.
func (e *simEnvoy) take() {
	r := e.ways.down[0]
	e.ways.down = e.ways.down[1:]
	answer := &deltaRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce}
	for _, res := range r.Resources {
		if poison(res.Version) {
			answer.ErrorDetail = &statuspb.Status{Code: 3, Message: answer.GetErrorDetail().GetMessage() + "poison: " + res.Name + "\n"}
			continue
		}
		e.held.of(r.TypeUrl)[res.Name] = res.Version
	}
	for _, n := range r.RemovedResources {
		delete(e.held.of(r.TypeUrl), n)
	}
	for _, res := range r.Resources {
		e.partly[res.Name] = answer.ErrorDetail != nil && (e.partly[res.Name] || !poison(res.Version))
	}
	e.ways.up = append(e.ways.up, answer)
	if r.TypeUrl == TypeCluster && !e.listening {
		e.listening = true
		e.ask(TypeListener, "*")
		e.ask(TypeExtension, "rbac")
	}
}
