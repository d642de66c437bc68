package cluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"sigs.k8s.io/yaml"
)

// validity is that of every certificate here: longer than any cluster lives.
const validity = 10 * 365 * 24 * time.Hour

// authority is a cluster's CA, and the directory in which its files are. Names of certificates are names of files there: NAME.crt, NAME.key,
// and of clients NAME.conf, a kubeconfig.
type authority struct {
	directory   string
	server      string // URL of the API server, for kubeconfigs
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

// subject is who a certificate is for: Kubernetes reads the common name as the user and the organization as its group.
type subject struct {
	file  string
	user  string
	group string       // empty: none
	names []string     // DNS names, for servers
	at    []netip.Addr // addresses, for servers
}

// admin may do everything: the group is bound to cluster-admin by the API server itself.
var admin = subject{file: "admin", user: "admin", group: "system:masters"}

// newAuthority makes a CA with ca.crt, and the key pair of service account tokens: sa.key and sa.pub.
func newAuthority(directory, server string) (*authority, error) {
	if err := os.MkdirAll(directory, 0o700); err != nil {
		return nil, err
	}
	a := &authority{directory: directory, server: server}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: "kubernetes"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	var err error
	if a.certificate, a.key, err = a.sign("ca", template); err != nil {
		return nil, err
	}
	tokens, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	if err := a.writeKey("sa", tokens); err != nil {
		return nil, err
	}
	public, err := x509.MarshalPKIXPublicKey(&tokens.PublicKey)
	if err != nil {
		return nil, err
	}
	return a, a.writePEM("sa.pub", "PUBLIC KEY", public)
}

// load reads the CA of a cluster that runs.
func (a *authority) load() error {
	pair, err := tls.LoadX509KeyPair(a.path("ca.crt"), a.path("ca.key"))
	if err != nil {
		return err
	}
	a.certificate, a.key = pair.Leaf, pair.PrivateKey.(*ecdsa.PrivateKey)
	return nil
}

// path is that of a file of the authority.
func (a *authority) path(file string) string { return filepath.Join(a.directory, file) }

// issue writes a certificate and its key.
func (a *authority) issue(s subject) error {
	template := &x509.Certificate{
		Subject:  pkix.Name{CommonName: s.user},
		DNSNames: s.names, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	if s.group != "" {
		template.Subject.Organization = []string{s.group}
	}
	for _, ip := range s.at {
		template.IPAddresses = append(template.IPAddresses, net.IP(ip.AsSlice()))
	}
	_, _, err := a.sign(s.file, template)
	return err
}

// sign makes a key, and a certificate for it from the template; the CA's own while there is none.
func (a *authority) sign(file string, template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	if template.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120)); err != nil {
		return nil, nil, err
	}
	template.NotBefore = time.Now().Add(-time.Minute)
	template.NotAfter = template.NotBefore.Add(validity)
	parent, signer := a.certificate, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		return nil, nil, fmt.Errorf("certificate %s: %w", file, err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, fmt.Errorf("certificate %s: %w", file, err)
	}
	if err := a.writePEM(file+".crt", "CERTIFICATE", der); err != nil {
		return nil, nil, err
	}
	return certificate, key, a.writeKey(file, key)
}

func (a *authority) writeKey(file string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return a.writePEM(file+".key", "EC PRIVATE KEY", der)
}

func (a *authority) writePEM(file, kind string, der []byte) error {
	return os.WriteFile(a.path(file), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}

// client issues a certificate and writes a kubeconfig that shows it, with everything in it: the file can be taken anywhere.
func (a *authority) client(s subject) error {
	if err := a.issue(s); err != nil {
		return err
	}
	var pems [3][]byte
	for i, file := range []string{"ca.crt", s.file + ".crt", s.file + ".key"} {
		var err error
		if pems[i], err = os.ReadFile(a.path(file)); err != nil {
			return err
		}
	}
	text, err := yaml.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Config", "current-context": "cluster",
		"clusters": []any{map[string]any{"name": "cluster", "cluster": map[string]any{"server": a.server, "certificate-authority-data": pems[0]}}},
		"users":    []any{map[string]any{"name": s.file, "user": map[string]any{"client-certificate-data": pems[1], "client-key-data": pems[2]}}},
		"contexts": []any{map[string]any{"name": "cluster", "context": map[string]any{"cluster": "cluster", "user": s.file}}},
	})
	if err != nil {
		return err
	}
	return os.WriteFile(a.path(s.file+".conf"), text, 0o600)
}
