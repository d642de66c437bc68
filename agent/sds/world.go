package sds

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"sort"
	"strconv"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// worldStream is a state-of-the-world stream: each request lists all names, each response holds all that exist of them. A name
// that this server does not have stays unanswered, since the protocol has no word for it.
type worldStream struct {
	log      *slog.Logger
	accepted func(spiffeid.ID) // is told whose certificate Envoy has taken over
	send     func(*discoveryv3.DiscoveryResponse) error

	names []string          // subscribed and offered, sorted
	sent  map[string]string // name → version last sent
	nonce int               // of the last response; 0: none yet
	id    spiffeid.ID       // whose certificate it carried, if one
}

func (w *worldStream) receive(req *discoveryv3.DiscoveryRequest) error {
	if err := checkType(req.GetTypeUrl()); err != nil {
		return err
	}
	if n := req.GetResponseNonce(); n != "" && n != strconv.Itoa(w.nonce) {
		return nil // answers a response that a later one has overtaken; the answer to that one follows
	}
	if detail := req.GetErrorDetail(); detail != nil {
		logNACK(w.log, w.sent, detail.GetMessage())
	} else if req.GetResponseNonce() != "" {
		w.log.Debug("sds: envoy accepted", "nonce", w.nonce, "secrets", w.sent)
		w.accepted(w.id)
	}
	w.names = nil
	sent := make(map[string]string)
	for _, name := range req.GetResourceNames() {
		if !offered(name) {
			w.log.Warn("Envoy asks for a secret that does not exist; it will wait for it", "secret", name)
			continue
		}
		w.names = append(w.names, name)
		if v, ok := w.sent[name]; ok {
			sent[name] = v
		}
	}
	sort.Strings(w.names)
	w.sent = sent // who unsubscribes and subscribes again is answered again
	return nil
}

func (w *worldStream) push(have map[string]secret) error {
	resp := &discoveryv3.DiscoveryResponse{TypeUrl: typeURL}
	sum, changed := sha256.New(), false
	sent := make(map[string]string)
	var id spiffeid.ID
	for _, name := range w.names {
		s, ok := have[name]
		if !ok {
			continue
		}
		if !s.id.IsZero() {
			id = s.id
		}
		resp.Resources = append(resp.Resources, s.body)
		sent[name] = s.version
		changed = changed || w.sent[name] != s.version
		sum.Write(fmt.Appendf(nil, "%s=%s\n", name, s.version))
	}
	if !changed {
		return nil
	}
	w.sent, w.id = sent, id
	w.nonce++
	resp.Nonce = strconv.Itoa(w.nonce)
	resp.VersionInfo = hex.EncodeToString(sum.Sum(nil)[:8])
	w.log.Debug("sds: sent", "nonce", w.nonce, "secrets", sent)
	return w.send(resp)
}
