package svid

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/goleak"

	"github.com/mantlet/mantlet/identity/ca"
)

var _ Source = (*Builtin)(nil)

func TestFirstSVID(t *testing.T) {
	bubble(t, func(t *testing.T, p *plane) {
		defer p.up(p.server(p.ca), p.ca)()
		b, stop := p.run(p.config())
		defer stop()
		updated := b.Updated()
		<-b.Ready()
		s, err := b.GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		want, _ := shopID(pod)
		id, _, err := x509svid.Verify(s.Certificates, b)
		if err != nil || id != want || s.ID != want {
			t.Errorf("%s, %s, %v; want %s", id, s.ID, err, want)
		}
		if !s.PrivateKey.Public().(*ecdsa.PublicKey).Equal(s.Certificates[0].PublicKey) {
			t.Error("the key is not that of the certificate")
		}
		if !closed(updated) || closed(b.Updated()) {
			t.Error("Updated was not closed once")
		}
		if _, err := b.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString("other")); err == nil {
			t.Error("a bundle of another trust domain")
		}
		if strings.Contains(p.log.String(), "PRIVATE") {
			t.Error("the log holds a key")
		}
	})
}

func TestNoSVIDBeforeTheFirst(t *testing.T) {
	p := newPlane(t)
	b, err := NewBuiltin(p.config())
	if err != nil {
		t.Fatal(err)
	}
	if s, err := b.GetX509SVID(); err == nil || s != nil {
		t.Errorf("%v, %v", s, err)
	}
	if bundle, err := b.GetX509BundleForTrustDomain(td); err != nil || !bundle.Equal(p.ca.Bundle()) {
		t.Errorf("%v, %v", bundle, err)
	}
}

func TestRenewalAtHalfLife(t *testing.T) {
	bubble(t, func(t *testing.T, p *plane) {
		defer p.up(p.server(p.ca), p.ca)()
		b, stop := p.run(p.config())
		defer stop()
		<-b.Ready()
		waits := map[time.Duration]bool{}
		for range 8 {
			old, err := b.GetX509SVID()
			if err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			<-b.Updated()
			wait := time.Since(start)
			waits[wait] = true
			if wait < 27*time.Minute || wait > 33*time.Minute {
				t.Errorf("renewed after %s", wait)
			}
			s, err := b.GetX509SVID()
			if err != nil {
				t.Fatal(err)
			}
			if s.PrivateKey.(*ecdsa.PrivateKey).Equal(old.PrivateKey) {
				t.Error("the old key is used again")
			}
		}
		if len(waits) < 2 {
			t.Error("no jitter")
		}
		if n := p.tokens.Load(); n != 9 {
			t.Errorf("the token was read %d times for 9 certificates", n)
		}
	})
}

func TestMaxAge(t *testing.T) {
	bubble(t, func(t *testing.T, p *plane) {
		defer p.up(p.server(p.ca), p.ca)()
		cfg := p.config()
		cfg.MaxAge = 10 * time.Minute
		b, stop := p.run(cfg)
		defer stop()
		<-b.Ready()
		start := time.Now()
		<-b.Updated()
		if wait := time.Since(start); wait < 9*time.Minute || wait > 11*time.Minute {
			t.Errorf("renewed after %s", wait)
		}
	})
}

func TestRenewOnDemand(t *testing.T) {
	bubble(t, func(t *testing.T, p *plane) {
		defer p.up(p.server(p.ca), p.ca)()
		b, stop := p.run(p.config())
		defer stop()
		<-b.Ready()
		start := time.Now()
		updated := b.Updated()
		b.Renew()
		b.Renew() // does not block
		<-updated
		if wait := time.Since(start); wait > time.Second {
			t.Errorf("renewed after %s", wait)
		}
	})
}

func TestRetriesBackOff(t *testing.T) {
	bubble(t, func(t *testing.T, p *plane) {
		b, stop := p.run(p.config())
		defer stop()
		<-time.After(10 * time.Minute) // of the fake clock
		synctest.Wait()
		times, d := p.dials.all(), firstRetry
		for i := 1; i < len(times); i++ {
			if gap := times[i].Sub(times[i-1]); gap < d/2 || gap > d {
				t.Errorf("attempt %d came %s after the one before, want %s to %s", i, gap, d/2, d)
			}
			d = min(2*d, lastRetry)
		}
		if len(times) < 25 {
			t.Errorf("only %d attempts in 10 minutes", len(times))
		}
		if closed(b.Ready()) {
			t.Error("ready without a control plane")
		}
		if !strings.Contains(p.log.String(), "connection refused") {
			t.Errorf("the log does not say why: %s", p.log.String())
		}
		down := p.up(p.server(p.ca), p.ca)
		<-b.Ready()
		down()
		// The next outage begins with short waits again.
		n := len(p.dials.all())
		b.Renew()
		synctest.Wait()
		<-time.After(firstRetry) // of the fake clock
		synctest.Wait()
		if len(p.dials.all()) < n+2 {
			t.Error("waits after a success as long as before it")
		}
	})
}

