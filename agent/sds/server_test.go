package sds

import (
	"bytes"
	"context"
	"slices"
	"strings"
	"testing"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mantlet/mantlet/identity/ca"
)

func TestSecrets(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		a := newCA(t, ca.Config{})
		s := issue(t, a, "shop")
		b.src.set(s, a.Bundle())
		w := b.open()
		w.send(ask{names: []string{"bundle", "workload"}, typeURL: typeURL})
		got := want(t, w, s, "bundle", "workload")
		custom := got.secrets["bundle"].GetValidationContext().GetCustomValidatorConfig()
		cfg := new(tlsv3.SPIFFECertValidatorConfig)
		if err := custom.GetTypedConfig().UnmarshalTo(cfg); err != nil || custom.GetName() != "envoy.tls.cert_validator.spiffe" {
			t.Fatalf("%q, %v", custom.GetName(), err)
		}
		if n := len(cfg.GetTrustDomains()); n != 1 || cfg.GetTrustDomains()[0].GetName() != "mantlet.local" {
			t.Fatalf("%d trust domains: %v", n, cfg)
		}
		bundle, err := x509bundle.Parse(td, cfg.GetTrustDomains()[0].GetTrustBundle().GetInlineBytes())
		if err != nil || !bundle.Equal(a.Bundle()) {
			t.Errorf("another bundle: %v", err)
		}
		if text := b.log.String(); strings.Contains(text, "PRIVATE") || strings.Contains(text, "BEGIN") {
			t.Error("the log holds PEM")
		}
	})
}

// A change is pushed once; an ACK and a change of nothing bring nothing.
func TestPush(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		a := newCA(t, ca.Config{})
		first, second, third := issue(t, a, "shop"), issue(t, a, "shop"), issue(t, a, "shop")
		b.src.set(first, a.Bundle())
		w := b.open()
		names := []string{"workload"}
		w.send(ask{names: names})
		one := want(t, w, first, "workload")
		w.send(ask{names: ifWorld(b, names), nonce: one.nonce})
		b.src.set(first, a.Bundle().Clone())
		b.src.set(second, a.Bundle())
		two := want(t, w, second, "workload")
		w.send(ask{names: ifWorld(b, names), nonce: two.nonce})
		b.src.set(third, a.Bundle())
		three := want(t, w, third, "workload")
		if one.version == two.version || two.version == three.version || one.nonce == two.nonce {
			t.Errorf("versions %s, %s, %s, nonces %s, %s", one.version, two.version, three.version, one.nonce, two.nonce)
		}
		// The version is made of the content: another stream gets the same.
		x := b.open()
		x.send(ask{names: names})
		if again := want(t, x, third, "workload"); again.version != three.version {
			t.Errorf("version %s and %s of the same content", three.version, again.version)
		}
	})
}

// ifWorld gives the names that a state-of-the-world client repeats in each request.
func ifWorld(b *bench, names []string) []string {
	if b.variant == "delta" {
		return nil
	}
	return names
}

func TestRootsChange(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		a, next := newCA(t, ca.Config{}), newCA(t, ca.Config{})
		s := issue(t, a, "shop")
		b.src.set(s, a.Bundle())
		w := b.open()
		w.send(ask{names: []string{"workload", "bundle"}})
		want(t, w, s, "bundle", "workload")
		bundle := a.Bundle()
		bundle.AddX509Authority(next.Bundle().X509Authorities()[0])
		b.src.set(s, bundle)
		if b.variant == "delta" {
			want(t, w, s, "bundle") // only what changed
		} else {
			want(t, w, s, "bundle", "workload")
		}
	})
}

func TestNACKIsLoggedAndNotAnsweredWithTheSame(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		a := newCA(t, ca.Config{})
		first, second := issue(t, a, "shop"), issue(t, a, "shop")
		b.src.set(first, a.Bundle())
		w := b.open()
		w.send(ask{names: []string{"workload"}})
		one := want(t, w, first, "workload")
		w.send(ask{names: ifWorld(b, []string{"workload"}), nonce: one.nonce, nack: "bad key"})
		// The answer to the next request proves that the NACK was read, and that nothing was sent in between.
		w.send(ask{names: append([]string{"bundle"}, ifWorld(b, []string{"workload"})...)})
		if b.variant == "delta" {
			want(t, w, first, "bundle")
		} else {
			want(t, w, first, "bundle", "workload")
		}
		text := b.log.String()
		if !strings.Contains(text, "bad key") || !strings.Contains(text, "map[workload:") {
			t.Errorf("log: %s", text)
		}
		b.src.set(second, a.Bundle())
		if b.variant == "delta" {
			want(t, w, second, "workload")
		} else {
			want(t, w, second, "bundle", "workload")
		}
	})
}

func TestNothingBeforeTheFirstSVID(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		a := newCA(t, ca.Config{})
		s := issue(t, a, "shop")
		w := b.open()
		w.send(ask{names: []string{"bundle", "workload"}})
		b.src.set(nil, a.Bundle())
		b.src.set(s, a.Bundle())
		want(t, w, s, "bundle", "workload")
	})
}

// What is not valid at this moment is handed to nobody.
func TestNoSecretsFromWhatIsNotValid(t *testing.T) {
	a, old := newCA(t, ca.Config{}), newCA(t, ca.Config{Now: past})
	s := issue(t, a, "shop")
	for _, tc := range []struct {
		name   string
		svid   *x509svid.SVID
		bundle *x509bundle.Bundle
	}{
		{"none", nil, a.Bundle()},
		{"expired", issue(t, old, "shop"), old.Bundle()},
		{"no certificate", &x509svid.SVID{ID: s.ID, PrivateKey: s.PrivateKey}, a.Bundle()},
		{"no key", &x509svid.SVID{ID: s.ID, Certificates: s.Certificates}, a.Bundle()},
		{"no roots", s, x509bundle.New(td)},
		{"roots of another trust domain", s, x509bundle.New(spiffeid.RequireTrustDomainFromString("other"))},
	} {
		src := newSource()
		src.set(tc.svid, tc.bundle)
		if _, have, err := offer(src, nil, 0); err == nil || len(have) != 0 {
			t.Errorf("%s: %d secrets, %v", tc.name, len(have), err)
		}
	}
}

