package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	_ "embed"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"text/template"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/identity/ca"
	"github.com/mantlet/mantlet/sandbox/netns"
	"github.com/mantlet/mantlet/xds/names"
)

//go:embed pair.yaml.tmpl
var pairText string

var pairTemplate = template.Must(template.New("pair").Parse(pairText))

// end is one end of a pair of Envoys that are not Mantlet's.
type end struct {
	Name       string
	Server     bool
	Admin      string // path of its admin socket
	Principals []string
	TLS        *endTLS // nil: plaintext
}

// endTLS is the files with which an end proves itself, and whom it expects.
type endTLS struct {
	Chain, Key, Bundle, TrustDomain string
	Peer                            spiffeid.ID
	Curves                          string // "": Envoy's own choice
}

// What the template needs to know of Mantlet and of the kernel.

func (end) ALPN() string      { return names.ALPN }
func (end) InboundPort() int  { return names.InboundPort }
func (end) OutboundPort() int { return names.OutboundPort }
func (end) Mark() int         { return names.ProxyMark }
func (end) SolSocket() int    { return unix.SOL_SOCKET }
func (end) SoMark() int       { return unix.SO_MARK }

// start redirects the pod's TCP as an agent does, the mark exempted, and starts the Envoy with the arguments that agents give it. It returns when
// that says that it is live.
func (e *end) start(ctx context.Context, pod *netns.Pod, envoy, dir string) (*proxy, error) {
	redirect, err := netfilter.New(netfilter.ByMark(), slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	if err := pod.Do(redirect.Apply); err != nil {
		return nil, err
	}
	e.Admin = filepath.Join(dir, "admin.sock")
	var text bytes.Buffer
	if err := pairTemplate.Execute(&text, e); err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "envoy.yaml")
	if err := os.WriteFile(file, text.Bytes(), 0o600); err != nil {
		return nil, err
	}
	var log bytes.Buffer                                           // read when the process has ended
	p, err := pod.Start(context.WithoutCancel(ctx), netns.Command{ // its pod ends it
		Path: envoy, Env: []string{}, Dir: dir, Stderr: &log, User: netns.Root,
		Args: []string{"--config-path", file, "--concurrency", "1", "--disable-hot-restart", "--drain-time-s", "1", "--log-level", "warning"},
	})
	if err != nil {
		return nil, err
	}
	out := &proxy{envoy: p.PID(), admin: e.Admin}
	for retry := time.NewTicker(10 * time.Millisecond); ; {
		text, err := out.ask(ctx, "/ready")
		if err == nil && bytes.HasPrefix(text, []byte("LIVE")) {
			retry.Stop()
			return out, nil
		}
		select {
		case <-retry.C:
		case <-p.Done():
			return nil, fmt.Errorf("the Envoy of %s ended: %w\n%s", e.Name, p.Wait(), log.String())
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("the Envoy of %s is not ready: %w", e.Name, ctx.Err()), err)
		}
	}
}

// prove writes the certificate and key of an identity.
func prove(authority *ca.CA, id, peer spiffeid.ID, dir string) (*endTLS, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, err
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, err
	}
	chain, err := authority.Sign(csr, id)
	if err != nil {
		return nil, err
	}
	bundle, err := authority.Bundle().Marshal()
	if err != nil {
		return nil, err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	t := &endTLS{Chain: filepath.Join(dir, "chain.pem"), Key: filepath.Join(dir, "key.pem"), Bundle: filepath.Join(dir, "bundle.pem"), TrustDomain: id.TrustDomain().Name(), Peer: peer}
	var public []byte
	for _, c := range chain {
		public = append(public, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return t, errors.Join(os.WriteFile(t.Chain, public, 0o600), os.WriteFile(t.Bundle, bundle, 0o600),
		os.WriteFile(t.Key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600))
}
