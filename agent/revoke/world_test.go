package revoke

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mantlet/mantlet/agent/flows"
	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/agent/podtest"
	"github.com/mantlet/mantlet/agent/verdicts"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/verdict/wire"
	"github.com/mantlet/mantlet/xds/names"
)

// dialler, in the environment, makes the test process one that opens a connection as Envoy would, and keeps it until its input ends.
const dialler = "MANTLET_REVOKE_DIAL"

func TestMain(m *testing.M) {
	if to := os.Getenv(dialler); to != "" {
		d := net.Dialer{Control: netfilter.Exempt}
		c, err := d.Dial("tcp", to) //nolint:noctx // on loopback
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		_, _ = io.Copy(io.Discard, os.Stdin)
		_ = c.Close()
		return
	}
	os.Exit(podtest.Main(m))
}

var (
	api = spiffeid.RequireFromString("spiffe://td.example/ns/shop/sa/api")
	web = spiffeid.RequireFromString("spiffe://td.example/ns/shop/sa/web")
)

// patience bounds what is expected to happen.
const patience = 10 * time.Second

// world is a Revoker with its surroundings.
type world struct {
	*Revoker
	holder *verdicts.Holder
	coming atomic.Bool

	mu      sync.Mutex
	records []flows.Record
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{holder: verdicts.New()}
	r, err := New(Config{
		Verdicts: w.holder, Coming: w.coming.Load, Envoy: ByMark(names.ProxyMark), Logger: slog.New(slog.DiscardHandler),
		Record: func(r flows.Record) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.records = append(w.records, r)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	w.Revoker = r
	t.Cleanup(r.Close)
	return w
}

// admit puts verdicts in force, for both directions, that let identities pass on a port.
func (w *world) admit(t testing.TB, port uint16, ids ...spiffeid.ID) {
	t.Helper()
	table := verdict.Table{Isolating: []string{"shop/db"}, Reasons: []verdict.Reason{{Policy: "shop/db", Rule: "ingress[0]", Text: "admitted"}}}
	if len(ids) > 0 {
		b := verdict.Block{Protocol: verdict.TCP, Ports: []verdict.PortRange{{First: port, Last: port}}}
		for _, id := range ids {
			b.Peers.ByIdentity = append(b.Peers.ByIdentity, verdict.Identity{ID: id, Verdict: verdict.Verdict{Allow: true}})
		}
		table.Blocks = []verdict.Block{b}
	}
	bytes, err := wire.Marshal(&verdict.Verdicts{Subject: api, Mode: verdict.Strict, Ingress: table, Egress: table})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.holder.Apply(bytes); err != nil {
		t.Fatal(err)
	}
}

// cutRecords is what has been written down so far.
func (w *world) cutRecords() []flows.Record {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]flows.Record(nil), w.records...)
}

// proxied is a connection through something like Envoy: two connections, each with both of its ends.
type proxied struct {
	flows.Connection
	peer, taken, onward, app net.Conn
}

// connect makes one of the given direction over loopback: to a capture port, and from there to an app's.
func connect(t testing.TB, d flows.Direction, capture, app net.Listener, peer string) *proxied {
	t.Helper()
	p := &proxied{}
	p.peer, p.taken = pair(t, capture)
	p.onward, p.app = pair(t, app)
	p.Connection = flows.Connection{
		Direction: d, Began: time.Now(), Peer: peer, Authenticated: true, Cluster: names.ClusterApp,
		Source: addressOf(p.peer.LocalAddr()), Destination: addressOf(p.app.LocalAddr()),
		Local: addressOf(p.onward.LocalAddr()), Remote: addressOf(p.onward.RemoteAddr()),
	}
	return p
}

func pair(t testing.TB, l net.Listener) (client, server net.Conn) {
	t.Helper()
	client, err := net.Dial("tcp", l.Addr().String()) //nolint:noctx // on loopback
	if err != nil {
		t.Fatal(err)
	}
	server, err = l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

func listen(t testing.TB, address string) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", address) //nolint:noctx // on loopback
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func addressOf(a net.Addr) netip.AddrPort {
	p := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
}

// wantCut fails the test unless both ends have been reset.
func (p *proxied) wantCut(t testing.TB) {
	t.Helper()
	for name, c := range map[string]net.Conn{"peer": p.peer, "app": p.app} {
		_ = c.SetReadDeadline(time.Now().Add(patience))
		if _, err := c.Read(make([]byte, 1)); err == nil || isTimeout(err) || errors.Is(err, io.EOF) {
			t.Errorf("the %s was not told: %v", name, err)
		}
	}
}

// wantOpen fails the test unless bytes pass both ways of both connections.
func (p *proxied) wantOpen(t testing.TB) {
	t.Helper()
	for _, c := range [][2]net.Conn{{p.peer, p.taken}, {p.taken, p.peer}, {p.onward, p.app}, {p.app, p.onward}} {
		_ = c[1].SetReadDeadline(time.Now().Add(patience))
		if _, err := c[0].Write([]byte("x")); err != nil {
			t.Error(err)
		}
		if _, err := c[1].Read(make([]byte, 1)); err != nil {
			t.Error(err)
		}
	}
}

func isTimeout(err error) bool {
	var e net.Error
	return errors.As(err, &e) && e.Timeout()
}
