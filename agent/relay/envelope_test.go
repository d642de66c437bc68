package relay

import (
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/anypb"
)

func TestEnvelopes(t *testing.T) {
	refusal := &statuspb.Status{Code: 3, Message: "no such filter"}
	req, err := parseRequest(marshal(t, &discoveryv3.DeltaDiscoveryRequest{
		Node:                     &corev3.Node{Id: "shop/web-0"},
		TypeUrl:                  TypeListener,
		ResourceNamesSubscribe:   []string{"a", "b"},
		ResourceNamesUnsubscribe: []string{"c"},
		InitialResourceVersions:  map[string]string{"d": "1"},
		ResponseNonce:            "7",
		ErrorDetail:              refusal,
	}))
	if err != nil {
		t.Fatal(err)
	}
	want := request{typeURL: TypeListener, subscribe: []string{"a", "b"}, unsubscribe: []string{"c"}, held: map[string]string{"d": "1"},
		nonce: "7", refusal: marshal(t, refusal), reason: "no such filter"}
	if diff := cmp.Diff(want, req, cmp.AllowUnexported(request{})); diff != "" {
		t.Error(diff)
	}
	again := new(discoveryv3.DeltaDiscoveryRequest)
	if err := proto.Unmarshal(req.message(), again); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: TypeListener, ResourceNamesSubscribe: []string{"a", "b"}, ResourceNamesUnsubscribe: []string{"c"},
		InitialResourceVersions: map[string]string{"d": "1"}, ResponseNonce: "7", ErrorDetail: refusal}, again, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}

	sent := &discoveryv3.DeltaDiscoveryResponse{
		Resources: []*discoveryv3.Resource{
			{Name: "a", Version: "1", Resource: &anypb.Any{TypeUrl: TypeListener, Value: []byte("\x1a\x01z")}}, {Name: "b", Aliases: []string{"z"}}},
		TypeUrl: TypeListener, RemovedResources: []string{"c"}, Nonce: "8",
	}
	sent.Resources[1].ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 998, protowire.VarintType), 5)) // of a later protocol
	resp, err := parseResponse(marshal(t, sent))
	if err != nil {
		t.Fatal(err)
	}
	a := resp.resources[0]
	if resp.typeURL != TypeListener || resp.nonce != "8" || len(resp.resources) != 2 || a.name != "a" || a.version != "1" || a.typeURL != TypeListener ||
		string(a.value) != "\x1a\x01z" || resp.resources[1].name != "b" || len(resp.removed) != 1 || resp.removed[0] != "c" {
		t.Errorf("%+v", resp)
	}
	// What a resource holds passes as it is.
	passed := new(discoveryv3.DeltaDiscoveryResponse)
	if err := proto.Unmarshal(resp.message(), passed); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(sent, passed, protocmp.Transform()); diff != "" {
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
			got.nack() != (req.ErrorDetail != nil) || got.reason != req.GetErrorDetail().GetMessage()) {
			t.Errorf("request %+v, %v; want %v", got, err, &req)
		}
		var resp discoveryv3.DeltaDiscoveryResponse
		r, err := parseResponse(b)
		if proto.Unmarshal(b, &resp) == nil && (err != nil || r.typeURL != resp.TypeUrl || r.nonce != resp.Nonce || len(r.removed) != len(resp.RemovedResources) || len(r.resources) != len(resp.Resources)) {
			t.Errorf("response %+v, %v; want %v", r, err, &resp)
		}
	})
}
