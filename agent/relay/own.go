package relay

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protowire"
)

// Own is a resource for the agent itself. It comes on Envoy's stream, because the control plane keeps one stream for each pod, and
// is taken out of it: Envoy sees neither the subscription nor an answer.
type Own struct {
	TypeURL string
	Name    string
	// Apply takes over the resource's bytes, which it must not keep, or says why not: then what was applied before stays, and the
	// control plane is told the reason. It is called one at a time, in the order in which the control plane sent.
	Apply func(value []byte) error
}

// own is an Own and what is held of it, from stream to stream.
type own struct {
	Own
	logger *slog.Logger

	mu      sync.Mutex
	current *session
	version string // of what was applied last; empty: nothing was
}

// Subscribe has each stream carry a resource for the agent, one of each type. It is for before [Relay.Register], and panics where the type
// has one already.
func (r *Relay) Subscribe(o Own) {
	if r.own[o.TypeURL] != nil {
		panic("relay: two resources of the agent's have the type " + o.TypeURL)
	}
	r.own[o.TypeURL] = &own{Own: o, logger: r.logger}
}

// subscriptions are the agent's first requests on a stream, in the order of their types.
func (r *Relay) subscriptions() (list [][]byte) {
	for _, url := range slices.Sorted(maps.Keys(r.own)) {
		list = append(list, r.own[url].subscription())
	}
	return list
}

// begin says which stream counts from here on: one that was overtaken must not bring back what it has received.
func (o *own) begin(s *session) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.current = s
}

// subscription is the first request of a stream: the name, and what is held already.
func (o *own) subscription() []byte {
	o.mu.Lock()
	defer o.mu.Unlock()
	b := appendText(nil, 2, o.TypeURL)
	b = appendText(b, 3, o.Name)
	if o.version != "" {
		b = appendText(b, 5, string(appendText(appendText(nil, 1, o.Name), 2, o.version)))
	}
	return b
}

// take applies a response and returns the request that answers it; nil: the stream no longer counts.
func (o *own) take(s *session, r response, message []byte) []byte {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.current != s {
		return nil
	}
	answer := appendText(appendText(nil, 2, o.TypeURL), 6, r.nonce)
	version, err := o.apply(r, message)
	if err != nil {
		o.logger.Error("relay: the agent refuses what the control plane sent for it and keeps what it has",
			"type", shortType(o.TypeURL), "version", version, "reason", err)
		detail := protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), uint64(codes.InvalidArgument))
		return appendText(answer, 7, string(appendText(detail, 2, err.Error())))
	}
	if version != "" {
		o.version = version
		o.logger.Debug("relay: the agent accepted", "type", shortType(o.TypeURL), "version", version)
	}
	return answer
}

// apply returns the version of what the response holds, also with an error; none for an empty response.
func (o *own) apply(r response, message []byte) (version string, err error) {
	if len(r.removed) > 0 {
		return "", fmt.Errorf("%q cannot be taken away: the last that was sent stays in force", r.removed)
	}
	list, err := parseResources(message)
	switch {
	case err != nil:
		return "", err
	case len(list) == 0:
		return "", nil
	case len(list) > 1:
		return "", fmt.Errorf("%d resources, where one is subscribed to", len(list))
	}
	got := list[0]
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

// resource is one of a DeltaDiscoveryResponse, with what is inside.
type resource struct {
	version, name, typeURL string
	value                  []byte
}

func parseResources(b []byte) (list []resource, err error) {
	err = fields(b, func(num protowire.Number, v []byte) error {
		if num != 2 {
			return nil
		}
		var r resource
		err := fields(v, func(num protowire.Number, v []byte) error {
			switch num {
			case 1:
				r.version = string(v)
			case 2: // google.protobuf.Any
				return fields(v, func(num protowire.Number, v []byte) error {
					switch num {
					case 1:
						r.typeURL = string(v)
					case 2:
						r.value = v
					}
					return nil
				})
			case 3:
				r.name = string(v)
			}
			return nil
		})
		list = append(list, r)
		return err
	})
	return list, err
}

func appendText(b []byte, num protowire.Number, text string) []byte {
	return protowire.AppendString(protowire.AppendTag(b, num, protowire.BytesType), text)
}

// requester is the control plane's side of a stream for those who send: Envoy and the agent itself.
type requester struct {
	mu sync.Mutex
	up grpc.ClientStream
}

func (q *requester) send(b []byte) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.up.SendMsg(&frame{b})
}

var errNoNonce = errors.New("the control plane sent a response for the agent without a nonce")
