package flows

import (
	"net/netip"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/mantlet/mantlet/xds/names"
)

// recordOf translates one entry of the log with the given name. The second result is false for an entry that is not a record.
func recordOf(log, self string, e *accesslogv3.TCPAccessLogEntry) (Record, bool) {
	c := e.GetCommonProperties()
	if c.GetIntermediateLogEntry() { //nolint:staticcheck // of a connection that is still open; its end will be logged
		return Record{}, false
	}
	r := Record{
		Time:            c.GetStartTime().AsTime(),
		Log:             log,
		Direction:       Inbound,
		Self:            self,
		Source:          addrPort(c.GetDownstreamRemoteAddress()),
		Destination:     addrPort(c.GetDownstreamLocalAddress()),
		UpstreamLocal:   addrPort(c.GetUpstreamLocalAddress()),
		UpstreamRemote:  addrPort(c.GetUpstreamRemoteAddress()),
		Cluster:         c.GetUpstreamCluster(),
		Flags:           flags(c.GetResponseFlags()),
		BytesReceived:   e.GetConnectionProperties().GetReceivedBytes(),
		BytesSent:       e.GetConnectionProperties().GetSentBytes(),
		DurationSeconds: c.GetDuration().AsDuration().Seconds(),
		Termination:     c.GetConnectionTerminationDetails(),
		TLS:             tlsOf(c.GetTlsProperties()),
	}
	if log == names.LogOutbound {
		r.Direction = Outbound
	}
	r.TransportFailure = transportFailure(log, c)
	verdict, ok := verdictOf(&r)
	r.Verdict = verdict
	if r.Direction == Outbound {
		// Whose address it is; proved where the connection came about and was to be proved.
		if id := c.GetCustomTags()[names.TagPeer]; spiffe(id) {
			r.Peer = id
			r.Authenticated = verdict == Allowed && spiffe(c.GetCustomTags()[names.TagProof])
		}
		return r, ok
	}
	r.Peer = peer(c, r.TLS)
	r.Authenticated = r.Peer != ""
	return r, ok
}

// spiffe tells an ID from names.Plaintext and from Envoy's "-" for nothing.
func spiffe(id string) bool { return strings.HasPrefix(id, "spiffe://") }

// transportFailure is why TLS failed, from the side that speaks TLS. Of a side that does not, Envoy reports what BoringSSL last stumbled
// over on that thread, such as the inspection of a plaintext connection. So inbound it counts only where no cluster was chosen, which is
// after the handshake.
func transportFailure(log string, c *accesslogv3.AccessLogCommon) string {
	switch {
	case log == names.LogInbound && c.GetUpstreamCluster() == "":
		return c.GetDownstreamTransportFailureReason()
	case log == names.LogOutbound && strings.HasPrefix(c.GetUpstreamCluster(), names.OnDemandPrefix):
		return c.GetUpstreamTransportFailureReason()
	}
	return ""
}

// peer is the SPIFFE ID that mTLS proved of who came in: in the filter state, handed on from the TLS session to the gate, or in the
// session itself.
func peer(c *accesslogv3.AccessLogCommon, session *TLS) string {
	candidates := []string{text(c.GetFilterStateObjects()[names.PeerID])}
	if session != nil {
		candidates = append(candidates, session.PeerSANs...)
	}
	for _, id := range candidates {
		if spiffe(id) {
			return id
		}
	}
	return ""
}

// text reads a filter state object that holds a string.
func text(a *anypb.Any) string {
	if a == nil {
		return ""
	}
	if s := new(wrapperspb.StringValue); a.UnmarshalTo(s) == nil {
		return s.GetValue()
	}
	if b := new(wrapperspb.BytesValue); a.UnmarshalTo(b) == nil {
		return string(b.GetValue())
	}
	return ""
}

func addrPort(a *corev3.Address) netip.AddrPort {
	s := a.GetSocketAddress()
	addr, err := netip.ParseAddr(s.GetAddress())
	if err != nil { // none, or an internal listener's
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(addr.Unmap(), uint16(s.GetPortValue()))
}

func tlsOf(p *accesslogv3.TLSProperties) *TLS {
	if p == nil {
		return nil
	}
	t := &TLS{PeerSANs: uris(p.GetPeerCertificateProperties()), LocalSANs: uris(p.GetLocalCertificateProperties())}
	switch p.GetTlsVersion() {
	case accesslogv3.TLSProperties_TLSv1:
		t.Version = "TLSv1"
	case accesslogv3.TLSProperties_TLSv1_1:
		t.Version = "TLSv1.1"
	case accesslogv3.TLSProperties_TLSv1_2:
		t.Version = "TLSv1.2"
	case accesslogv3.TLSProperties_TLSv1_3:
		t.Version = "TLSv1.3"
	}
	if t.Version == "" && t.PeerSANs == nil && t.LocalSANs == nil {
		return nil
	}
	return t
}

func uris(p *accesslogv3.TLSProperties_CertificateProperties) []string {
	var out []string
	for _, san := range p.GetSubjectAltName() {
		if u := san.GetUri(); u != "" {
			out = append(out, u)
		}
	}
	return out
}

// flags are the short names of Envoy's documentation (%RESPONSE_FLAGS%), in its order.
func flags(f *accesslogv3.ResponseFlags) []string {
	var out []string
	for _, x := range []struct {
		set  bool
		name string
	}{
		{f.GetFailedLocalHealthcheck(), "LH"},
		{f.GetNoHealthyUpstream(), "UH"},
		{f.GetUpstreamRequestTimeout(), "UT"},
		{f.GetLocalReset(), "LR"},
		{f.GetUpstreamRemoteReset(), "UR"},
		{f.GetUpstreamConnectionFailure(), "UF"},
		{f.GetUpstreamConnectionTermination(), "UC"},
		{f.GetUpstreamOverflow(), "UO"},
		{f.GetNoRouteFound(), "NR"},
		{f.GetDelayInjected(), "DI"},
		{f.GetFaultInjected(), "FI"},
		{f.GetRateLimited(), "RL"},
		{f.GetUnauthorizedDetails() != nil, "UAEX"},
		{f.GetRateLimitServiceError(), "RLSE"},
		{f.GetDownstreamConnectionTermination(), "DC"},
		{f.GetUpstreamRetryLimitExceeded(), "URX"},
		{f.GetStreamIdleTimeout(), "SI"},
		{f.GetInvalidEnvoyRequestHeaders(), "IH"},
		{f.GetDownstreamProtocolError(), "DPE"},
		{f.GetUpstreamMaxStreamDurationReached(), "UMSDR"},
		{f.GetResponseFromCacheFilter(), "RFCF"},
		{f.GetNoFilterConfigFound(), "NFCF"},
		{f.GetDurationTimeout(), "DT"},
		{f.GetUpstreamProtocolError(), "UPE"},
		{f.GetNoClusterFound(), "NC"},
		{f.GetOverloadManager(), "OM"},
		{f.GetDnsResolutionFailure(), "DF"},
		{f.GetDownstreamRemoteReset(), "DR"},
	} {
		if x.set {
			out = append(out, x.name)
		}
	}
	return out
}
