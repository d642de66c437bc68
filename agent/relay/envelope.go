package relay

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
)

// request is what the relay reads of a DeltaDiscoveryRequest (envoy/service/discovery/v3/discovery.proto, for the numbers too).
type request struct {
	typeURL   string
	subscribe []string
	held      []string // initial_resource_versions: what Envoy has from an earlier stream
	nonce     string   // of the response that this ACKs or NACKs; empty: it does neither
	nack      bool
	reason    string
}

// response is what the relay reads of a DeltaDiscoveryResponse.
type response struct {
	typeURL string
	nonce   string
	names   []string
	removed []string
}

func parseRequest(b []byte) (r request, err error) {
	err = fields(b, func(num protowire.Number, v []byte) error {
		switch num {
		case 2:
			r.typeURL = string(v)
		case 3:
			r.subscribe = append(r.subscribe, string(v))
		case 5: // a map: messages of key 1 and value 2
			return fields(v, func(num protowire.Number, v []byte) error {
				if num == 1 {
					r.held = append(r.held, string(v))
				}
				return nil
			})
		case 6:
			r.nonce = string(v)
		case 7: // google.rpc.Status: message 2
			r.nack = true
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

func parseResponse(b []byte) (r response, err error) {
	err = fields(b, func(num protowire.Number, v []byte) error {
		switch num {
		case 2: // Resource: name 3
			return fields(v, func(num protowire.Number, v []byte) error {
				if num == 3 {
					r.names = append(r.names, string(v))
				}
				return nil
			})
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

// fields calls visit with each length-delimited field of a message, in order; all that is read here is of that kind.
func fields(b []byte, visit func(protowire.Number, []byte) error) error {
	for len(b) > 0 {
		num, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return errors.New("broken tag")
		}
		b = b[n:]
		if kind != protowire.BytesType {
			if n = protowire.ConsumeFieldValue(num, kind, b); n < 0 {
				return fmt.Errorf("broken field %d", num)
			}
			b = b[n:]
			continue
		}
		v, n := protowire.ConsumeBytes(b)
		if n < 0 {
			return fmt.Errorf("broken field %d", num)
		}
		if err := visit(num, v); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}
