package e2e

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/netip"
	"net/url"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mantlet/mantlet/identity/ca"
	"github.com/mantlet/mantlet/sandbox"
	"github.com/mantlet/mantlet/sandbox/netns"
	"github.com/mantlet/mantlet/xds/names"
)

// TestAttacks tries what has broken sidecars before on one running cluster.
func TestAttacks(t *testing.T) {
	s := besiege(t)
	t.Run("banner", func(t *testing.T) { banners(t, s) })
	t.Run("certificates", func(t *testing.T) { certificates(t, s) })
	t.Run("members", func(t *testing.T) { members(t, s) })
	t.Run("resumption", func(t *testing.T) { resumption(t, s) })
	t.Run("like TLS", func(t *testing.T) { likeTLS(t, s) })
	t.Run("capture ports", func(t *testing.T) { capturePorts(t, s) })
	t.Run("loopback", func(t *testing.T) { loopback(t, s) })
	t.Run("own node and self", func(t *testing.T) { ownNodeAndSelf(t, s) })
	t.Run("another user", func(t *testing.T) { anotherUser(t, s) })
	t.Run("apps with TLS", func(t *testing.T) { appsWithTLS(t, s) })
}

// banners: a denied peer gets no byte and the app sees no connection, whoever speaks first and however the peer comes.
func banners(t *testing.T, s *sandbox.Sandbox) {
	eachFamily(t, pod(t, s, "shop/db"), func(t *testing.T, a netip.Addr) {
		for _, port := range []uint16{banner, echo} {
			say := ""
			if port == echo {
				say = "hello\n"
			}
			to := netip.AddrPortFrom(a, port)
			for _, name := range []string{"shop/api", "legacy/plain"} {
				wantReached(t, probe(t, pod(t, s, name), a, port), "shop/db")
			}
			unseen(t, s, a, port, func() {
				for _, name := range []string{"shop/evil", "shop/caged", "legacy/stranger", "strict/vault-a"} {
					wantNothing(t, probe(t, pod(t, s, name), a, port))
				}
				// Past their own sidecars. caged meets its own egress policy at the other end; whoever has a sidecar has no say
				// in plaintext, api included.
				for _, name := range []string{"shop/evil", "shop/caged", "strict/vault-a"} {
					if n := steal(t, pod(t, s, name), to, meshTLS(genuine(t, s.Authority(), identityOf(t, s, name))), say); n != 0 {
						t.Errorf("%s with its own SVID got %d bytes from port %d", name, n, port)
					}
				}
				for _, name := range []string{"shop/evil", "shop/caged", "shop/api", "strict/vault-a"} {
					conn, err := past(t, pod(t, s, name), to)
					if err != nil {
						continue
					}
					if n := loot(t, conn, say); n != 0 {
						t.Errorf("%s in plaintext got %d bytes from port %d", name, n, port)
					}
				}
			})
			// That way the allowed identity gets through: nothing but the identity was in the others' way.
			if port == banner && peek(t, pod(t, s, "shop/evil"), to, meshTLS(genuine(t, s.Authority(), identityOf(t, s, "shop/api")))) == 0 {
				t.Error("no banner with api's SVID")
			}
		}
	})
}

