package relay

import (
	"errors"
	"slices"
	"strings"
	"testing"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/anypb"
)

const ownType = "type.googleapis.com/test.Own"

// applied is what an Own was given. Bytes that say "bad" are refused.
type applied struct{ values []string }

func (a *applied) Apply(b []byte) error {
	if string(b) == "bad" {
		return errors.New("bad bytes")
	}
	a.values = append(a.values, string(b))
	return nil
}

func ownBench(t *testing.T) (*bench, *applied) {
	t.Helper()
	b, a := newBench(t), new(applied)
	b.relay.Subscribe(Own{TypeURL: ownType, Name: "mine", Apply: a.Apply})
	close(b.ready)
	return b, a
}

func ownResponse(nonce string, list ...*discoveryv3.Resource) *deltaResponse {
	return &deltaResponse{TypeUrl: ownType, Nonce: nonce, Resources: list}
}

func ownResource(name, version, value string) *discoveryv3.Resource {
	return &discoveryv3.Resource{Name: name, Version: version, Resource: &anypb.Any{TypeUrl: ownType, Value: []byte(value)}}
}

// wantRequest receives the control plane's next request and wants it to be the very one.
func wantRequest(t *testing.T, up upstreamStream, want *deltaRequest) {
	t.Helper()
	got, err := up.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Fatal(diff)
	}
}

func send(t *testing.T, up upstreamStream, r *deltaResponse) {
	t.Helper()
	if err := up.Send(r); err != nil {
		t.Fatal(err)
	}
}

// subscribed receives Envoy's first request, which must come first, and then the agent's.
func subscribed(t *testing.T, up upstreamStream, held map[string]string) {
	t.Helper()
	wantRequest(t, up, &deltaRequest{TypeUrl: TypeListener, ResourceNamesSubscribe: []string{"*"}})
	wantRequest(t, up, &deltaRequest{TypeUrl: ownType, ResourceNamesSubscribe: []string{"mine"}, InitialResourceVersions: held})
}

func nack(nonce, reason string) *deltaRequest {
	return &deltaRequest{TypeUrl: ownType, ResponseNonce: nonce, ErrorDetail: &statuspb.Status{Code: int32(codes.InvalidArgument), Message: reason}}
}

func TestOwnResource(t *testing.T) {
	b, got := ownBench(t)
	down := b.connect()
	up := b.upstream()
	subscribed(t, up, nil)
	ack := func(nonce string) *deltaRequest { return &deltaRequest{TypeUrl: ownType, ResponseNonce: nonce} }
	for _, step := range []struct {
		send *deltaResponse
		want *deltaRequest
	}{
		{ownResponse("1", ownResource("mine", "v1", "first")), ack("1")},
		{ownResponse("2"), ack("2")},
		{ownResponse("3", ownResource("mine", "v3", "bad")), nack("3", "bad bytes")},
		{ownResponse("4", ownResource("other", "v4", "x")), nack("4", `"other" was not subscribed to, "mine" was`)},
		{ownResponse("5", ownResource("mine", "", "x")), nack("5", `"mine" has no version`)},
		{ownResponse("6", ownResource("mine", "v6", "x"), ownResource("mine", "v6", "y")), nack("6", "2 resources, where one is subscribed to")},
		{ownResponse("7", &discoveryv3.Resource{Name: "mine", Version: "v7", Resource: &anypb.Any{TypeUrl: "x/another"}}), nack("7", `"mine" is a x/another, not a `+ownType)},
		{&deltaResponse{TypeUrl: ownType, Nonce: "8", RemovedResources: []string{"mine"}}, nack("8", `["mine"] cannot be taken away: the last that was sent stays in force`)},
		{ownResponse("9", ownResource("mine", "v9", "second")), ack("9")},
		{ownResponse("10", ownResource("mine", "v10", "bad")), nack("10", "bad bytes")},
	} {
		send(t, up, step.send)
		wantRequest(t, up, step.want)
	}
	if want := []string{"first", "second"}; !slices.Equal(got.values, want) {
		t.Errorf("applied %q, want %q", got.values, want)
	}
	// None of it reached Envoy: what it gets first is its own.
	send(t, up, &deltaResponse{TypeUrl: TypeListener, Nonce: "11"})
	if r, err := down.Recv(); err != nil || r.Nonce != "11" {
		t.Errorf("envoy got %v, %v", r, err)
	}
	// The next stream says what is held: the last that was applied.
	b.plane.end <- nil
	b.connect()
	subscribed(t, b.upstream(), map[string]string{"mine": "v9"})
}

func TestOwnResponseWithoutNonce(t *testing.T) {
	b, got := ownBench(t)
	down := b.connect()
	send(t, b.upstream(), ownResponse("", ownResource("mine", "v1", "first")))
	if _, err := down.Recv(); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "nonce") {
		t.Errorf("envoy's stream: %v", err)
	}
	if len(got.values) > 0 {
		t.Errorf("applied %q", got.values)
	}
}

// What a stream has received that was overtaken since would be older than what is held.
func TestOwnOfAnOvertakenStream(t *testing.T) {
	b, got := ownBench(t)
	before, now := b.relay.ledger.stream(), b.relay.ledger.stream()
	b.relay.own[ownType].begin(before)
	b.relay.own[ownType].begin(now)
	m := ownResponse("1", ownResource("mine", "v1", "first"))
	if answer := b.relay.own[ownType].take(before, response{nonce: "1"}, marshal(t, m)); answer != nil || len(got.values) > 0 {
		t.Errorf("answered with %x, applied %q", answer, got.values)
	}
	if answer := b.relay.own[ownType].take(now, response{nonce: "1"}, marshal(t, m)); answer == nil || len(got.values) != 1 {
		t.Errorf("the stream that counts: answered with %x, applied %q", answer, got.values)
	}
}

// Several types: each is subscribed to, answered and refused by itself.
func TestOwnResourcesOfSeveralTypes(t *testing.T) {
	b, got := newBench(t), map[string]*applied{"x/a": {}, "x/b": {}}
	for _, url := range []string{"x/b", "x/a"} {
		b.relay.Subscribe(Own{TypeURL: url, Name: "mine", Apply: got[url].Apply})
	}
	close(b.ready)
	b.connect()
	up := b.upstream()
	wantRequest(t, up, &deltaRequest{TypeUrl: TypeListener, ResourceNamesSubscribe: []string{"*"}})
	for _, url := range []string{"x/a", "x/b"} {
		wantRequest(t, up, &deltaRequest{TypeUrl: url, ResourceNamesSubscribe: []string{"mine"}})
	}
	of := func(url, nonce, value string) *deltaResponse {
		return &deltaResponse{TypeUrl: url, Nonce: nonce, Resources: []*discoveryv3.Resource{
			{Name: "mine", Version: "v" + nonce, Resource: &anypb.Any{TypeUrl: url, Value: []byte(value)}}}}
	}
	send(t, up, of("x/b", "1", "for b"))
	wantRequest(t, up, &deltaRequest{TypeUrl: "x/b", ResponseNonce: "1"})
	send(t, up, of("x/a", "2", "bad"))
	refusal := nack("2", "bad bytes")
	refusal.TypeUrl = "x/a"
	wantRequest(t, up, refusal)
	send(t, up, of("x/a", "3", "for a"))
	wantRequest(t, up, &deltaRequest{TypeUrl: "x/a", ResponseNonce: "3"})
	for url, want := range map[string]string{"x/a": "for a", "x/b": "for b"} {
		if !slices.Equal(got[url].values, []string{want}) {
			t.Errorf("%s applied %q", url, got[url].values)
		}
	}
}