func TestExpiredSVIDIsNotHandedOut(t *testing.T) {
	bubble(t, func(t *testing.T, p *plane) {
		down := p.up(p.server(p.ca), p.ca)
		b, stop := p.run(p.config())
		defer stop()
		<-b.Ready()
		down()
		s, err := b.GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		updated := b.Updated()
		<-time.After(time.Until(s.Certificates[0].NotAfter) - time.Second) // of the fake clock
		synctest.Wait()
		if _, err := b.GetX509SVID(); err != nil || closed(updated) {
			t.Errorf("not handed out while it is valid: %v", err)
		}
		<-time.After(2 * time.Second) // of the fake clock
		synctest.Wait()
		if s, err := b.GetX509SVID(); err == nil {
			t.Errorf("handed out %s after it expired", time.Since(s.Certificates[0].NotAfter))
		}
		if !closed(updated) {
			t.Error("expiry is not announced")
		}
		if !strings.Contains(p.log.String(), "expired before it could be renewed") {
			t.Error("expiry is not logged")
		}
		updated = b.Updated()
		defer p.up(p.server(p.ca), p.ca)()
		<-updated
		if _, err := b.GetX509SVID(); err != nil {
			t.Errorf("after the outage: %v", err)
		}
	})
}

// The timer for expiry may come late; the clock decides.
func TestExpiryGoesByTheClock(t *testing.T) {
	bubble(t, func(t *testing.T, p *plane) {
		defer p.up(p.server(p.ca), p.ca)()
		b, stop := p.run(p.config())
		<-b.Ready()
		stop()                  // no timer runs any more
		<-time.After(time.Hour) // of the fake clock
		if _, err := b.GetX509SVID(); err == nil {
			t.Error("an expired SVID is handed out")
		}
	})
}

// Only spiffe://<td>/mantlet/control-plane of our own bundle is told the token.
func TestFalseControlPlane(t *testing.T) {
	for _, name := range []string{"another CA", "a workload as the server"} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, p *plane) {
				var own x509svid.Source
				signer := p.ca
				if name == "another CA" {
					signer = newCA(t)
					own = p.server(signer)
				} else {
					down := p.up(p.server(p.ca), p.ca)
					b, stop := p.run(p.config())
					<-b.Ready()
					stop()
					down()
					own = b
				}
				defer p.up(own, signer)()
				before := p.tokens.Load()
				b, stop := p.run(p.config())
				defer stop()
				<-time.After(5 * time.Minute) // of the fake clock
				synctest.Wait()
				if closed(b.Ready()) {
					t.Error("takes an SVID from it")
				}
				if n := p.tokens.Load() - before; n != 0 {
					t.Errorf("has sent it %d tokens", n)
				}
				if !strings.Contains(p.log.String(), "x509svid: could not verify") && !strings.Contains(p.log.String(), "unexpected ID") {
					t.Errorf("the log does not say why: %s", p.log.String())
				}
			})
		})
	}
}

// Whoever accepts and then says nothing costs one attempt, not the agent.
func TestSilentControlPlane(t *testing.T) {
	bubble(t, func(t *testing.T, p *plane) {
		cfg, first := p.config(), true
		var silent net.Conn
		cfg.DialContext = func(ctx context.Context, addr string) (net.Conn, error) {
			if first {
				first = false
				near, far := net.Pipe()
				silent = far
				return near, nil
			}
			return p.dial(ctx, addr)
		}
		defer p.up(p.server(p.ca), p.ca)()
		start := time.Now()
		b, stop := p.run(cfg)
		defer stop()
		<-b.Ready()
		if wait := time.Since(start); wait > attemptTimeout+firstRetry {
			t.Errorf("ready after %s", wait)
		}
		_ = silent.Close()
	})
}