// certificates: nothing but one valid SVID of an admitted identity, shown as a sidecar shows it, opens the door.
func certificates(t *testing.T, s *sandbox.Sandbox) {
	api, evil := identityOf(t, s, "shop/api"), identityOf(t, s, "shop/evil")
	root := stolen(t, s.Authority())
	authority := func(td string) *ca.CA {
		c, err := ca.New(ca.Config{TrustDomain: spiffeid.RequireTrustDomainFromString(td)})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	inDomain := func(td string) spiffeid.ID {
		return spiffeid.RequireFromPath(spiffeid.RequireTrustDomainFromString(td), api.Path())
	}
	mesh := func(c tls.Certificate) *tls.Config { return meshTLS(c) }
	evils := genuine(t, s.Authority(), evil)
	evilLeaf, err := x509.ParseCertificate(evils.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	underEvil := signer{evils.PrivateKey.(*ecdsa.PrivateKey), evilLeaf}
	selfMade := underEvil.forge(t, api, func(*x509.Certificate) {})
	selfMade.Certificate = append(selfMade.Certificate, evils.Certificate...)
	changed := func(c *tls.Config, how func(*tls.Config)) *tls.Config {
		how(c)
		return c
	}

	attacks := map[string]*tls.Config{
		"no certificate":                        meshTLS(),
		"another trust domain":                  mesh(genuine(t, authority("evil.example"), inDomain("evil.example"))),
		"another trust domain, the right root":  mesh(root.forge(t, inDomain("evil.example"), func(*x509.Certificate) {})),
		"another authority, the right identity": mesh(genuine(t, authority("mantlet.local"), api)),
		"expired": mesh(root.forge(t, api, func(c *x509.Certificate) {
			c.NotAfter = time.Now().Add(-time.Minute)
		})),
		"not valid yet": mesh(root.forge(t, api, func(c *x509.Certificate) {
			c.NotBefore = time.Now().Add(time.Hour)
			c.NotAfter = time.Now().Add(2 * time.Hour)
		})),
		"two identities, the admitted one first": mesh(root.forge(t, api, func(c *x509.Certificate) {
			c.URIs = append(c.URIs, evil.URL())
		})),
		"two identities, the admitted one last": mesh(root.forge(t, api, func(c *x509.Certificate) {
			c.URIs = []*url.URL{evil.URL(), api.URL()}
		})),
		"no identity": mesh(root.forge(t, api, func(c *x509.Certificate) {
			c.URIs, c.DNSNames = nil, []string{"api.shop.svc"}
		})),
		"the identity as a DNS name": mesh(root.forge(t, evil, func(c *x509.Certificate) {
			c.DNSNames = []string{api.String()}
		})),
		"the identity with more behind it": mesh(root.forge(t, api, func(c *x509.Certificate) {
			c.URIs = []*url.URL{{Scheme: "spiffe", Host: api.TrustDomain().Name(), Path: api.Path() + "0"}}
		})),
		"the identity with more segments": mesh(root.forge(t, api, func(c *x509.Certificate) {
			c.URIs = []*url.URL{{Scheme: "spiffe", Host: api.TrustDomain().Name(), Path: api.Path() + "/x"}}
		})),
		"the identity with a query": mesh(root.forge(t, api, func(c *x509.Certificate) {
			c.URIs[0].RawQuery = "x"
		})),
		"signed with a workload's own key": mesh(selfMade),
		"an authority's certificate": mesh(root.forge(t, api, func(c *x509.Certificate) {
			c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign|x509.KeyUsageDigitalSignature
		})),
		"TLS 1.2 at most": changed(mesh(genuine(t, s.Authority(), api)), func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }),
		"our ALPN among others": changed(mesh(genuine(t, s.Authority(), api)), func(c *tls.Config) {
			c.NextProtos = []string{"h2", names.ALPN}
		}),
		"no ALPN":               changed(mesh(genuine(t, s.Authority(), api)), func(c *tls.Config) { c.NextProtos = nil }),
		"an app's ALPN":         changed(mesh(genuine(t, s.Authority(), api)), func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} }),
		"another's name as SNI": changed(mesh(genuine(t, s.Authority(), evil)), func(c *tls.Config) { c.ServerName = "api.shop.svc.cluster.local" }),
	}
	eachFamily(t, pod(t, s, "shop/db"), func(t *testing.T, a netip.Addr) {
		unspoilt := mesh(root.forge(t, api, func(*x509.Certificate) {}))
		if n := peek(t, pod(t, s, "shop/evil"), netip.AddrPortFrom(a, banner), unspoilt); n == 0 {
			t.Error("what is spoilt below is no good to begin with")
		}
		for name, c := range attacks {
			t.Run(name, func(t *testing.T) {
				unseen(t, s, a, banner, func() {
					if n := steal(t, pod(t, s, "shop/evil"), netip.AddrPortFrom(a, banner), c, ""); n != 0 {
						t.Errorf("got %d bytes", n)
					}
				})
			})
		}
	})
}

// members: a strict workload that no policy isolates admits whoever proves who they are, and nobody else.
func members(t *testing.T, s *sandbox.Sandbox) {
	id, root := identityOf(t, s, "shop/evil"), stolen(t, s.Authority())
	other, err := ca.New(ca.Config{TrustDomain: trustDomain})
	if err != nil {
		t.Fatal(err)
	}
	club := pod(t, s, "members/club")
	eachFamily(t, club, func(t *testing.T, a netip.Addr) {
		to := netip.AddrPortFrom(a, echo)
		wantReached(t, probe(t, pod(t, s, "shop/evil"), a, echo), "members/club")
		before := accepted(t, club, echo)
		for name, c := range map[string]*tls.Config{
			"no certificate":    meshTLS(),
			"another authority": meshTLS(genuine(t, other, id)),
			"expired":           meshTLS(root.forge(t, id, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })),
			"no identity":       meshTLS(root.forge(t, id, func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"evil.shop.svc"} })),
			"an app's own":      meshTLS(selfSigned(t)),
		} {
			if n := steal(t, pod(t, s, "shop/evil"), to, c, "hello\n"); n != 0 {
				t.Errorf("%s: %d bytes", name, n)
			}
		}
		for _, name := range []string{"legacy/plain", "legacy/stranger"} {
			wantNothing(t, probe(t, pod(t, s, name), a, echo))
		}
		if conn, err := past(t, pod(t, s, "shop/evil"), to); err == nil {
			if n := loot(t, conn, "hello\n"); n != 0 {
				t.Errorf("plaintext: %d bytes", n)
			}
		}
		wantReached(t, probe(t, pod(t, s, "shop/evil"), a, echo), "members/club")
		if got := accepted(t, club, echo); got != before+1 {
			t.Errorf("the app accepted %d connections during the attack", got-before-1)
		}
	})
}

