package sds

import (
	"crypto/tls"
	"log/slog"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/mantlet/mantlet/identity/ca"
)

// TestResumptionIsBounded: Envoy resumes sessions, and would do so for hours for a client whose certificate has expired. It ends with the period:
// with the very same certificate of the server, and also where nobody renews that any more.
func TestResumptionIsBounded(t *testing.T) {
	for name, then := range map[string]func(*mesh){
		"server's certificate stays":          func(*mesh) {},
		"server's certificate ends meanwhile": func(m *mesh) { m.src.set(nil, m.ca.Bundle()) }, // as svid.Builtin says it
	} {
		t.Run(name, func(t *testing.T) { resumptionEnds(t, then) })
	}
}

// resumptionEnds resumes a session past the expiry of the client's certificate, until it is refused. As soon as there is one, something happens.
func resumptionEnds(t *testing.T, then func(*mesh)) {
	const (
		bound = 3 * time.Second
		slack = 12 * time.Second // of a busy machine; Envoy's tickets are good for hours
	)
	m := &mesh{src: newSource(), log: &lockedBuffer{}}
	m.ca = newCA(t, ca.Config{Now: past, TTL: 3 * time.Hour})
	m.server = issue(t, m.ca, "shop")
	m.src.set(m.server, m.ca.Bundle())
	s, socket := serveBounded(t, m.src, bound, slog.New(slog.NewTextHandler(m.log, nil)))
	m.envoy = startEnvoy(t, "GRPC", socket)
	m.await("Envoy to have taken the certificate over", func() bool { id, _ := s.Held(); return id == m.server.ID })

	expires := time.Now().Add(1500 * time.Millisecond)
	cache := tls.NewLRUClientSessionCache(8)
	client := forge(t, m.ca, expires, issue(t, m.ca, "shop").ID.URL())
	if _, ok, _ := m.resume(client, cache); !ok {
		t.Fatal("a valid certificate is refused")
	}
	if resumed, ok, _ := m.resume(client, cache); !ok || !resumed {
		// A period may have ended in between; the next one has just begun then.
		if resumed, ok, _ := m.resume(client, cache); !ok || !resumed {
			t.Fatal("no session is resumed: what ends below proves nothing")
		}
	}
	then(m)
	overrun := false // a session was resumed past the certificate's expiry
	m.await("sessions to end", func() bool {
		began := time.Now()
		resumed, ok, serial := m.resume(client, cache)
		if serial != "" && serial != m.server.Certificates[0].SerialNumber.Text(16) {
			t.Fatalf("the server shows another certificate: %s", serial)
		}
		if ok && began.After(expires.Add(bound+slack)) {
			t.Fatalf("a session is resumed %s after the certificate's expiry: the bound is %s", began.Sub(expires).Round(time.Millisecond), bound)
		}
		if ok && began.After(expires.Add(100*time.Millisecond)) {
			if !resumed {
				t.Fatal("an expired certificate is accepted")
			}
			overrun = true
		}
		return !ok
	})
	t.Logf("refused %s after expiry; resumed past expiry: %t", time.Since(expires).Round(time.Millisecond), overrun)
	if time.Now().Before(expires) {
		t.Error("refused before the certificate had expired")
	}
	if _, ok, _ := m.resume(client, cache); ok {
		t.Error("accepted again")
	}
}

// resume dials with a cache of sessions. serial is of the server's certificate.
func (m *mesh) resume(svid *x509svid.SVID, cache tls.ClientSessionCache) (resumed, ok bool, serial string) {
	cfg := tlsconfig.MTLSClientConfig(svid, anyBundle{m.src}, tlsconfig.AuthorizeID(m.server.ID))
	cfg.ClientSessionCache = cache
	conn, err := tls.Dial("tcp", m.addr, cfg)
	if err != nil {
		return false, false, ""
	}
	defer func() { _ = conn.Close() }()
	st := conn.ConnectionState()
	return st.DidResume, echo(conn) == nil, st.PeerCertificates[0].SerialNumber.Text(16)
}
