package controlplane

import (
	"net/netip"
	"strconv"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds"
	"github.com/mantlet/mantlet/xds/names"
	"github.com/mantlet/mantlet/xds/server"
)

// Resolve answers for one destination, for one sidecar: an on-demand cluster with those endpoints that the policies of both ends
// admit. A destination that is known and denied is a cluster without endpoints, and so is one that was known and is gone: after a
// removal Envoy would keep its subscription and let later connections wait. One that nobody ever had is false: a cluster costs Envoy
// 38 to 68 KB, which an app that scans the network must not be able to spend.
func (cp *ControlPlane) Resolve(client server.Client, name string) (*server.Resource, bool) {
	to, err := xds.ParseOnDemand(name)
	if err != nil {
		cp.log.Warn("a sidecar asks for a cluster that cannot be", "client", client, "error", err)
		return nil, false
	}
	cp.mu.Lock()
	defer cp.mu.Unlock()
	if !cp.loaded {
		return nil, false
	}
	reach := cp.index.Reach(string(client), verdict.TCP, to)
	asked := cp.demand.asked[name]
	if asked == nil || asked.noted != cp.moves { // else what it rests on has been noted already
		asked = cp.demand.note(name, cp.restsOn(to))
		asked.noted = cp.moves
	}
	asked.begin(cp.changes)
	asked.known = asked.known || reach.Known // what policy denies has a cluster, too, without endpoints: so the sidecar's log tells it from what nobody has
	if !asked.known {
		return nil, false
	}
	r, err := asked.cluster(name, client, reach, cp.sessions)
	if err != nil {
		cp.log.Error("an on-demand cluster cannot be made", "client", client, "cluster", name, "error", err)
		return nil, false
	}
	return r, true
}

// restsOn returns what the answer about a destination rests on, for whoever asks.
func (cp *ControlPlane) restsOn(to netip.AddrPort) []string {
	keys := append(cp.hostPortKeys(to), addrKey(to.Addr()), nodePortKey(to.Port()))
	whole := cp.index.DestinationForAny(verdict.TCP, to)
	if whole.Service != "" {
		keys = append(keys, serviceKey(whole.Service))
	}
	for _, list := range [][]policy.Endpoint{whole.Endpoints, whole.Others} {
		for _, e := range list {
			keys = append(keys, addrKey(e.Addr.Addr())) // somebody else may come to have it
			if e.Pod != "" {
				keys = append(keys, podKey(e.Pod))
			} else { // it may be a node's
				keys = append(keys, nodePortKey(e.Addr.Port()))
				keys = append(keys, cp.hostPortKeys(e.Addr)...)
			}
		}
	}
	return keys
}

// hostPortKeys are those of an address that is of nodes; nearly none is.
func (cp *ControlPlane) hostPortKeys(to netip.AddrPort) (keys []string) {
	for _, node := range cp.index.NodesAt(to.Addr()) {
		keys = append(keys, hostPortKey(node, to.Port()))
	}
	return keys
}

// capturePort reports whether an address is a sidecar's own listener: connecting there from inside would loop.
func capturePort(a netip.AddrPort) bool {
	return a.Port() == names.InboundPort || a.Port() == names.OutboundPort
}

func (cp *ControlPlane) forgetNames(list []string) {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	for _, name := range list {
		if len(cp.xds.Subscribers(name)) == 0 {
			cp.demand.forget(name)
		}
	}
}

// demand remembers on what the answer for each on-demand name rests: the address, the service, the pods behind it.
type demand struct {
	asked map[string]*asked
	names map[string]map[string]bool // key → names
}

// asked is what is known of an on-demand name.
type asked struct {
	rests []string // keys
	noted uint64   // ControlPlane.moves when rests was noted
	known bool     // it has stood for something while it was subscribed to

	asOf    uint64                             // ControlPlane.changes of the following
	reached map[*policy.Reach]*server.Resource // the cluster for all who get the very same answer
	made    clusters
	before  clusters // those of the change before: nearly always the same
}

