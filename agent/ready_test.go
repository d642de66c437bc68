package agent

import (
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/goleak"

	"github.com/mantlet/mantlet/agent/relay"
	"github.com/mantlet/mantlet/xds/proxyuser"
)

// parts are what readiness asks, as the test says.
type parts struct {
	redirect, svid error
	missing        map[string][]string // type URL →
	changed        chan struct{}
	verdicts       string
	identity       string
	packets        string
}

// noVerdicts is what readiness asks of verdicts, beside the Missing of the ledger.
type noVerdicts struct{ *parts }

func (n noVerdicts) Missing() string { return n.verdicts }

// noPackets is the same of packets.
type noPackets struct{ *parts }

func (n noPackets) Missing() string { return n.packets }

func (p *parts) Check() error { return p.redirect }

func (p *parts) GetX509SVID() (*x509svid.SVID, error) {
	return &x509svid.SVID{Certificates: []*x509.Certificate{{}}}, p.svid
}

func (p *parts) GetX509BundleForTrustDomain(spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	return nil, errors.New("not asked for")
}
func (p *parts) Updated() <-chan struct{}                 { return p.changed }
func (p *parts) Changed() <-chan struct{}                 { return p.changed }
func (p *parts) Missing(url string, _ ...string) []string { return p.missing[url] }

// listen takes the capture ports, as Envoy would, until the test ends.
func listen(t *testing.T) {
	t.Helper()
	for _, port := range []string{"15001", "15006"} {
		l, err := net.Listen("tcp", "[::]:"+port)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
	}
}

// Each thing that is missing is enough, and is named.
func TestMissing(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	listen(t)
	running := func(uid int) *peer {
		p := newPeer(proxyuser.User{UID: uint32(uid)})
		p.set(1)
		return p
	}
	stopped := make(chan struct{})
	close(stopped)
	for _, tt := range []struct {
		name   string
		change func(*readiness, *parts)
		want   string
	}{
		{"nothing", func(*readiness, *parts) {}, ""},
		{"redirect", func(_ *readiness, p *parts) { p.redirect = errors.New("table gone") }, "table gone"},
		{"identity", func(_ *readiness, p *parts) { p.svid = errors.New("expired") }, "expired"},
		{"verdicts", func(_ *readiness, p *parts) { p.verdicts = "none have come" }, "none have come"},
		{"another identity", func(_ *readiness, p *parts) { p.identity = "has another name now" }, "has another name now"},
		{"packets", func(_ *readiness, p *parts) { p.packets = "no packets" }, "no packets"},
		{"envoy", func(r *readiness, _ *parts) { r.envoy.set(0) }, "envoy is not running"},
		{"listener", func(_ *readiness, p *parts) { p.missing[relay.TypeListener] = []string{"gate"} }, "envoy has not accepted: gate (no control plane)"},
		{"rbac", func(_ *readiness, p *parts) { p.missing[relay.TypeExtension] = []string{"rbac"} }, "envoy has not accepted: rbac"},
		{"another user's ports", func(r *readiness, _ *parts) { r.envoy = running(os.Getuid() + 1) }, "does not listen on port 15006 15001"},
		{"stopping", func(r *readiness, _ *parts) { r.stopping = stopped }, "stopping"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := &parts{missing: map[string][]string{}, changed: make(chan struct{})}
			r := &readiness{
				tables: []table{p}, source: p, ledger: p, verdicts: noVerdicts{p}, packets: noPackets{p},
				identity: func() (string, <-chan struct{}) { return p.identity, p.changed },
				trouble:  func() string { return "no control plane" }, envoy: running(os.Getuid()),
			}
			tt.change(r, p)
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			got := strings.Join(r.wait(ctx), "; ")
			if (tt.want == "") != (got == "") || !strings.Contains(got, tt.want) {
				t.Errorf("missing %q, want %q", got, tt.want)
			}
			answer := httptest.NewRecorder()
			statusHandler(r, slog.New(slog.DiscardHandler)).ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "/ready", nil))
			if want := map[bool]int{true: http.StatusOK, false: http.StatusServiceUnavailable}[tt.want == ""]; answer.Code != want {
				t.Errorf("status %d, want %d", answer.Code, want)
			}
			if !strings.Contains(answer.Body.String(), tt.want) {
				t.Errorf("body %q, want %q", answer.Body, tt.want)
			}
		})
	}
}

// Envoy's certificate may be the last thing to come, and then only the SDS server tells of it. Nobody else changes here, and
// the wait has no other end than that of the test.
func TestWaitForCertificate(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	listen(t)
	p := &parts{missing: map[string][]string{}, changed: make(chan struct{})}
	held, asked := make(chan struct{}), make(chan struct{}, 1)
	r := &readiness{
		tables: []table{p}, source: p, ledger: p, verdicts: noVerdicts{p}, packets: noPackets{p}, envoy: newPeer(proxyuser.User{UID: uint32(os.Getuid())}),
		identity: func() (string, <-chan struct{}) {
			select {
			case <-held:
				return "", nil
			default:
			}
			select {
			case asked <- struct{}{}:
			default:
			}
			return "envoy has no certificate", held
		},
	}
	r.envoy.set(1)
	waited := make(chan []string)
	go func() { waited <- r.wait(t.Context()) }()
	<-asked
	close(held)
	if got := <-waited; len(got) > 0 {
		t.Errorf("missing %v", got)
	}
}

func TestWaitParameter(t *testing.T) {
	r := &readiness{}
	for _, wait := range []string{"soon", "-1s", "11m"} {
		answer := httptest.NewRecorder()
		statusHandler(r, slog.New(slog.DiscardHandler)).ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "/ready?wait="+wait, nil))
		if answer.Code != http.StatusBadRequest {
			t.Errorf("wait=%s: status %d", wait, answer.Code)
		}
	}
}
