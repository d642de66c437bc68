package sds

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/mantlet/mantlet/identity/ca"
)

// mesh is a server's Envoy with its secrets from an SDS server whose source the test sets.
type mesh struct {
	*envoy
	src    *source
	ca     *ca.CA
	server *x509svid.SVID
	log    *lockedBuffer
	close  func() // ends the SDS server's streams
}

func withEnvoy(t *testing.T, f func(t *testing.T, m *mesh)) {
	for _, apiType := range []string{"GRPC", "DELTA_GRPC"} {
		t.Run(apiType, func(t *testing.T) {
			m := &mesh{src: newSource(), log: &lockedBuffer{}}
			m.ca = newCA(t, ca.Config{Now: past, TTL: 3 * time.Hour})
			m.server = issue(t, m.ca, "shop")
			m.src.set(m.server, m.ca.Bundle())
			s, socket := serveUnix(t, m.src, slog.New(slog.NewTextHandler(m.log, nil)))
			m.close = s.Close
			m.envoy = startEnvoy(t, apiType, socket)
			f(t, m)
		})
	}
}

// dial connects to Envoy and takes one echo, so that both ends have judged the other: in TLS 1.3 the client's part of the
// handshake is over before the server has seen its certificate. svid nil: no certificate.
func (m *mesh) dial(svid *x509svid.SVID) (*tls.Conn, error) {
	cfg := tlsconfig.TLSClientConfig(anyBundle{m.src}, tlsconfig.AuthorizeID(m.server.ID))
	if svid != nil {
		cfg = tlsconfig.MTLSClientConfig(svid, anyBundle{m.src}, tlsconfig.AuthorizeID(m.server.ID))
	}
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 10 * time.Second}, "tcp", m.addr, cfg)
	if err != nil {
		return nil, err
	}
	if err := echo(conn); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return conn, nil
}

// anyBundle is the bundle that the server's source holds at the moment.
type anyBundle struct{ *source }

func echo(conn net.Conn) error {
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	if _, err := conn.Write([]byte("ping")); err != nil {
		return err
	}
	got := make([]byte, 4)
	n, err := io.ReadFull(conn, got)
	if err != nil && n > 0 {
		return errors.New("some bytes came back, then: " + err.Error())
	}
	if err == nil && string(got) != "ping" {
		return errors.New("echo of something else")
	}
	return err
}