// clusters are clusters of one name, by their endpoints: marshalled once for all who may reach the same.
type clusters map[string]*server.Resource

// maxMade bounds the clusters that are kept of one name since the last change: there is one for each set of endpoints that some client may reach.
const maxMade = 64

func newDemand() demand {
	return demand{asked: map[string]*asked{}, names: map[string]map[string]bool{}}
}

// begin forgets the answers of an earlier change than this.
func (a *asked) begin(change uint64) {
	if a.asOf == change {
		return
	}
	a.asOf, a.reached = change, nil
	a.before, a.made = a.made, nil
}

// cluster returns the on-demand cluster for a client.
func (a *asked) cluster(name string, client server.Client, reach *policy.Reach, sessions xds.Resumption) (*server.Resource, error) {
	if r := a.reached[reach]; r != nil {
		return r, nil
	}
	endpoints := endpointsFor(client, reach)
	key := clusterKey(endpoints)
	r := a.made[key]
	if r == nil {
		if r = a.before[key]; r == nil {
			var err error
			if r, err = resource(xds.OnDemand(name, endpoints, sessions)); err != nil {
				return nil, err
			}
		}
		if a.made == nil || len(a.made) >= maxMade {
			a.made = clusters{}
		}
		a.made[key] = r
	}
	if !reach.Own {
		if a.reached == nil || len(a.reached) >= maxMade {
			a.reached = map[*policy.Reach]*server.Resource{}
		}
		a.reached[reach] = r
	}
	return r, nil
}

// endpointsFor are those of a cluster.
func endpointsFor(client server.Client, reach *policy.Reach) []xds.Endpoint {
	out := make([]xds.Endpoint, 0, len(reach.Endpoints))
	for _, e := range reach.Endpoints {
		if capturePort(e.Addr) {
			continue
		}
		id := e.ID
		if !e.Sidecar || e.Pod == string(client) { // to itself a pod talks past its own capture
			id = spiffeid.ID{}
		}
		out = append(out, xds.Endpoint{Addr: e.Addr, ID: id, Peer: e.ID, Always: e.Always})
	}
	return out
}

// clusterKey is equal for equal endpoints.
func clusterKey(endpoints []xds.Endpoint) string {
	key := make([]byte, 0, 256)
	for _, e := range endpoints {
		key = append(e.Addr.AppendTo(key), ' ')
		key = append(append(key, e.ID.String()...), ' ')
		key = append(append(key, e.Peer.String()...), ' ')
		key = append(strconv.AppendBool(key, e.Always), '\n')
	}
	return string(key)
}

func podKey(name string) string      { return "pod " + name }
func serviceKey(name string) string  { return "service " + name }
func addrKey(a netip.Addr) string    { return "address " + a.String() }
func nodePortKey(port uint16) string { return "node port " + strconv.Itoa(int(port)) }
func hostPortKey(node string, port uint16) string {
	return "host port " + node + ":" + strconv.Itoa(int(port))
}

// note enters on what the answer for a name rests.
func (d *demand) note(name string, keys []string) *asked {
	a := d.asked[name]
	if a == nil {
		a = &asked{}
		d.asked[name] = a
	}
	d.unlink(name)
	a.rests = keys
	for _, k := range keys {
		if d.names[k] == nil {
			d.names[k] = map[string]bool{}
		}
		d.names[k][name] = true
	}
	return a
}

// forget is for a name that nobody asks for any more.
func (d *demand) forget(name string) {
	d.unlink(name)
	delete(d.asked, name)
}

func (d *demand) unlink(name string) {
	a := d.asked[name]
	if a == nil {
		return
	}
	for _, k := range a.rests {
		delete(d.names[k], name)
		if len(d.names[k]) == 0 {
			delete(d.names, k)
		}
	}
}

func (d *demand) collect(into map[string]bool, key string) {
	for name := range d.names[key] {
		into[name] = true
	}
}
