package flows

import (
	"encoding/json"
	"net/netip"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/mantlet/mantlet/xds/names"
)

const peerID = "spiffe://td.example/ns/shop/sa/api/labels/0123456789abcdef0123456789abcdef"

func socket(a string) *corev3.Address {
	ap := netip.MustParseAddrPort(a)
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: ap.Addr().String(), PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(ap.Port())}}}}
}

func object(t *testing.T, m proto.Message) map[string]*anypb.Any {
	t.Helper()
	a, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return map[string]*anypb.Any{names.PeerID: a}
}

func san(uri string) *accesslogv3.TLSProperties_CertificateProperties {
	return &accesslogv3.TLSProperties_CertificateProperties{SubjectAltName: []*accesslogv3.TLSProperties_CertificateProperties_SubjectAltName{
		{San: &accesslogv3.TLSProperties_CertificateProperties_SubjectAltName_Uri{Uri: uri}}}}
}

func TestRecord(t *testing.T) {
	began := time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC)
	rec, ok := recordOf(names.LogGate, "spiffe://td.example/self", &accesslogv3.TCPAccessLogEntry{
		CommonProperties: &accesslogv3.AccessLogCommon{
			StartTime: timestamppb.New(began), Duration: durationpb.New(1500 * time.Millisecond),
			DownstreamRemoteAddress: socket("10.0.0.1:4000"), DownstreamLocalAddress: socket("[::ffff:10.0.0.2]:8080"),
			UpstreamLocalAddress: socket("10.0.0.2:5000"), UpstreamRemoteAddress: socket("10.0.0.2:8080"), UpstreamCluster: names.ClusterApp,
			FilterStateObjects: object(t, wrapperspb.String(peerID)), ConnectionTerminationDetails: "idle_timeout",
			TlsProperties: &accesslogv3.TLSProperties{TlsVersion: accesslogv3.TLSProperties_TLSv1_3,
				PeerCertificateProperties: san(peerID), LocalCertificateProperties: san("spiffe://td.example/self")},
			ResponseFlags: &accesslogv3.ResponseFlags{DownstreamConnectionTermination: true},
		},
		ConnectionProperties: &accesslogv3.ConnectionProperties{ReceivedBytes: 3, SentBytes: 4},
	})
	if !ok {
		t.Fatal("no record")
	}
	// The wanted form is a contract: whoever reads the records reads these names.
	want := `{"time":"2026-01-02T03:04:05.000006Z","log":"gate","direction":"inbound","verdict":"allowed",` +
		`"self":"spiffe://td.example/self","peer":"` + peerID + `","authenticated":true,` +
		`"source":"10.0.0.1:4000","destination":"10.0.0.2:8080","upstreamLocal":"10.0.0.2:5000","upstreamRemote":"10.0.0.2:8080",` +
		`"cluster":"app","flags":["DC"],"bytesReceived":3,"bytesSent":4,"durationSeconds":1.5,"termination":"idle_timeout",` +
		`"tls":{"version":"TLSv1.3","peerSANs":["` + peerID + `"],"localSANs":["spiffe://td.example/self"]}}`
	got, err := json.Marshal(rec)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Error(diff)
	}
	var back Record
	if err := json.Unmarshal(got, &back); err != nil || back.Source != rec.Source || back.Time != rec.Time {
		t.Errorf("read back: %+v, %v", back, err)
	}
	var empty Record
	if b, err := json.Marshal(empty); err != nil || json.Unmarshal(b, &empty) != nil || empty.Source.IsValid() {
		t.Errorf("empty record: %s, %v", b, err)
	}
}