// resumption: a resumed session speaks for who began it, and is judged like any other; a ticket is of no use at another sidecar.
func resumption(t *testing.T, s *sandbox.Sandbox) {
	evil := pod(t, s, "shop/evil")
	eachFamily(t, pod(t, s, "shop/db"), func(t *testing.T, a netip.Addr) {
		to := netip.AddrPortFrom(a, banner)
		as := func(name string) *tls.Config {
			c := meshTLS(genuine(t, s.Authority(), identityOf(t, s, name)))
			c.ClientSessionCache, c.ServerName = tls.NewLRUClientSessionCache(8), "db"
			return c
		}
		api, denied := as("shop/api"), as("shop/evil")
		for _, again := range []bool{false, true} {
			if resumed, n := session(t, evil, to, api); resumed != again || n == 0 {
				t.Errorf("an admitted peer: resumed %t, want %t; %d bytes", resumed, again, n)
			}
			unseen(t, s, a, banner, func() {
				if resumed, n := session(t, evil, to, denied); resumed != again || n != 0 {
					t.Errorf("a denied peer: resumed %t, want %t; %d bytes", resumed, again, n)
				}
			})
		}
		bystander := netip.AddrPortFrom(family(pod(t, s, "shop/caged"), a), echo)
		if resumed, _ := session(t, evil, bystander, api); resumed {
			t.Error("a ticket of db is taken by the sidecar of caged")
		}
	})
}

// session begins a session past the sidecar of a pod, or resumes one of the configuration's cache, and reads what comes first.
func session(t *testing.T, from *netns.Pod, to netip.AddrPort, c *tls.Config) (resumed bool, bytes int) {
	t.Helper()
	raw, err := past(t, from, to)
	if err != nil {
		t.Fatal(err)
	}
	conn := tls.Client(raw, c)
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if err := conn.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	if to.Port() != banner {
		_, _ = io.WriteString(conn, "hello\n") // the app waits for it
	}
	bytes, err = conn.Read(make([]byte, 4096))
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s: left open", to)
	}
	return conn.ConnectionState().DidResume, bytes
}

// family is the address of a pod in the family of another one.
func family(p *netns.Pod, like netip.Addr) netip.Addr {
	for _, a := range p.Spec().IPs {
		if a.Is4() == like.Is4() {
			return a
		}
	}
	return netip.Addr{}
}

// likeTLS: what the capture cannot make sense of counts as plaintext, and plaintext of a pod with a sidecar is refused.
func likeTLS(t *testing.T, s *sandbox.Sandbox) {
	hello := clientHello(t)
	says := map[string]string{
		"a record's first bytes":    "\x16\x03\x01",
		"a record that never ends":  "\x16\x03\x01\x3f\xff\x01",
		"half a ClientHello":        hello[:len(hello)/2],
		"a whole one and no more":   hello,
		"another version's record":  "\x16\x03\x00\x00\x02\x01\x00",
		"an old client's greeting":  "\x80\x2e\x01\x00\x02",
		"an empty record":           "\x16\x03\x01\x00\x00",
		"an alert":                  "\x15\x03\x03\x00\x02\x02\x00",
		"a protocol that we do not": "PROXY TCP4 10.64.0.1 10.64.0.1 1 8080\r\nhello\n",
		"the other version of it":   "\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\x0a\x40\x00\x01\x0a\x40\x00\x01\x00\x01\x1f\x90hello\n",
	}
	addrs := pod(t, s, "shop/db").Spec().IPs
	unseen(t, s, addrs[0], banner, func() {
		unseen(t, s, addrs[1], echo, func() {
			var attacks sync.WaitGroup // all at once: some wait for the sidecar's patience to end
			for name, say := range says {
				for _, a := range addrs {
					for _, port := range []uint16{banner, echo} {
						attacks.Go(func() { babble(t, pod(t, s, "shop/evil"), netip.AddrPortFrom(a, port), name, say) })
					}
				}
			}
			attacks.Wait()
		})
	})
}

// babble says something to a port and wants nothing of the app's for it, and an end.
func babble(t *testing.T, from *netns.Pod, to netip.AddrPort, name, say string) {
	t.Helper()
	conn, err := past(t, from, to)
	if err != nil {
		return
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	_, _ = io.WriteString(conn, say)
	answer, err := io.ReadAll(conn)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s: %s left the connection open", name, to)
	}
	if bytes.Contains(answer, []byte("shop/db")) {
		t.Errorf("%s: the app at %s answered %q", name, to, answer)
	}
}

// clientHello is how a sidecar's connection begins.
func clientHello(t *testing.T) string {
	t.Helper()
	here, there := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = tls.Client(here, meshTLS()).HandshakeContext(t.Context())
	}()
	buffer := make([]byte, 16<<10)
	n, err := there.Read(buffer)
	there.Close()
	<-done
	if err != nil {
		t.Fatal(err)
	}
	return string(buffer[:n])
}
