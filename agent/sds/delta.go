package sds

import (
	"log/slog"
	"sort"
	"strconv"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// deltaStream is an incremental stream: each response holds only what changed. A name that this server does not have is answered
// at once, as removed.
type deltaStream struct {
	log      *slog.Logger
	accepted func(spiffeid.ID) // is told whose certificate Envoy has taken over
	send     func(*discoveryv3.DeltaDiscoveryResponse) error

	begun    bool
	names    map[string]bool              // subscribed and offered
	sent     map[string]string            // name → version that Envoy has been sent
	unknown  []string                     // to be answered
	nonce    int                          // of the last response
	inFlight map[string]map[string]string // nonce → what it carried, until it is answered
	ids      map[string]spiffeid.ID       // nonce → whose certificate that was, if one
}

func (d *deltaStream) receive(req *discoveryv3.DeltaDiscoveryRequest) error {
	if err := checkType(req.GetTypeUrl()); err != nil {
		return err
	}
	first := !d.begun
	if first {
		d.begun = true
		d.names, d.sent, d.inFlight = map[string]bool{}, map[string]string{}, map[string]map[string]string{}
		d.ids = map[string]spiffeid.ID{}
	}
	if detail := req.GetErrorDetail(); detail != nil {
		logNACK(d.log, d.inFlight[req.GetResponseNonce()], detail.GetMessage())
	} else {
		d.accepted(d.ids[req.GetResponseNonce()])
	}
	delete(d.inFlight, req.GetResponseNonce())
	delete(d.ids, req.GetResponseNonce())
	for _, name := range req.GetResourceNamesUnsubscribe() {
		delete(d.names, name)
		delete(d.sent, name)
	}
	for _, name := range req.GetResourceNamesSubscribe() {
		if !offered(name) {
			d.log.Warn("Envoy asks for a secret that does not exist", "secret", name)
			d.unknown = append(d.unknown, name)
			continue
		}
		d.names[name] = true
		delete(d.sent, name) // who subscribes again wants an answer again
	}
	if first { // after a reconnect Envoy says what it has
		for name, version := range req.GetInitialResourceVersions() {
			if d.names[name] {
				d.sent[name] = version
			}
		}
	}
	return nil
}

func (d *deltaStream) push(have map[string]secret) error {
	resp := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: typeURL, RemovedResources: d.unknown}
	d.unknown = nil
	carried := make(map[string]string)
	var id spiffeid.ID
	for name := range d.names {
		s, ok := have[name]
		if !ok || d.sent[name] == s.version {
			continue
		}
		resp.Resources = append(resp.Resources, &discoveryv3.Resource{Name: name, Version: s.version, Resource: s.body})
		d.sent[name], carried[name] = s.version, s.version
		if !s.id.IsZero() {
			id = s.id
		}
	}
	if len(resp.GetResources()) == 0 && len(resp.GetRemovedResources()) == 0 {
		return nil
	}
	sort.Slice(resp.Resources, func(i, j int) bool { return resp.Resources[i].GetName() < resp.Resources[j].GetName() })
	d.nonce++
	resp.Nonce = strconv.Itoa(d.nonce)
	d.inFlight[resp.GetNonce()], d.ids[resp.GetNonce()] = carried, id
	return d.send(resp)
}