func TestPeer(t *testing.T) {
	for name, tt := range map[string]struct {
		common *accesslogv3.AccessLogCommon
		want   string
	}{
		"string":    {&accesslogv3.AccessLogCommon{FilterStateObjects: object(t, wrapperspb.String(peerID))}, peerID},
		"bytes":     {&accesslogv3.AccessLogCommon{FilterStateObjects: object(t, wrapperspb.Bytes([]byte(peerID)))}, peerID},
		"plaintext": {&accesslogv3.AccessLogCommon{FilterStateObjects: object(t, wrapperspb.String(names.Plaintext))}, ""},
		"other":     {&accesslogv3.AccessLogCommon{FilterStateObjects: object(t, durationpb.New(1))}, ""},
		"nothing":   {&accesslogv3.AccessLogCommon{}, ""},
		"a tag":     {&accesslogv3.AccessLogCommon{CustomTags: map[string]string{names.TagPeer: peerID, names.TagProof: peerID}}, ""}, // tags tell of endpoints
		"session":   {&accesslogv3.AccessLogCommon{TlsProperties: &accesslogv3.TLSProperties{PeerCertificateProperties: san(peerID)}}, peerID},
	} {
		rec, _ := recordOf(names.LogGate, "", &accesslogv3.TCPAccessLogEntry{CommonProperties: tt.common})
		if rec.Peer != tt.want || rec.Authenticated != (tt.want != "") {
			t.Errorf("%s: peer %q, authenticated %v", name, rec.Peer, rec.Authenticated)
		}
	}
}

// Outbound, whose address it is and whether that was proved are two things.
func TestOutboundPeer(t *testing.T) {
	tags := func(peer, proof string) map[string]string {
		return map[string]string{names.TagPeer: peer, names.TagProof: proof}
	}
	for name, tt := range map[string]struct {
		tags          map[string]string
		failed        bool
		peer          string
		authenticated bool
	}{
		"sidecar":              {tags: tags(peerID, peerID), peer: peerID, authenticated: true},
		"no sidecar":           {tags: tags(peerID, ""), peer: peerID},
		"nothing known":        {tags: tags("-", "-")},
		"nobody's address":     {},
		"not who it should be": {tags: tags(peerID, peerID), failed: true, peer: peerID},
	} {
		c := &accesslogv3.AccessLogCommon{UpstreamCluster: "od|10.0.0.1:80", CustomTags: tt.tags,
			FilterStateObjects: object(t, wrapperspb.String(peerID)), ResponseFlags: &accesslogv3.ResponseFlags{UpstreamConnectionFailure: tt.failed}}
		rec, ok := recordOf(names.LogOutbound, "", &accesslogv3.TCPAccessLogEntry{CommonProperties: c})
		if !ok || rec.Peer != tt.peer || rec.Authenticated != tt.authenticated {
			t.Errorf("%s: peer %q, authenticated %v", name, rec.Peer, rec.Authenticated)
		}
	}
}

