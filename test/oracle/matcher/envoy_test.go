package matcher

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	statev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	proxyprotocolv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/proxy_protocol/v3"
	listenerstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/set_filter_state/v3"
	tlsinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	directv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/direct_response/v3"
	echov3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/echo/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// The real Envoy runs with one listener per matcher, each on a unix socket. The PROXY protocol claims whatever addresses a case wants,
// and its TLVs carry what is to stand in filter state; so nothing touches the network and no privilege is needed.

const (
	tlvPeer  = 0xE0
	tlvOther = 0xE1
)

// envoyPath finds Envoy as the Makefile leaves it. A run without it proves nothing, so it fails rather than skips.
func envoyPath(t *testing.T) string {
	t.Helper()
	path := os.Getenv("MANTLET_ENVOY")
	if path == "" {
		path = filepath.Join("..", "..", "..", ".cache", "envoy", "envoy")
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("no Envoy: %v\n\thint: run make envoy, or set MANTLET_ENVOY", err)
	}
	return path
}

func listener(dir string, i int) *listenerv3.Listener {
	filter := func(m proto.Message) *listenerv3.ListenerFilter {
		return &listenerv3.ListenerFilter{Name: "x", ConfigType: &listenerv3.ListenerFilter_TypedConfig{TypedConfig: pack(m)}}
	}
	tlv := func(kind uint32, key string) *proxyprotocolv3.ProxyProtocol_Rule {
		return &proxyprotocolv3.ProxyProtocol_Rule{TlvType: kind, OnTlvPresent: &proxyprotocolv3.ProxyProtocol_KeyValuePair{Key: key}}
	}
	state := func(key string) *statev3.FilterStateValue {
		format := &corev3.SubstitutionFormatString{OmitEmptyValues: true, Format: &corev3.SubstitutionFormatString_TextFormatSource{TextFormatSource: &corev3.DataSource{
			Specifier: &corev3.DataSource_InlineString{InlineString: "%DYNAMIC_METADATA(envoy.filters.listener.proxy_protocol:" + key + ")%"}}}}
		return &statev3.FilterStateValue{Key: &statev3.FilterStateValue_ObjectKey{ObjectKey: key}, FactoryKey: "envoy.string", SkipIfEmpty: true,
			Value: &statev3.FilterStateValue_FormatString{FormatString: format}}
	}
	name := fmt.Sprint(i)
	return &listenerv3.Listener{
		Name:    name,
		Address: &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: filepath.Join(dir, name)}}},
		ListenerFilters: []*listenerv3.ListenerFilter{
			filter(&proxyprotocolv3.ProxyProtocol{Rules: []*proxyprotocolv3.ProxyProtocol_Rule{tlv(tlvPeer, "peer"), tlv(tlvOther, "other")}}),
			filter(&listenerstatev3.Config{OnAccept: []*statev3.FilterStateValue{state("peer"), state("other")}}),
			filter(&tlsinspectorv3.TlsInspector{}),
		},
	}
}

func networkFilter(m proto.Message) *listenerv3.Filter {
	return &listenerv3.Filter{Name: "x", ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: pack(m)}}
}

// naming is a filter chain that says its name and hangs up.
func naming(name string) *listenerv3.FilterChain {
	text := &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: name}}
	return &listenerv3.FilterChain{Name: name, Filters: []*listenerv3.Filter{networkFilter(&directv3.Config{Response: text})}}
}

// guarded is a filter chain that echoes what RBAC lets through.
func guarded(rbac *rbacv3.RBAC, pki *pki) *listenerv3.FilterChain {
	fc := &listenerv3.FilterChain{Name: "guarded", Filters: []*listenerv3.Filter{networkFilter(rbac), networkFilter(&echov3.Echo{})}}
	if pki != nil {
		fc.TransportSocket = &corev3.TransportSocket{Name: "x", ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: pack(pki.downstream())}}
	}
	return fc
}

// start runs Envoy with the listeners until the test ends.
func start(t *testing.T, dir string, listeners []*listenerv3.Listener) {
	t.Helper()
	admin := filepath.Join(dir, "admin")
	config := &bootstrapv3.Bootstrap{
		Admin:           &bootstrapv3.Admin{Address: &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: admin}}}},
		StaticResources: &bootstrapv3.Bootstrap_StaticResources{Listeners: listeners},
	}
	text, err := protojson.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "envoy.json")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	cmd := exec.Command(envoyPath(t), "-c", file, "--concurrency", "1", "--disable-hot-restart", "--log-level", "warning", "--component-log-level", "misc:error")
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		if err := cmd.Process.Kill(); err == nil {
			<-ended
		}
		if t.Failed() {
			t.Logf("envoy:\n%s", log.String())
		}
	})
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", admin)
	}}}
	deadline := time.Now().Add(60 * time.Second)
	for ; ; time.Sleep(20 * time.Millisecond) { //nolint:forbidigo // another process's readiness
		if resp, err := client.Get("http://envoy/ready"); err == nil {
			body, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if strings.TrimSpace(string(body)) == "LIVE" {
				return
			}
		}
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("envoy ended: %v\n%s", err, log.String())
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("envoy is not ready after 60 s\n%s", log.String())
		}
	}
}

