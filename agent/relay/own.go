package relay

import (
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protowire"
)

// Own is a resource for the agent itself. It comes on the pod's stream beside what Envoy is sent, and Envoy never hears of it.
type Own struct {
	TypeURL string
	Name    string
	// Apply takes over the resource's bytes, which it must not keep, or says why not: then what was applied before stays, and the
	// control plane is told the reason. It is called one at a time, in the order in which the control plane sent; what is for Envoy, or for
	// another Own, does not wait for it.
	Apply func(value []byte) error
}

// own is an Own and what is held of it, from stream to stream.
type own struct {
	Own
	logger    *slog.Logger
	responses chan ownResponse
	coming    atomic.Int32 // responses that have been received and not yet been taken

	mu      sync.Mutex
	current *planeSide
	version string // of what was applied last; empty: nothing was
}

// ownResponse is a response of one stream.
type ownResponse struct {
	side *planeSide
	response
}

// ownQueue is how many responses may wait for Apply before the stream does. The control plane has one version on its way at a time.
const ownQueue = 8

// Subscribe has each stream carry a resource for the agent, one of each type. It is for before [Relay.Register], and panics where the type
// has one already.
func (r *Relay) Subscribe(o Own) {
	if r.own[o.TypeURL] != nil {
		panic("relay: two resources of the agent's have the type " + o.TypeURL)
	}
	r.own[o.TypeURL] = &own{Own: o, logger: r.logger, responses: make(chan ownResponse, ownQueue)}
}

// Coming reports whether something has been received for an Own that Apply has not been done with. What is for Envoy and was sent after it
// may be in force there already.
func (r *Relay) Coming(typeURL string) bool {
	o := r.own[typeURL]
	return o != nil && o.coming.Load() > 0
}

// serveOwn applies what comes for one Own until the relay is closed.
func (r *Relay) serveOwn(o *own) {
	for {
		select {
		case <-r.closed.Done():
			return
		case m := <-o.responses:
			answer, ok := o.take(m)
			o.coming.Add(-1)
			if ok {
				r.do(r.closed, func() { r.machine.answerOwn(m.side, answer) })
			}
		}
	}
}

// answerOwn sends an answer, unless its stream has ended.
func (m *machine) answerOwn(side *planeSide, r request) {
	if m.plane == side {
		side.answers = append(side.answers, r)
		side.wake()
	}
}

// subscriptions are the agent's first requests on a stream, in the order of their types.
func (r *Relay) subscriptions(side *planeSide) (list []request) {
	for _, url := range slices.Sorted(maps.Keys(r.own)) {
		list = append(list, r.own[url].begin(side))
	}
	return list
}

// begin says which stream counts from here on, for one that was overtaken must not bring back what it has received, and returns its first
// request: the name, and what is held already.
func (o *own) begin(side *planeSide) request {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.current = side
	r := request{typeURL: o.TypeURL, subscribe: []string{o.Name}}
	if o.version != "" {
		r.held = map[string]string{o.Name: o.version}
	}
	return r
}

// take applies a response and returns the request that answers it; false: the stream no longer counts.
func (o *own) take(r ownResponse) (answer request, ok bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.current != r.side {
		return request{}, false
	}
	answer = request{typeURL: o.TypeURL, nonce: r.nonce}
	version, err := o.apply(r.response)
	if err != nil {
		o.logger.Error("relay: the agent refuses what the control plane sent for it and keeps what it has",
			"type", shortType(o.TypeURL), "version", version, "reason", err)
		status := protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), uint64(codes.InvalidArgument))
		answer.refusal = appendText(status, 2, err.Error())
		return answer, true
	}
	if version != "" {
		o.version = version
		o.logger.Debug("relay: the agent accepted", "type", shortType(o.TypeURL), "version", version)
	}
	return answer, true
}

// apply returns the version of what the response holds, also with an error; none for an empty response.
func (o *own) apply(r response) (version string, err error) {
	switch {
	case len(r.removed) > 0:
		return "", fmt.Errorf("%q cannot be taken away: the last that was sent stays in force", r.removed)
	case len(r.resources) == 0:
		return "", nil
	case len(r.resources) > 1:
		return "", fmt.Errorf("%d resources, where one is subscribed to", len(r.resources))
	}
	got := r.resources[0]
	switch {
	case got.name != o.Name:
		return got.version, fmt.Errorf("%q was not subscribed to, %q was", got.name, o.Name)
	case got.typeURL != o.TypeURL:
		return got.version, fmt.Errorf("%q is a %s, not a %s", got.name, got.typeURL, o.TypeURL)
	case got.version == "":
		return "", fmt.Errorf("%q has no version", got.name)
	}
	return got.version, o.Apply(got.value)
}
