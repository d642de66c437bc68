package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/mantlet/mantlet/agent/verdicts"
	"github.com/mantlet/mantlet/identity/attest"
	"github.com/mantlet/mantlet/verdict"
)

// signer is a source of SVIDs and of the verdicts that go with them, as the test says.
type signer struct {
	mu       sync.Mutex
	subject  spiffeid.ID // of the verdicts
	signs    spiffeid.ID // what a renewal brings
	has      spiffeid.ID
	renewals []time.Time
	changed  chan struct{}
}

func (s *signer) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *signer) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

func (s *signer) Updated() <-chan struct{} { return s.Changed() }

func (s *signer) Current() *verdicts.Current {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &verdicts.Current{Verdicts: &verdict.Verdicts{Subject: s.subject}}
}

func (s *signer) GetX509SVID() (*x509svid.SVID, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.has.IsZero() {
		return nil, errors.New("none")
	}
	return &x509svid.SVID{ID: s.has, Certificates: []*x509.Certificate{{}}}, nil
}

func (s *signer) Renew() {
	s.set(func() {
		s.renewals = append(s.renewals, time.Now())
		s.has = s.signs
	})
}

func missing(o *ownIdentity) string {
	why, _ := o.missing()
	return why
}

// TestFollow: verdicts of another subject have the certificate renewed at once, and while the old identity comes back again, with pauses that
// grow.
func TestFollow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := spiffeid.RequireFromString("spiffe://td.example/a"), spiffeid.RequireFromString("spiffe://td.example/b")
		s := &signer{subject: a, signs: a, has: a, changed: make(chan struct{})}
		held := a
		o := &ownIdentity{verdicts: s, source: s, held: func() (spiffeid.ID, <-chan struct{}) { return held, nil }, log: slog.New(slog.DiscardHandler)}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); o.follow(ctx) }()
		synctest.Wait()
		if len(s.renewals) > 0 || missing(o) != "" {
			t.Fatalf("nothing has changed: %v, %q", s.renewals, missing(o))
		}
		began := time.Now()
		s.set(func() { s.subject = b }) // and who signs does not know yet
		<-time.After(time.Second)
		synctest.Wait()
		if n := len(s.renewals); n < 3 || n > 5 || !s.renewals[0].Equal(began) {
			t.Errorf("in the first second renewed %d times: %v", n, s.renewals)
		}
		s.set(func() { s.signs = b })
		<-time.After(lastAgain)
		synctest.Wait()
		if s.has != b {
			t.Fatal("it has not got there")
		}
		if got := missing(o); !strings.Contains(got, "/b now") {
			t.Errorf("envoy still shows the old one: %q", got)
		}
		held = b
		if got := missing(o); got != "" {
			t.Errorf("missing %q", got)
		}
		n := len(s.renewals)
		<-time.After(time.Hour)
		synctest.Wait()
		if len(s.renewals) != n {
			t.Errorf("renewed %d times more for no reason", len(s.renewals)-n)
		}
		cancel()
		<-done
	})
}

// TestRelabelled: the labels of the running pod change. Its sidecar shows the new identity, and may still come to the control plane
// with it when Envoy starts anew.
func TestRelabelled(t *testing.T) {
	w := newWorld(t)
	w.app("[::]:8080")
	w.startPlane()
	w.startAgent()
	w.ready()
	shown := func() string {
		t.Helper()
		conn, err := w.peer("10.99.0.2:8080")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if got := greeted(t, conn); got != "hello\n" {
			t.Fatalf("the app says %q", got)
		}
		return conn.(*tls.Conn).ConnectionState().PeerCertificates[0].URIs[0].String()
	}
	was := shown()
	db := objects(8080).Pods[0].DeepCopy()
	db.Labels["version"] = "2"
	if err := w.cp.Apply(db); err != nil {
		t.Fatal(err)
	}
	want, err := w.cp.Identity(attest.Pod{Namespace: "shop", Name: "db", UID: "uid-db"})
	if err != nil {
		t.Fatal(err)
	}
	w.log.await(t, "the renewal", func(s string) bool { return strings.Contains(s, "another identity now") })
	if err := Ready(t.Context(), w.cfg.RunDir, patience); err != nil {
		t.Fatal(err)
	}
	if is := shown(); is != want.String() || is == was {
		t.Errorf("shows %s, was %s, is to be %s", is, was, want)
	}
	killEnvoy(t, w)
	w.log.await(t, "death", func(s string) bool { return strings.Contains(s, "signal: killed") })
	if err := Ready(t.Context(), w.cfg.RunDir, patience); err != nil {
		t.Fatal(err)
	}
	if is := shown(); is != want.String() {
		t.Errorf("after Envoy's return it shows %s", is)
	}
}

// TestRefused: who is refused renews at once, and again with pauses that grow, whatever the reason; a long time later at once again.
func TestRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &signer{changed: make(chan struct{})}
		o := &ownIdentity{source: s, log: slog.New(slog.DiscardHandler)}
		began := time.Now()
		for time.Since(began) < 10*time.Minute { // as the relay tries
			o.refused()
			<-time.After(time.Second)
		}
		if n := len(s.renewals); n < 17 || n > 20 || !s.renewals[0].Equal(began) {
			t.Errorf("%d renewals in 10 minutes: %v", n, s.renewals)
		}
		<-time.After(time.Hour)
		o.refused()
		<-time.After(firstAgain)
		o.refused()
		if n := len(s.renewals); s.renewals[n-1].Sub(s.renewals[n-2]) != firstAgain {
			t.Errorf("the next occasion begins with the pauses of the last: %v", s.renewals[n-2:])
		}
	})
}
