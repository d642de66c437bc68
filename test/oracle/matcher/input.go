package matcher

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	corev3 "github.com/cncf/xds/go/xds/core/v3"
	networkv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/network/v3"
	sslv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/ssl/v3"
)

// Connection is what Envoy knows of a connection when it matches.
type Connection struct {
	DestinationIP        netip.Addr // after original_dst
	DestinationPort      uint16
	SourceIP             netip.Addr
	SourcePort           uint16
	DirectSourceIP       netip.Addr // of the socket; not valid: SourceIP
	ServerName           string     // empty: none was seen
	TransportProtocol    string     // as a listener filter detected it; empty is "raw_buffer", as in Envoy
	ApplicationProtocols []string   // offered in the ClientHello; none where it was not looked at
	FilterState          map[string]string
	TLS                  *TLS // nil: not TLS, or TLS that is still to be spoken, as in filter_chain_matcher
}

// TLS is a completed handshake.
type TLS struct {
	URISANs []string // of the peer's certificate
}

// anyConnection answers every question, whatever the answer.
var anyConnection = Connection{DestinationIP: netip.IPv4Unspecified(), SourceIP: netip.IPv4Unspecified()}

// inputValue is what an input says. Available is false where the question makes no sense yet, and the match is given up. Present is
// false where the answer is that there is none.
type inputValue struct {
	text      string
	present   bool
	available bool
}

func some(text string) inputValue { return inputValue{text, true, true} }

// someIf takes the empty string for none.
func someIf(text string) inputValue { return inputValue{text, text != "", true} }

func input(ext *corev3.TypedExtensionConfig, c Connection) (inputValue, error) {
	config, err := ext.GetTypedConfig().UnmarshalNew()
	if err != nil {
		return inputValue{}, fmt.Errorf("input %q: %w", ext.GetName(), err)
	}
	switch in := config.(type) {
	case *networkv3.DestinationIPInput:
		return address(c.DestinationIP)
	case *networkv3.DestinationPortInput:
		return some(strconv.Itoa(int(c.DestinationPort))), nil
	case *networkv3.SourceIPInput:
		return address(c.SourceIP)
	case *networkv3.SourcePortInput:
		return some(strconv.Itoa(int(c.SourcePort))), nil
	case *networkv3.DirectSourceIPInput:
		if c.DirectSourceIP.IsValid() {
			return address(c.DirectSourceIP)
		}
		return address(c.SourceIP)
	case *networkv3.ServerNameInput:
		return someIf(c.ServerName), nil
	case *networkv3.TransportProtocolInput:
		if c.TransportProtocol == "" {
			return some("raw_buffer"), nil
		}
		return some(c.TransportProtocol), nil
	case *networkv3.ApplicationProtocolInput: // 'h2','http/1.1', quotes included
		if len(c.ApplicationProtocols) == 0 {
			return inputValue{available: true}, nil
		}
		return some("'" + strings.Join(c.ApplicationProtocols, "','") + "'"), nil
	case *networkv3.FilterStateInput:
		if in.GetField() != "" {
			return inputValue{}, fmt.Errorf("input %q: the field of a filter state object is unknown here", ext.GetName())
		}
		text, ok := c.FilterState[in.GetKey()]
		return inputValue{text, ok, true}, nil
	case *sslv3.UriSanInput:
		if c.TLS == nil {
			return inputValue{}, nil
		}
		return someIf(strings.Join(c.TLS.URISANs, ",")), nil
	}
	return inputValue{}, fmt.Errorf("input %q: type %s is unknown here", ext.GetName(), ext.GetTypedConfig().GetTypeUrl())
}

func address(a netip.Addr) (inputValue, error) {
	if !a.IsValid() {
		return inputValue{}, fmt.Errorf("the matcher asks for an address that the connection does not give")
	}
	return some(a.Unmap().String()), nil
}
