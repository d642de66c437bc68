package server

import (
	"bytes"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/encoding"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

func compressed(t *testing.T, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := encoding.GetCompressor("gzip").Compress(&out)
	if err != nil {
		t.Fatal(err)
	}
	for len(b) > 0 { // in pieces, as it may come
		n := min(len(b), 1000)
		if _, err := w.Write(b[:n]); err != nil {
			t.Fatal(err)
		}
		b = b[n:]
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestCompressedIsTheSame(t *testing.T) {
	random := make([]byte, 200_000) // kept by nobody: it cannot be compressed below mostKept
	r := rand.New(rand.NewPCG(1, 2))
	for i := range random {
		random[i] = byte(r.Uint32())
	}
	resource := func(value []byte) *discoveryv3.Resource {
		return &discoveryv3.Resource{Name: "gate", Version: "1", Resource: &anypb.Any{TypeUrl: ListenerType, Value: value}}
	}
	text := []byte(strings.Repeat("spiffe://a.b/ns/shop ", 200))
	for name, m := range map[string]*discoveryv3.DeltaDiscoveryResponse{
		"empty":            {},
		"nothing but":      {TypeUrl: ListenerType, Nonce: "a-1"},
		"small":            {TypeUrl: ListenerType, Nonce: "a-1", Resources: []*discoveryv3.Resource{resource([]byte("x"))}},
		"usual":            {TypeUrl: ListenerType, Nonce: "a-1", Resources: []*discoveryv3.Resource{resource(text), resource(text)}},
		"random":           {TypeUrl: ListenerType, Nonce: "a-1", Resources: []*discoveryv3.Resource{resource(random)}},
		"too much":         {TypeUrl: ListenerType, Nonce: "a-1", Resources: []*discoveryv3.Resource{resource(random), resource(random)}},
		"version first":    {SystemVersionInfo: "1", TypeUrl: ListenerType, Nonce: "a-1", Resources: []*discoveryv3.Resource{resource(text)}},
		"with removals":    {TypeUrl: ListenerType, Nonce: "a-1", Resources: []*discoveryv3.Resource{resource(text)}, RemovedResources: []string{"a", "b"}},
		"a long remainder": {TypeUrl: ListenerType, Nonce: strings.Repeat("n", 3*maxStored)},
	} {
		t.Run(name, func(t *testing.T) {
			plain, err := proto.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			for range 2 { // the second time some of it is kept
				r, err := encoding.GetCompressor("gzip").Decompress(bytes.NewReader(compressed(t, plain)))
				if err != nil {
					t.Fatal(err)
				}
				got, err := io.ReadAll(r)
				if err != nil || !bytes.Equal(got, plain) {
					t.Fatalf("%d bytes came back of %d, %v", len(got), len(plain), err)
				}
			}
		})
	}
}

func TestCompressionKeepsLittle(t *testing.T) {
	c := &compressor{Compressor: encoding.GetCompressor("gzip")}
	for i := range 3 * keptEntries {
		b := bytes.Repeat([]byte{byte(i), byte(i >> 8)}, worthwhile)
		if _, err := c.member(b); err != nil {
			t.Fatal(err)
		}
	}
	if len(c.kept) != keptEntries || len(c.oldest) != keptEntries {
		t.Errorf("%d members and %d keys are kept, want %d", len(c.kept), len(c.oldest), keptEntries)
	}
}

func TestReplicasAreCompressedOnce(t *testing.T) {
	text := []byte(strings.Repeat("spiffe://a.b/ns/shop ", 200))
	m := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: ListenerType, Resources: []*discoveryv3.Resource{{Name: "gate", Version: "1", Resource: &anypb.Any{Value: text}}}}
	c := &compressor{Compressor: encoding.GetCompressor("gzip")}
	for _, nonce := range []string{"a-1", "b-22", "c-333"} {
		m.Nonce = nonce
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		w, err := c.Compress(io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(b); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if len(c.kept) != 1 {
		t.Errorf("%d members are kept of the same resources with other nonces, want 1", len(c.kept))
	}
}
