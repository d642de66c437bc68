package relay

import (
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestEnvelopes(t *testing.T) {
	req, err := parseRequest(marshal(t, &discoveryv3.DeltaDiscoveryRequest{
		Node:                     &corev3.Node{Id: "shop/web-0"},
		TypeUrl:                  TypeListener,
		ResourceNamesSubscribe:   []string{"a", "b"},
		ResourceNamesUnsubscribe: []string{"c"},
		InitialResourceVersions:  map[string]string{"d": "1"},
		ResponseNonce:            "7",
		ErrorDetail:              &statuspb.Status{Code: 3, Message: "no such filter"},
	}))
	if err != nil {
		t.Fatal(err)
	}
	want := request{typeURL: TypeListener, subscribe: []string{"a", "b"}, held: []string{"d"}, nonce: "7", nack: true, reason: "no such filter"}
	if diff := cmp.Diff(want, req, cmp.AllowUnexported(request{})); diff != "" {
		t.Error(diff)
	}
	resp, err := parseResponse(marshal(t, &discoveryv3.DeltaDiscoveryResponse{
		SystemVersionInfo: "x",
		Resources: []*discoveryv3.Resource{
			{Name: "a", Version: "1", Resource: &anypb.Any{TypeUrl: TypeListener, Value: []byte("\x1a\x01z")}}, {Name: "b", Aliases: []string{"z"}}},
		TypeUrl: TypeListener, RemovedResources: []string{"c"}, Nonce: "8",
	}))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(response{typeURL: TypeListener, nonce: "8", names: []string{"a", "b"}, removed: []string{"c"}}, resp, cmp.AllowUnexported(response{})); diff != "" {
		t.Error(diff)
	}
}

func FuzzEnvelopes(f *testing.F) {
	f.Add(marshal(f, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: "t", InitialResourceVersions: map[string]string{"a": "b"}, ErrorDetail: &statuspb.Status{Message: "m"}}))
	f.Add(marshal(f, &discoveryv3.DeltaDiscoveryResponse{TypeUrl: "t", Nonce: "n", Resources: []*discoveryv3.Resource{{Name: "a"}}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		// What the generated code accepts must be read alike. (It is stricter: it also checks nested messages and UTF-8.)
		var req discoveryv3.DeltaDiscoveryRequest
		got, err := parseRequest(b)
		if proto.Unmarshal(b, &req) == nil && (err != nil || got.typeURL != req.TypeUrl || got.nonce != req.ResponseNonce ||
			got.nack != (req.ErrorDetail != nil) || got.reason != req.GetErrorDetail().GetMessage()) {
			t.Errorf("request %+v, %v; want %v", got, err, &req)
		}
		var resp discoveryv3.DeltaDiscoveryResponse
		r, err := parseResponse(b)
		if proto.Unmarshal(b, &resp) == nil && (err != nil || r.typeURL != resp.TypeUrl || r.nonce != resp.Nonce || len(r.removed) != len(resp.RemovedResources)) {
			t.Errorf("response %+v, %v; want %v", r, err, &resp)
		}
	})
}