func (m *mesh) accepted(t *testing.T, svid *x509svid.SVID) *tls.Conn {
	t.Helper()
	conn, err := m.dial(svid)
	if err != nil {
		t.Fatalf("refused: %v", err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func TestEnvoyAcceptsWorkloadsOfTheTrustDomainOnly(t *testing.T) {
	withEnvoy(t, func(t *testing.T, m *mesh) {
		other := newCA(t, ca.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("other")})
		now := time.Now()
		shop, foreign, web := m.server.ID.URL(), issue(t, other, "shop").ID.URL(), "https://mantlet.local/ns/shop"
		noSPIFFE, err := url.Parse(web)
		if err != nil {
			t.Fatal(err)
		}
		conn := m.accepted(t, issue(t, m.ca, "lab"))
		for _, tc := range []struct {
			name    string
			svid    *x509svid.SVID
			counter string
		}{
			{"another trust domain, its own CA", issue(t, other, "shop"), "fail_verify_error"},
			{"another CA, the right SAN", issue(t, newCA(t, ca.Config{}), "shop"), "fail_verify_error"},
			{"another trust domain, signed by our CA", forge(t, m.ca, now.Add(time.Hour), foreign), "fail_verify_error"},
			{"no SPIFFE ID, signed by our CA", forge(t, m.ca, now.Add(time.Hour), noSPIFFE), "fail_verify_error"},
			{"no URI at all, signed by our CA", forge(t, m.ca, now.Add(time.Hour)), "fail_verify_error"},
			{"expired, signed by our CA", forge(t, m.ca, now.Add(-time.Minute), shop), "fail_verify_error"},
			{"no certificate", nil, "fail_verify_no_cert"},
		} {
			before := m.counter("listener.tls.ssl." + tc.counter)
			got, err := m.dial(tc.svid)
			if err == nil {
				_ = got.Close()
				t.Errorf("%s: accepted", tc.name)
				continue
			}
			// Envoy must say no: a timeout, or a client that finds fault with the server, would be another story.
			var timeout net.Error
			if errors.As(err, &timeout) && timeout.Timeout() || strings.Contains(err.Error(), "x509svid") {
				t.Errorf("%s: %v", tc.name, err)
			}
			// Envoy counts after it has told the client.
			m.await(tc.name+": one more "+tc.counter, func() bool { return m.counter("listener.tls.ssl."+tc.counter) == before+1 })
		}
		// The forger's tools are good: the same way, with nothing wrong, gets in.
		m.accepted(t, forge(t, m.ca, now.Add(time.Hour), shop))
		if err := echo(conn); err != nil {
			t.Errorf("the first connection: %v", err)
		}
	})
}

func TestEnvoyTakesARenewalWithoutDroppingConnections(t *testing.T) {
	withEnvoy(t, func(t *testing.T, m *mesh) {
		client := issue(t, m.ca, "lab")
		open := m.accepted(t, client)
		for range 2 {
			next := issue(t, m.ca, "shop")
			m.src.set(next, m.ca.Bundle())
			m.await("the renewed certificate", func() bool {
				conn, err := m.dial(client)
				if err != nil {
					t.Fatalf("refused during the renewal: %v", err)
				}
				defer func() { _ = conn.Close() }()
				return conn.ConnectionState().PeerCertificates[0].Equal(next.Certificates[0])
			})
		}
		if err := echo(open); err != nil {
			t.Errorf("the connection from before the renewal: %v", err)
		}
		if open.ConnectionState().PeerCertificates[0].SerialNumber.Cmp(m.server.Certificates[0].SerialNumber) != 0 {
			t.Error("it was not from before the renewal")
		}
	})
}

func TestEnvoyFollowsTheRoots(t *testing.T) {
	withEnvoy(t, func(t *testing.T, m *mesh) {
		next := newCA(t, ca.Config{})
		oldClient, newClient := issue(t, m.ca, "lab"), issue(t, next, "lab")
		open := m.accepted(t, oldClient)
		if _, err := m.dial(newClient); err == nil {
			t.Fatal("a root that is not in the bundle yet is trusted")
		}
		both := m.ca.Bundle()
		both.AddX509Authority(next.Bundle().X509Authorities()[0])
		m.src.set(m.server, both)
		m.await("the new root to be trusted", func() bool { return m.admits(newClient) })
		m.accepted(t, oldClient)

		m.server = issue(t, next, "shop")
		m.src.set(m.server, next.Bundle())
		m.await("the old root not to be trusted any more", func() bool { return !m.admits(oldClient) && m.admits(newClient) })
		if err := echo(open); err != nil {
			t.Errorf("the open connection: %v", err)
		}
	})
}

func (m *mesh) admits(svid *x509svid.SVID) bool {
	conn, err := m.dial(svid)
	if err != nil {
		return false
	}
	_ = conn.Close()
	return true
}

// Envoy refuses a certificate whose key is another; we hear of it, and what was in force stays.
func TestEnvoyRefusesAndKeepsThePrevious(t *testing.T) {
	withEnvoy(t, func(t *testing.T, m *mesh) {
		client := issue(t, m.ca, "lab")
		bad := issue(t, m.ca, "shop")
		bad.PrivateKey = issue(t, m.ca, "shop").PrivateKey
		m.src.set(bad, m.ca.Bundle())
		m.await("the NACK in our log", func() bool {
			return strings.Contains(m.log.String(), "Envoy refused secrets")
		})
		conn := m.accepted(t, client)
		if !conn.ConnectionState().PeerCertificates[0].Equal(m.server.Certificates[0]) {
			t.Error("not the previous certificate")
		}
		good := issue(t, m.ca, "shop")
		m.src.set(good, m.ca.Bundle())
		m.await("the next good certificate", func() bool {
			conn := m.accepted(t, client)
			return conn.ConnectionState().PeerCertificates[0].Equal(good.Certificates[0])
		})
		if n := strings.Count(m.log.String(), "Envoy refused secrets"); n != 1 {
			t.Errorf("the bad certificate was refused %d times; it must be sent once", n)
		}
	})
}

// The agent may go: Envoy goes on with what it has.
func TestEnvoyOutlivesTheStream(t *testing.T) {
	withEnvoy(t, func(t *testing.T, m *mesh) {
		client := issue(t, m.ca, "lab")
		open := m.accepted(t, client)
		m.close()
		m.await("the streams to end", func() bool { return m.counter("cluster.agent.upstream_rq_active") == 0 })
		if err := echo(open); err != nil {
			t.Errorf("the open connection: %v", err)
		}
		m.accepted(t, client)
	})
}

// forge signs what our CA would not: any URIs, any end.
func forge(t *testing.T, a *ca.CA, end time.Time, uris ...*url.URL) *x509svid.SVID {
	t.Helper()
	m, err := a.Material()
	if err != nil {
		t.Fatal(err)
	}
	signer, err := tls.X509KeyPair(m.Chain, m.Key)
	if err != nil {
		t.Fatal(err)
	}
	model := issue(t, a, "shop")
	der, err := x509.CreateCertificate(nil, &x509.Certificate{
		SerialNumber:          big.NewInt(7),
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              end,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		URIs:                  uris,
	}, signer.Leaf, model.PrivateKey.Public(), signer.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &x509svid.SVID{ID: model.ID, Certificates: []*x509.Certificate{cert}, PrivateKey: model.PrivateKey}
}

var _ x509bundle.Source = anyBundle{}
