package xds

import (
	"fmt"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Resumption says whether sidecars resume TLS sessions among each other: it saves a handshake's signatures. Envoy asks neither for the
// peer's certificate nor for its expiry then, only for the identity in the session. The agents bound that in time: see the package
// agent/sds.
type Resumption uint8

const (
	// Resume resumes sessions.
	Resume Resumption = iota
	// NeverResume has every connection prove its identity anew.
	NeverResume
)

// ParseResumption reads "on" or "off".
func ParseResumption(s string) (Resumption, error) {
	switch s {
	case "on":
		return Resume, nil
	case "off":
		return NeverResume, nil
	}
	return 0, fmt.Errorf("resumption %q: not on or off", s)
}

// String returns "on" or "off".
func (r Resumption) String() string {
	if r == Resume {
		return "on"
	}
	return "off"
}

// sessionKeys is how many sessions an on-demand cluster keeps for each identity behind it. With Envoy's own default, 1, about one
// connection in eight is resumed; with this nearly all are.
const sessionKeys = 256

func (r Resumption) maxSessionKeys() *wrapperspb.UInt32Value {
	if r == Resume {
		return wrapperspb.UInt32(sessionKeys)
	}
	return wrapperspb.UInt32(0)
}

// downstream is the server's end. Only tickets are of use in TLS 1.3, and their keys are Envoy's own: other ones in each TLS context.
func (r Resumption) downstream(c *tlsv3.CommonTlsContext) *corev3.TransportSocket {
	d := &tlsv3.DownstreamTlsContext{
		CommonTlsContext:                 c,
		RequireClientCertificate:         wrapperspb.Bool(true),
		DisableStatefulSessionResumption: true,
	}
	if r != Resume {
		d.SessionTicketKeysType = &tlsv3.DownstreamTlsContext_DisableStatelessSessionResumption{DisableStatelessSessionResumption: true}
	}
	return transportSocket("tls", d)
}
