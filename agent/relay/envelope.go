package relay

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
)

// request is what the relay reads of a DeltaDiscoveryRequest (envoy/service/discovery/v3/discovery.proto, for the numbers too).
type request struct {
	typeURL     string
	subscribe   []string
	unsubscribe []string
	held        map[string]string // initial_resource_versions, name → version: what is there from an earlier stream
	nonce       string            // of the response that this ACKs or NACKs; empty: it does neither
	refusal     []byte            // error_detail, a google.rpc.Status; nil: no NACK
	reason      string            // the message in refusal
}

func (r request) nack() bool { return r.refusal != nil }

// response is what the relay reads of a DeltaDiscoveryResponse.
type response struct {
	typeURL   string
	nonce     string
	resources []*resource
	removed   []string
}

func parseRequest(b []byte) (r request, err error) {
	err = fields(b, func(num protowire.Number, v []byte) error {
		switch num {
		case 2:
			r.typeURL = string(v)
		case 3:
			r.subscribe = append(r.subscribe, string(v))
		case 4:
			r.unsubscribe = append(r.unsubscribe, string(v))
		case 5: // a map: messages of key 1 and value 2
			var name, version string
			if err := fields(v, func(num protowire.Number, v []byte) error {
				switch num {
				case 1:
					name = string(v)
				case 2:
					version = string(v)
				}
				return nil
			}); err != nil {
				return err
			}
			if r.held == nil {
				r.held = map[string]string{}
			}
			r.held[name] = version
		case 6:
			r.nonce = string(v)
		case 7: // google.rpc.Status: message 2
			r.refusal = append(append(make([]byte, 0, len(r.refusal)+len(v)), r.refusal...), v...)
			return fields(v, func(num protowire.Number, v []byte) error {
				if num == 2 {
					r.reason = string(v)
				}
				return nil
			})
		}
		return nil
	})
	if err != nil {
		return request{}, fmt.Errorf("discovery request: %w", err)
	}
	return r, nil
}

// message is the request on the wire.
func (r request) message() []byte {
	b := appendText(nil, 2, r.typeURL)
	for _, n := range r.subscribe {
		b = appendText(b, 3, n)
	}
	for _, n := range r.unsubscribe {
		b = appendText(b, 4, n)
	}
	for _, n := range slices.Sorted(maps.Keys(r.held)) {
		b = appendText(b, 5, string(appendText(appendText(nil, 1, n), 2, r.held[n])))
	}
	if r.nonce != "" {
		b = appendText(b, 6, r.nonce)
	}
	if r.refusal != nil {
		b = appendText(b, 7, string(r.refusal))
	}
	return b
}

func parseResponse(b []byte) (r response, err error) {
	err = fields(b, func(num protowire.Number, v []byte) error {
		switch num {
		case 2:
			res, err := parseResource(v)
			r.resources = append(r.resources, res)
			return err
		case 4:
			r.typeURL = string(v)
		case 5:
			r.nonce = string(v)
		case 6:
			r.removed = append(r.removed, string(v))
		}
		return nil
	})
	if err != nil {
		return response{}, fmt.Errorf("discovery response: %w", err)
	}
	return r, nil
}

// message is the response on the wire: each resource as it came, whatever it holds.
func (r response) message() []byte {
	var b []byte
	for _, res := range r.resources {
		b = protowire.AppendBytes(protowire.AppendTag(b, 2, protowire.BytesType), res.wire)
	}
	b = appendText(b, 4, r.typeURL)
	b = appendText(b, 5, r.nonce)
	for _, n := range r.removed {
		b = appendText(b, 6, n)
	}
	return b
}

// resource is one of a response. It does not change.
type resource struct {
	name, version string
	typeURL       string // of what is inside
	value         []byte // what is inside, within wire
	wire          []byte // the whole Resource message

	// Of an on-demand cluster:
	endpoints  int
	unreadable error // why they cannot be counted
}

func parseResource(b []byte) (*resource, error) {
	r := &resource{wire: b}
	err := fields(b, func(num protowire.Number, v []byte) error {
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
	if err == nil && onDemand(r.typeURL, r.name) {
		r.endpoints, r.unreadable = countEndpoints(r)
	}
	return r, err
}

func appendText(b []byte, num protowire.Number, text string) []byte {
	return protowire.AppendString(protowire.AppendTag(b, num, protowire.BytesType), text)
}

// fields calls visit with each length-delimited field of a message, in order; all that is read here is of that kind.
func fields(b []byte, visit func(protowire.Number, []byte) error) error {
	return eachField(b, func(num protowire.Number, kind protowire.Type, v []byte) error {
		if kind != protowire.BytesType {
			return nil
		}
		return visit(num, v)
	})
}

// eachField calls visit with every field of a message, in order; v is the content of a length-delimited field, else the field's bytes.
func eachField(b []byte, visit func(num protowire.Number, kind protowire.Type, v []byte) error) error {
	for len(b) > 0 {
		num, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return errors.New("broken tag")
		}
		b = b[n:]
		var v []byte
		if kind == protowire.BytesType {
			v, n = protowire.ConsumeBytes(b)
		} else if n = protowire.ConsumeFieldValue(num, kind, b); n >= 0 {
			v = b[:n]
		}
		if n < 0 {
			return fmt.Errorf("broken field %d", num)
		}
		if err := visit(num, kind, v); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}
