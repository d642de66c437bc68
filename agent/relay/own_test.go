package relay

import (
	"errors"
	"log/slog"
	"slices"
	"testing"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
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
	a := new(applied)
	b := newBench(t, func(r *Relay) { r.Subscribe(Own{TypeURL: ownType, Name: "mine", Apply: a.Apply}) })
	close(b.ready)
	return b, a
}

func forOwn(nonce string, list ...*discoveryv3.Resource) *deltaResponse {
	return &deltaResponse{TypeUrl: ownType, Nonce: nonce, Resources: list}
}

func ownResource(name, version, value string) *discoveryv3.Resource {
	return &discoveryv3.Resource{Name: name, Version: version, Resource: &anypb.Any{TypeUrl: ownType, Value: []byte(value)}}
}

// subscribed receives the agent's first request, which does not wait for Envoy.
func subscribed(t *testing.T, up upstreamStream, held map[string]string) {
	t.Helper()
	wantRequest(t, up, &deltaRequest{TypeUrl: ownType, ResourceNamesSubscribe: []string{"mine"}, InitialResourceVersions: held})
}

func nack(nonce, reason string) *deltaRequest {
	return &deltaRequest{TypeUrl: ownType, ResponseNonce: nonce, ErrorDetail: &statuspb.Status{Code: int32(codes.InvalidArgument), Message: reason}}
}

func TestOwnResource(t *testing.T) {
	b, got := ownBench(t)
	up := b.upstream()
	subscribed(t, up, nil)
	ack := func(nonce string) *deltaRequest { return &deltaRequest{TypeUrl: ownType, ResponseNonce: nonce} }
	for _, step := range []struct {
		send *deltaResponse
		want *deltaRequest
	}{
		{forOwn("1", ownResource("mine", "v1", "first")), ack("1")},
		{forOwn("2"), ack("2")},
		{forOwn("3", ownResource("mine", "v3", "bad")), nack("3", "bad bytes")},
		{forOwn("4", ownResource("other", "v4", "x")), nack("4", `"other" was not subscribed to, "mine" was`)},
		{forOwn("5", ownResource("mine", "", "x")), nack("5", `"mine" has no version`)},
		{forOwn("6", ownResource("mine", "v6", "x"), ownResource("mine", "v6", "y")), nack("6", "2 resources, where one is subscribed to")},
		{forOwn("7", &discoveryv3.Resource{Name: "mine", Version: "v7", Resource: &anypb.Any{TypeUrl: "x/another"}}), nack("7", `"mine" is a x/another, not a `+ownType)},
		{&deltaResponse{TypeUrl: ownType, Nonce: "8", RemovedResources: []string{"mine"}}, nack("8", `["mine"] cannot be taken away: the last that was sent stays in force`)},
		{forOwn("9", ownResource("mine", "v9", "second")), ack("9")},
		{forOwn("10", ownResource("mine", "v10", "bad")), nack("10", "bad bytes")},
	} {
		send(t, up, step.send)
		wantRequest(t, up, step.want)
	}
	if want := []string{"first", "second"}; !slices.Equal(got.values, want) {
		t.Errorf("applied %q, want %q", got.values, want)
	}
	// None of it reaches Envoy: what it gets first is its own.
	down := b.connect()
	wantRequest(t, up, &deltaRequest{TypeUrl: TypeListener, ResourceNamesSubscribe: []string{"*"}})
	send(t, up, &deltaResponse{TypeUrl: TypeListener, Nonce: "11", RemovedResources: []string{"gate"}})
	send(t, up, &deltaResponse{TypeUrl: TypeListener, Nonce: "12", Resources: []*discoveryv3.Resource{what{TypeListener, "gate", "1"}.resource(t)}})
	if r := b.hears(down); r.TypeUrl != TypeListener || len(r.Resources) != 1 {
		t.Errorf("envoy got %v", r)
	}
	// The next stream says what is held: the last that was applied.
	b.ends(nil)
	subscribed(t, b.upstream(), map[string]string{"mine": "v9"})
}

func TestOwnResponseWithoutNonce(t *testing.T) {
	b, got := ownBench(t)
	send(t, b.upstream(), forOwn("", ownResource("mine", "v1", "first")))
	b.awaitTrouble("nonce")
	b.upstream()
	if len(got.values) > 0 {
		t.Errorf("applied %q", got.values)
	}
}

// What a stream has received that was overtaken since would be older than what is held.
func TestOwnOfAnOvertakenStream(t *testing.T) {
	got := new(applied)
	o := &own{Own: Own{TypeURL: ownType, Name: "mine", Apply: got.Apply}, logger: slog.New(slog.DiscardHandler)}
	before, now := new(planeSide), new(planeSide)
	o.begin(before)
	o.begin(now)
	r, err := parseResponse(marshal(t, forOwn("1", ownResource("mine", "v1", "first"))))
	if err != nil {
		t.Fatal(err)
	}
	if answer, ok := o.take(ownResponse{before, r}); ok || len(got.values) > 0 {
		t.Errorf("answered with %+v, applied %q", answer, got.values)
	}
	if answer, ok := o.take(ownResponse{now, r}); !ok || answer.nonce != "1" || len(got.values) != 1 {
		t.Errorf("the stream that counts: answered with %+v, applied %q", answer, got.values)
	}
}

// An Apply that takes its time holds up neither Envoy nor another Own.
func TestSlowOwn(t *testing.T) {
	release := make(chan struct{})
	b, envoy, up := startedWithSlowOwn(t, release)
	send(t, up, &deltaResponse{TypeUrl: TypeListener, Nonce: "2", RemovedResources: []string{"gate"}})
	if r := b.hears(envoy); len(r.RemovedResources) != 1 {
		t.Errorf("envoy got %v", r)
	}
	wantRequest(t, up, &deltaRequest{TypeUrl: TypeListener, ResponseNonce: "2"})
	close(release)
	wantRequest(t, up, &deltaRequest{TypeUrl: ownType, ResponseNonce: "slow"})
}

func startedWithSlowOwn(t *testing.T, release chan struct{}) (*bench, envoyStream, upstreamStream) {
	t.Helper()
	begun := make(chan struct{})
	b := newBench(t, func(r *Relay) {
		r.Subscribe(Own{TypeURL: ownType, Name: "mine", Apply: func([]byte) error { close(begun); <-release; return nil }})
	})
	close(b.ready)
	up := b.upstream()
	subscribed(t, up, nil)
	envoy := b.connect()
	wantRequest(t, up, &deltaRequest{TypeUrl: TypeListener, ResourceNamesSubscribe: []string{"*"}})
	send(t, up, &deltaResponse{TypeUrl: TypeListener, Nonce: "1", Resources: []*discoveryv3.Resource{what{TypeListener, "gate", "1"}.resource(t)}})
	b.hears(envoy)
	wantRequest(t, up, &deltaRequest{TypeUrl: TypeListener, ResponseNonce: "1"})
	send(t, up, forOwn("slow", ownResource("mine", "v1", "x")))
	<-begun
	return b, envoy, up
}

// Several types: each is subscribed to, answered and refused by itself.
func TestOwnResourcesOfSeveralTypes(t *testing.T) {
	got := map[string]*applied{"x/a": {}, "x/b": {}}
	b := newBench(t, func(r *Relay) {
		for _, url := range []string{"x/b", "x/a"} {
			r.Subscribe(Own{TypeURL: url, Name: "mine", Apply: got[url].Apply})
		}
	})
	close(b.ready)
	up := b.upstream()
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