func TestRootRotation(t *testing.T) {
	bubble(t, func(t *testing.T, p *plane) {
		next := newCA(t)
		old, err := p.ca.Material()
		if err != nil {
			t.Fatal(err)
		}
		fresh, err := next.Material()
		if err != nil {
			t.Fatal(err)
		}
		load := func(m ca.Material) *ca.CA {
			a, err := ca.Load(ca.Config{TrustDomain: td}, m)
			if err != nil {
				t.Fatal(err)
			}
			return a
		}
		both := append(append([]byte{}, old.Roots...), fresh.Roots...)
		// Both trusted, the old one signs; then the new one signs; then the old one is gone.
		steps := []*ca.CA{
			load(ca.Material{Key: old.Key, Chain: old.Chain, Roots: both}),
			load(ca.Material{Key: fresh.Key, Chain: fresh.Chain, Roots: both}),
			next,
		}
		down := p.up(p.server(steps[0]), steps[0])
		b, stop := p.run(p.config())
		defer stop()
		<-b.Ready()
		for _, a := range steps[1:] {
			down()
			down = p.up(p.server(a), a)
			updated := b.Updated()
			b.Renew()
			<-updated
		}
		down()
		bundle, err := b.GetX509BundleForTrustDomain(td)
		if err != nil || !bundle.Equal(next.Bundle()) {
			t.Errorf("the bundle still has %d roots: %v", len(bundle.X509Authorities()), err)
		}
		if s, err := b.GetX509SVID(); err != nil {
			t.Error(err)
		} else if _, _, err := x509svid.Verify(s.Certificates, next); err != nil {
			t.Error(err)
		}
	})
}

// TestRereadBundle: an agent that missed a whole rotation verifies the control plane by the bundle that was written meanwhile. While it has not been
// written, or cannot be read, the control plane stays a false one; and it brings nobody else into the bundle that peers are verified by.
func TestRereadBundle(t *testing.T) {
	bubble(t, func(t *testing.T, p *plane) {
		next := newCA(t)
		defer p.up(p.server(next), next)()
		written, unreadable := p.ca.Bundle(), errors.New("no such file")
		var mu sync.Mutex
		write := func(b *x509bundle.Bundle, err error) {
			mu.Lock()
			defer mu.Unlock()
			written, unreadable = b, err
		}
		cfg := p.config()
		cfg.Reread = func() (*x509bundle.Bundle, error) {
			mu.Lock()
			defer mu.Unlock()
			return written, unreadable
		}
		b, stop := p.run(cfg)
		defer stop()
		<-time.After(10 * time.Minute)
		write(p.ca.Bundle(), nil)
		<-time.After(10 * time.Minute)
		if closed(b.Ready()) {
			t.Fatal("a control plane whose root nobody has written is trusted")
		}
		write(next.Bundle(), nil)
		if peers, err := b.GetX509BundleForTrustDomain(td); err != nil || !peers.Equal(p.ca.Bundle()) {
			t.Errorf("peers are verified by %v, %v", peers, err)
		}
		start := time.Now()
		<-b.Ready()
		if took := time.Since(start); took > 2*lastRetry {
			t.Errorf("the new bundle is used after %s", took)
		}
		if peers, err := b.GetX509BundleForTrustDomain(td); err != nil || !peers.Equal(next.Bundle()) {
			t.Errorf("peers are verified by %v, %v", peers, err)
		}
	})
}

func TestTokenThatCannotBeRead(t *testing.T) {
	bubble(t, func(t *testing.T, p *plane) {
		defer p.up(p.server(p.ca), p.ca)()
		cfg := p.config()
		real, reads := cfg.Token, 0
		cfg.Token = func() (string, error) {
			if reads++; reads == 1 {
				return "", errors.New("no such file")
			}
			return real()
		}
		b, stop := p.run(cfg)
		defer stop()
		<-b.Ready()
		if !strings.Contains(p.log.String(), "no such file") {
			t.Errorf("the log does not say why: %s", p.log.String())
		}
	})
}

func TestRunOnce(t *testing.T) {
	bubble(t, func(t *testing.T, p *plane) {
		b, stop := p.run(p.config())
		defer stop()
		synctest.Wait()
		if err := b.Run(context.Background()); err == nil {
			t.Error("Run runs twice")
		}
	})
}

func TestConfigRefused(t *testing.T) {
	p := newPlane(t)
	other := spiffeid.RequireTrustDomainFromString("other")
	for name, edit := range map[string]func(*BuiltinConfig){
		"address":      func(c *BuiltinConfig) { c.Address = "" },
		"trust domain": func(c *BuiltinConfig) { c.TrustDomain = spiffeid.TrustDomain{} },
		"trust bundle": func(c *BuiltinConfig) { c.Bundle = nil },
		"root":         func(c *BuiltinConfig) { c.Bundle = x509bundle.New(td) },
		"other":        func(c *BuiltinConfig) { c.TrustDomain = other },
		"token":        func(c *BuiltinConfig) { c.Token = nil },
		"logger":       func(c *BuiltinConfig) { c.Log = nil },
	} {
		cfg := p.config()
		edit(&cfg)
		if _, err := NewBuiltin(cfg); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Over a real socket, by the default dialler.
func TestOverTCP(t *testing.T) {
	defer goleak.VerifyNone(t)
	p := newPlane(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer p.serve(l, p.server(p.ca), p.ca)()
	cfg := p.config()
	cfg.Address, cfg.DialContext = l.Addr().String(), nil
	b, stop := p.run(cfg)
	defer stop()
	<-b.Ready()
}
