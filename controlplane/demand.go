package controlplane

import (
	"fmt"
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
	d, ok := cp.index.DestinationFor(string(client), verdict.TCP, to)
	admitted := cp.index.Admitted(string(client), d)
	endpoints := make([]xds.Endpoint, 0, len(admitted))
	for _, e := range admitted {
		if capturePort(e.Addr) {
			continue
		}
		id := e.ID
		if !e.Sidecar || e.Pod == string(client) { // to itself a pod talks past its own capture
			id = spiffeid.ID{}
		}
		endpoints = append(endpoints, xds.Endpoint{Addr: e.Addr, ID: id, Peer: e.ID, Always: e.Always})
	}
	if cp.demand.changes[name] != cp.changes { // else what it rests on has been noted for somebody else already
		cp.demand.note(name, cp.restsOn(to))
		cp.demand.changes[name] = cp.changes
	}
	if ok && (len(endpoints) > 0 || !d.Outside) { // what policy denies outside has no cluster, as if nobody had it
		cp.demand.known[name] = true
	}
	if !cp.demand.known[name] {
		return nil, false
	}
	r, err := cp.demand.cluster(name, endpoints, cp.sessions)
	if err != nil {
		cp.log.Error("an on-demand cluster cannot be made", "client", client, "cluster", name, "error", err)
		return nil, false
	}
	return r, true
}

// restsOn returns what the answer about a destination rests on, for whoever asks.
func (cp *ControlPlane) restsOn(to netip.AddrPort) []string {
	keys := []string{addrKey(to.Addr()), nodePortKey(to.Port())}
	whole := cp.index.DestinationForAny(verdict.TCP, to)
	if whole.Service != "" {
		keys = append(keys, serviceKey(whole.Service))
	}
	for _, list := range [][]policy.Endpoint{whole.Endpoints, whole.Others} {
		for _, e := range list {
			keys = append(keys, addrKey(e.Addr.Addr()), nodePortKey(e.Addr.Port())) // somebody else may come to have it
			if e.Pod != "" {
				keys = append(keys, podKey(e.Pod))
			}
		}
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
	depends map[string][]string                    // name → keys
	names   map[string]map[string]bool             // key → names
	known   map[string]bool                        // names that have stood for something while they were subscribed to
	changes map[string]uint64                      // name → ControlPlane.changes when depends was noted
	made    map[string]map[string]*server.Resource // name → endpoints → the cluster with these, for all who may reach the same
	key     []byte                                 // of made, where it is written
}

// maxMade bounds the clusters that are kept of one name since the last change: there is one for each set of endpoints that some client may reach.
const maxMade = 64

func newDemand() demand {
	return demand{
		depends: map[string][]string{}, names: map[string]map[string]bool{}, known: map[string]bool{}, changes: map[string]uint64{},
		made: map[string]map[string]*server.Resource{},
	}
}

// cluster returns the on-demand cluster with these endpoints, marshalled once for everybody.
func (d *demand) cluster(name string, endpoints []xds.Endpoint, sessions xds.Resumption) (*server.Resource, error) {
	d.key = d.key[:0]
	for _, e := range endpoints {
		d.key = append(e.Addr.AppendTo(d.key), ' ')
		d.key = append(append(d.key, e.ID.String()...), ' ')
		d.key = append(append(d.key, e.Peer.String()...), ' ')
		d.key = append(strconv.AppendBool(d.key, e.Always), '\n')
	}
	if r := d.made[name][string(d.key)]; r != nil {
		return r, nil
	}
	r, err := resource(xds.OnDemand(name, endpoints, sessions))
	if err != nil {
		return nil, err
	}
	if d.made[name] == nil || len(d.made[name]) >= maxMade {
		d.made[name] = map[string]*server.Resource{}
	}
	d.made[name][string(d.key)] = r
	return r, nil
}

func podKey(name string) string      { return "pod " + name }
func serviceKey(name string) string  { return "service " + name }
func addrKey(a netip.Addr) string    { return "address " + a.String() }
func nodePortKey(port uint16) string { return fmt.Sprint("node port ", port) }

func (d *demand) note(name string, keys []string) {
	d.unlink(name)
	delete(d.made, name) // what it was before nobody is sent again
	d.depends[name] = keys
	for _, k := range keys {
		if d.names[k] == nil {
			d.names[k] = map[string]bool{}
		}
		d.names[k][name] = true
	}
}

// forget is for a name that nobody asks for any more.
func (d *demand) forget(name string) {
	d.unlink(name)
	delete(d.known, name)
	delete(d.changes, name)
	delete(d.made, name)
}

func (d *demand) unlink(name string) {
	for _, k := range d.depends[name] {
		delete(d.names[k], name)
		if len(d.names[k]) == 0 {
			delete(d.names, k)
		}
	}
	delete(d.depends, name)
}

func (d *demand) collect(into map[string]bool, key string) {
	for name := range d.names[key] {
		into[name] = true
	}
}