func TestUnknownNames(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		a := newCA(t, ca.Config{})
		s := issue(t, a, "shop")
		w := b.open()
		w.send(ask{names: []string{"default"}})
		if b.variant == "delta" {
			got := want(t, w, nil) // at once, though there is no SVID
			if !slices.Equal(got.removed, []string{"default"}) {
				t.Errorf("removed %q", got.removed)
			}
		}
		b.src.set(s, a.Bundle())
		w.send(ask{names: []string{"default", "workload"}})
		got := want(t, w, s, "workload")
		if b.variant == "delta" && !slices.Equal(got.removed, []string{"default"}) || b.variant != "delta" && got.removed != nil {
			t.Errorf("removed %q", got.removed)
		}
		if text := b.log.String(); !strings.Contains(text, "does not exist") || !strings.Contains(text, "secret=default") {
			t.Errorf("log: %s", text)
		}
	})
}

func TestUnsubscribe(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		a := newCA(t, ca.Config{})
		first, second := issue(t, a, "shop"), issue(t, a, "shop")
		b.src.set(first, a.Bundle())
		w := b.open()
		w.send(ask{names: []string{"bundle", "workload"}})
		one := want(t, w, first, "bundle", "workload")
		w.send(ask{names: ifWorld(b, []string{"bundle"}), unsubscribe: []string{"workload"}, nonce: one.nonce})
		// Back again: answered again, though nothing changed in between, and with nothing in between.
		w.send(ask{names: []string{"workload"}, unsubscribe: []string{"bundle"}, nonce: one.nonce})
		want(t, w, first, "workload")
		b.src.set(second, a.Bundle())
		want(t, w, second, "workload")
	})
}

func TestWorldIgnoresOvertakenAnswers(t *testing.T) {
	b := newBench(t, "world")
	a := newCA(t, ca.Config{})
	first, second := issue(t, a, "shop"), issue(t, a, "shop")
	b.src.set(first, a.Bundle())
	w := b.open()
	w.send(ask{names: []string{"workload"}})
	one := want(t, w, first, "workload")
	b.src.set(second, a.Bundle())
	two := want(t, w, second, "workload")
	w.send(ask{names: []string{"bundle"}, nonce: one.nonce, nack: "overtaken"})
	w.send(ask{names: []string{"workload", "bundle"}, nonce: two.nonce})
	want(t, w, second, "bundle", "workload") // and nothing for the first of the two requests
	if strings.Contains(b.log.String(), "overtaken") {
		t.Error("an overtaken answer is taken for one to the current response")
	}
}

func TestDeltaKnowsWhatEnvoyHas(t *testing.T) {
	b := newBench(t, "delta")
	a := newCA(t, ca.Config{})
	first, second := issue(t, a, "shop"), issue(t, a, "shop")
	b.src.set(first, a.Bundle())
	w := b.open()
	w.send(ask{names: []string{"workload"}})
	version := want(t, w, first, "workload").version
	again := b.open() // after a reconnect
	again.send(ask{names: []string{"workload", "bundle"}, have: map[string]string{"workload": version, "other": "x"}})
	want(t, again, first, "bundle")
	b.src.set(second, a.Bundle())
	want(t, again, second, "workload")
	// Who asks for it by name again gets it again.
	again.send(ask{names: []string{"workload"}})
	want(t, again, second, "workload")
}

func TestEmptySubscriptionIsNothing(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		a := newCA(t, ca.Config{})
		s := issue(t, a, "shop")
		b.src.set(s, a.Bundle())
		w := b.open()
		w.send(ask{}) // a wildcard elsewhere in xDS; here it would be a way to every key
		w.send(ask{names: []string{"bundle"}})
		want(t, w, s, "bundle")
	})
}

func TestOtherTypeIsRefused(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		w := b.open()
		w.send(ask{typeURL: "type.googleapis.com/envoy.config.cluster.v3.Cluster", names: []string{"workload"}})
		if _, err := w.next(); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%v", err)
		}
	})
}

func TestFetchIsUnimplemented(t *testing.T) {
	b := newBench(t, "world")
	if _, err := b.client.FetchSecrets(context.Background(), &discoveryv3.DiscoveryRequest{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("%v", err)
	}
}

func TestCloseEndsStreams(t *testing.T) {
	both(t, func(t *testing.T, b *bench) {
		a := newCA(t, ca.Config{})
		s := issue(t, a, "shop")
		b.src.set(s, a.Bundle())
		w := b.open()
		w.send(ask{names: []string{"workload"}})
		want(t, w, s, "workload")
		b.server.Close()
		if _, err := w.next(); status.Code(err) != codes.Unavailable {
			t.Errorf("%v", err)
		}
		late := b.open()
		if _, err := late.next(); status.Code(err) != codes.Unavailable {
			t.Errorf("a stream that comes later: %v", err)
		}
	})
}

func TestSameContentSameBytes(t *testing.T) {
	a := newCA(t, ca.Config{})
	src := newSource()
	src.set(issue(t, a, "shop"), a.Bundle())
	_, one, err := offer(src, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, two, err := offer(src, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	for name := range one {
		if one[name].version != two[name].version || !bytes.Equal(one[name].body.GetValue(), two[name].body.GetValue()) {
			t.Errorf("%s differs", name)
		}
	}
}