func TestVerdicts(t *testing.T) {
	const skipped Verdict = ""
	const noPolicy = "rbac_access_denied_matched_policy[default-deny]"
	for _, tt := range []struct {
		log, cluster, flag, termination, failure string
		want                                     Verdict
	}{
		{log: names.LogGate, cluster: names.ClusterApp, want: Allowed},
		{log: names.LogGate, cluster: names.ClusterApp, flag: "UF", want: Failed},
		{log: names.LogGate, cluster: names.ClusterApp, flag: "UO", want: Failed},
		{log: names.LogGate, cluster: names.ClusterApp, flag: "DC", want: Allowed},
		{log: names.LogGate, cluster: names.ClusterDeny, want: Denied},
		{log: names.LogGate, flag: "UH", want: Denied},
		{log: names.LogGate, flag: "NR", want: Denied},
		{log: names.LogGate, want: Denied},
		{log: names.LogGate, cluster: "something else", want: Denied},

		{log: names.LogInbound, cluster: names.ClusterApp, want: Allowed},
		{log: names.LogInbound, cluster: names.ClusterApp, flag: "UF", want: Failed},
		{log: names.LogInbound, cluster: names.ClusterToGate, want: skipped},
		{log: names.LogInbound, cluster: names.ClusterToGate, flag: "UF", want: skipped},
		{log: names.LogInbound, cluster: names.ClusterToGate, termination: noPolicy, want: Denied},
		{log: names.LogInbound, failure: "TLS_error:|PEER_DID_NOT_RETURN_A_CERTIFICATE", want: Denied},
		{log: names.LogInbound, termination: noPolicy, want: Denied},
		{log: names.LogInbound, flag: "UH", want: Denied},
		{log: names.LogInbound, flag: "NR", want: Denied},
		{log: names.LogInbound, want: Failed},

		{log: names.LogOutbound, cluster: names.ClusterPassthrough, want: Allowed},
		{log: names.LogOutbound, cluster: names.ClusterPassthrough, flag: "UF", want: Failed},
		{log: names.LogOutbound, cluster: "od|10.0.0.1:80", want: Allowed},
		{log: names.LogOutbound, cluster: "od|10.0.0.1:80", flag: "UF", failure: "TLS_error:|CERTIFICATE_VERIFY_FAILED", want: Failed},
		{log: names.LogOutbound, cluster: "od|10.0.0.1:80", flag: "URX", want: Failed},
		{log: names.LogOutbound, cluster: "od|10.0.0.1:80", flag: "UH", want: Denied},
		{log: names.LogOutbound, flag: "UH", want: Denied},
		{log: names.LogOutbound, flag: "NC", want: Failed},
		{log: names.LogOutbound, cluster: "od|10.0.0.1:80", flag: "NC", want: Failed},
		{log: names.LogOutbound, flag: "NR", want: Denied},
		{log: names.LogOutbound, want: Failed},
	} {
		r := Record{Log: tt.log, Cluster: tt.cluster, Termination: tt.termination, TransportFailure: tt.failure}
		if tt.flag != "" {
			r.Flags = []string{tt.flag}
		}
		got, ok := verdictOf(&r)
		if got != tt.want || ok != (tt.want != skipped) {
			t.Errorf("%+v: %q, %v", tt, got, ok)
		}
	}
}

func TestTransportFailure(t *testing.T) {
	common := func(cluster string) *accesslogv3.TCPAccessLogEntry {
		return &accesslogv3.TCPAccessLogEntry{CommonProperties: &accesslogv3.AccessLogCommon{
			UpstreamCluster: cluster, UpstreamTransportFailureReason: "up", DownstreamTransportFailureReason: "down"}}
	}
	for _, tt := range []struct{ log, cluster, want string }{
		{names.LogInbound, "", "down"},
		{names.LogInbound, names.ClusterToGate, ""},
		{names.LogInbound, names.ClusterApp, ""},
		{names.LogGate, names.ClusterApp, ""},
		{names.LogOutbound, "od|10.0.0.1:80", "up"},
		{names.LogOutbound, names.ClusterPassthrough, ""},
	} {
		if r, _ := recordOf(tt.log, "", common(tt.cluster)); r.TransportFailure != tt.want {
			t.Errorf("%s, %s: %q, want %q", tt.log, tt.cluster, r.TransportFailure, tt.want)
		}
	}
}

// A flag of a later Envoy must not be lost in silence.
func TestFlagsAreComplete(t *testing.T) {
	var all accesslogv3.ResponseFlags
	m := all.ProtoReflect()
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if f.Kind() == protoreflect.BoolKind {
			m.Set(f, protoreflect.ValueOfBool(true))
		} else {
			m.Set(f, m.NewField(f))
		}
	}
	got := flags(&all)
	if len(got) != fields.Len() {
		t.Errorf("%d names for %d flags", len(got), fields.Len())
	}
	seen := map[string]bool{}
	for _, f := range got {
		if seen[f] {
			t.Errorf("%s twice", f)
		}
		seen[f] = true
	}
}

func TestIntermediateEntriesAreLeftOut(t *testing.T) {
	if _, ok := recordOf(names.LogGate, "", &accesslogv3.TCPAccessLogEntry{CommonProperties: &accesslogv3.AccessLogCommon{IntermediateLogEntry: true}}); ok { //nolint:staticcheck // older Envoys say it so
		t.Error("a record of a connection that is still open")
	}
}