// dial connects and sends the PROXY header that makes the connection look like c.
func dial(t *testing.T, l *listenerv3.Listener, c Connection) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", l.GetAddress().GetPipe().GetPath())
	if err != nil {
		t.Fatalf("listener %s: %v", l.GetName(), err)
	}
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	family := byte(0x11) // TCP over IPv4
	if c.DestinationIP.Is6() {
		family = 0x21
	}
	body := append(c.SourceIP.AsSlice(), c.DestinationIP.AsSlice()...)
	body = binary.BigEndian.AppendUint16(body, c.SourcePort)
	body = binary.BigEndian.AppendUint16(body, c.DestinationPort)
	for kind, key := range map[byte]string{tlvPeer: "peer", tlvOther: "other"} {
		if v, ok := c.FilterState[key]; ok {
			body = binary.BigEndian.AppendUint16(append(body, kind), uint16(len(v)))
			body = append(body, v...)
		}
	}
	header := append([]byte("\r\n\r\n\x00\r\nQUIT\n"), 0x21, family)
	header = append(binary.BigEndian.AppendUint16(header, uint16(len(body))), body...)
	if _, err := conn.Write(header); err != nil {
		t.Fatalf("listener %s: %v", l.GetName(), err)
	}
	return conn
}

// chosen returns the filter chain that Envoy chose; empty where it closed the connection.
func chosen(t *testing.T, l *listenerv3.Listener, c Connection) string {
	t.Helper()
	conn := dial(t, l, c)
	defer conn.Close()
	first := []byte("plain text, long enough for the inspector")
	if c.TransportProtocol == "tls" {
		first = clientHello(c.ServerName, c.ApplicationProtocols)
	}
	// Envoy may have answered and hung up before it reads this: then the answer is there all the same.
	_, _ = conn.Write(first)
	answer, err := io.ReadAll(conn)
	if timeout := net.Error(nil); errors.As(err, &timeout) && timeout.Timeout() {
		t.Fatalf("listener %s: envoy neither answers nor hangs up", l.GetName())
	}
	return string(answer)
}

// clientHello is the first flight of a handshake.
func clientHello(serverName string, protocols []string) []byte {
	r := &recorder{}
	// fails as soon as it wants to read the answer
	_ = tls.Client(r, &tls.Config{ServerName: serverName, NextProtos: protocols, InsecureSkipVerify: true}).Handshake()
	return r.Bytes()
}

type recorder struct {
	net.Conn
	bytes.Buffer
}

func (r *recorder) Write(b []byte) (int, error) { return r.Buffer.Write(b) }
func (r *recorder) Read([]byte) (int, error)    { return 0, io.EOF }
func (r *recorder) Close() error                { return nil }

// admitted reports whether RBAC lets the first byte through.
func admitted(t *testing.T, l *listenerv3.Listener, c Connection, pki *pki) bool {
	t.Helper()
	conn := dial(t, l, c)
	defer conn.Close()
	if c.TLS != nil {
		conn = tls.Client(conn, pki.client(t, c.TLS.URISANs))
	}
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Fatalf("listener %s: %v", l.GetName(), err)
	}
	answer := make([]byte, 1)
	_, err := io.ReadFull(conn, answer)
	if timeout := net.Error(nil); errors.As(err, &timeout) && timeout.Timeout() {
		t.Fatalf("listener %s: envoy neither answers nor hangs up", l.GetName())
	}
	return err == nil
}

// pki is a CA with what it signed.
type pki struct {
	key    *ecdsa.PrivateKey
	cert   *x509.Certificate
	leaves map[string]tls.Certificate // by the URI SANs
}

func newPKI(t *testing.T) *pki {
	t.Helper()
	p := &pki{leaves: map[string]tls.Certificate{}}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	p.key, p.cert = p.sign(t, template, template)
	return p
}

func (p *pki) sign(t *testing.T, template, parent *x509.Certificate) (*ecdsa.PrivateKey, *x509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer := p.key
	if signer == nil {
		signer = key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return key, cert
}

// leaf returns a certificate with exactly these URI SANs.
func (p *pki) leaf(t *testing.T, sans []string) tls.Certificate {
	t.Helper()
	name := strings.Join(sans, ",")
	if c, ok := p.leaves[name]; ok {
		return c
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(int64(2 + len(p.leaves))), Subject: pkix.Name{CommonName: "leaf"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}, DNSNames: []string{"leaf"}}
	for _, s := range sans {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		template.URIs = append(template.URIs, u)
	}
	key, cert := p.sign(t, template, p.cert)
	p.leaves[name] = tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}
	return p.leaves[name]
}

func (p *pki) client(t *testing.T, sans []string) *tls.Config {
	t.Helper()
	pool := x509.NewCertPool()
	pool.AddCert(p.cert)
	return &tls.Config{RootCAs: pool, ServerName: "leaf", Certificates: []tls.Certificate{p.leaf(t, sans)}}
}

// downstream is the server's side, with the certificate for spiffe://td/server, which leaf has made before.
func (p *pki) downstream() *tlsv3.DownstreamTlsContext {
	source := func(kind string, der []byte) *corev3.DataSource {
		return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})}}
	}
	leaf := p.leaves["spiffe://td/server"]
	key, err := x509.MarshalECPrivateKey(leaf.PrivateKey.(*ecdsa.PrivateKey))
	if err != nil {
		panic(err)
	}
	return &tlsv3.DownstreamTlsContext{RequireClientCertificate: wrapperspb.Bool(true), CommonTlsContext: &tlsv3.CommonTlsContext{
		TlsCertificates:       []*tlsv3.TlsCertificate{{CertificateChain: source("CERTIFICATE", leaf.Certificate[0]), PrivateKey: source("EC PRIVATE KEY", key)}},
		ValidationContextType: &tlsv3.CommonTlsContext_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{TrustedCa: source("CERTIFICATE", p.cert.Raw)}},
	}}
}
